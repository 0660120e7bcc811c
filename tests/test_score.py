"""Tests of the deployment scorer, export/score.py."""

import ast
import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "export" / "score.py"


def _import_script():
    spec = importlib.util.spec_from_file_location("score", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


score = _import_script()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- Writing PNG files by hand -------------------------------------------------------------------


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def pack(samples, depth):
    """[h, w, c] integers to [h, row_bytes] bytes, most significant bit first."""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        return rows.astype(">u2").view(np.uint8)
    if depth == 8:
        return rows.astype(np.uint8)
    bits = (rows[..., None] >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1)


def filtered(rows, kinds, step):
    """Apply the PNG filter kinds[y] to row y; every neighbour is known here, so no loop on x."""
    padded = np.pad(rows.astype(int), ((1, 0), (step, 0)))
    here, left = padded[1:, step:], padded[1:, :-step]
    up, corner = padded[:-1, step:], padded[:-1, :-step]
    estimate = left + up - corner
    candidates = np.stack([left, up, corner])  # argmin breaks ties in this order, as PNG asks
    nearest = np.abs(candidates - estimate).argmin(axis=0)
    paeth = np.take_along_axis(candidates, nearest[None], axis=0)[0]
    predictors = np.stack([0 * here, left, up, (left + up) // 2, paeth])
    lines = (here - predictors[kinds, np.arange(len(rows))]) % 256
    return np.column_stack([kinds, lines]).astype(np.uint8).tobytes()


def header(width, height, depth=8, colour=0, compression=0, filtering=0, interlace=0):
    fields = (width, height, depth, colour, compression, filtering, interlace)
    return chunk(b"IHDR", struct.pack(">2I5B", *fields))


def png(samples, depth=8, colour=0, kinds=0, before=b"", parts=1):
    """The bytes of a PNG file of [h, w, c] integer samples."""
    height, width, count = samples.shape
    kinds = np.broadcast_to(kinds, height)
    data = zlib.compress(filtered(pack(samples, depth), kinds, max(1, depth * count // 8)))
    cut = -(-len(data) // parts)
    pixels = b"".join(chunk(b"IDAT", data[i : i + cut]) for i in range(0, len(data), cut))
    first = score.PNG_SIGNATURE + header(width, height, depth, colour)
    return first + before + pixels + chunk(b"IEND", b"")


def write(path, data):
    path.write_bytes(data)
    return path


GREY = png(np.arange(6).reshape(2, 3, 1))


# --- read_png ------------------------------------------------------------------------------------

FORMATS = [
    *[(0, 1, depth) for depth in (1, 2, 4, 8, 16)],
    *[(2, 3, depth) for depth in (8, 16)],
    *[(4, 2, depth) for depth in (8, 16)],
    *[(6, 4, depth) for depth in (8, 16)],
]
KEPT = {1: 1, 2: 1, 3: 3, 4: 3}  # channels left once alpha is dropped


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, "mixed"])
@pytest.mark.parametrize(("colour", "count", "depth"), FORMATS)
def test_read_png_known_samples(tmp_path, rng, colour, count, depth, kind):
    samples = rng.integers(2**depth, size=(10, 7, count))
    kinds = np.arange(10) % 5 if kind == "mixed" else kind
    path = write(tmp_path / "x.png", png(samples, depth, colour, kinds))
    image = score.read_png(path)
    expected = (samples / (2**depth - 1))[..., : KEPT[count]].transpose(2, 0, 1)
    assert image.dtype == np.float32
    assert image.shape == expected.shape
    np.testing.assert_allclose(image, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize(("colour", "count"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_read_png_filters_agree_with_pil(tmp_path, rng, colour, count, kind):
    samples = rng.integers(256, size=(9, 5, count))
    path = write(tmp_path / "x.png", png(samples, 8, colour, kind))
    with Image.open(path) as opened:
        expected = np.asarray(opened).reshape(9, 5, count)
    np.testing.assert_array_equal(expected, samples)  # the file is what this test means it to be
    image = score.read_png(str(path))
    np.testing.assert_array_equal(np.rint(image * 255), samples[..., : KEPT[count]].T.swapaxes(1, 2))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_read_png_palette_depths(tmp_path, rng, depth):
    palette = rng.integers(256, size=(2**depth, 3))
    indices = rng.integers(2**depth, size=(6, 5, 1))
    before = chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + chunk(b"tRNS", b"\x00")
    path = write(tmp_path / "x.png", png(indices, depth, 3, 4, before))
    expected = palette[indices[..., 0]].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(score.read_png(path), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (13, 9), (64, 48)])
@pytest.mark.parametrize(
    ("mode", "largest"),
    [("L", 255), ("RGB", 255), ("RGBA", 255), ("LA", 255), ("P", 255), ("1", 1), ("I;16", 65535)],
)
def test_read_png_agrees_with_pil(tmp_path, rng, mode, largest, size):
    # A smooth image with some noise makes the encoder pick several filters.
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0]))[..., None] * [1, 2, 3, 4]
    pixels = (ramp + rng.integers(4, size=ramp.shape)) % 256
    if mode == "I;16":
        image = Image.fromarray((pixels[..., 0] * 257 + 3 * pixels[..., 1]).clip(0, 65535).astype(np.uint16))
    else:
        bands = pixels if mode in ("RGBA", "LA") else pixels[..., :3]
        image = Image.fromarray(bands.astype(np.uint8)).convert(mode)
    assert image.mode == mode
    path = tmp_path / "x.png"
    image.save(path)
    with Image.open(path) as opened:
        known = np.asarray(opened.convert("RGB") if mode == "P" else opened, np.float32)
    expected = np.atleast_3d(known).transpose(2, 0, 1) / largest
    found = score.read_png(path)
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-6)
    assert len(found) == (3 if mode in ("RGB", "RGBA", "P") else 1)


def test_read_png_joins_idat_chunks_and_skips_other_chunks(tmp_path, rng):
    samples = rng.integers(256, size=(8, 8, 3))
    data = png(samples, 8, 2, 1, chunk(b"tEXt", b"Title\x00test"), parts=5)
    image = score.read_png(write(tmp_path / "x.png", data + b"after the end"))
    np.testing.assert_array_equal(np.rint(image * 255), samples.transpose(2, 0, 1))


def body_of(kind, data=GREY):
    """The slice of the body of the first chunk of a kind."""
    start = data.index(kind) + 4
    (length,) = struct.unpack(">I", data[start - 8 : start - 4])
    return slice(start, start + length)


def with_idat(data, before=b"", **fields):
    """A 3x2 grey file with the given image data in place of its own."""
    first = score.PNG_SIGNATURE + header(3, 2, **fields) + before
    return first + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def corrupted(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


ROWS = zlib.compress(bytes(8))
BROKEN = {
    "empty": (b"", "not a PNG file"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(40), "convert the image to PNG"),
    "signature only": (GREY[:8], "truncated"),
    "no IEND": (GREY[:-12], "truncated \\(no IEND chunk\\)"),
    "within IDAT": (GREY[: body_of(b"IDAT").start + 6], "truncated within a IDAT chunk"),
    "CRC of IHDR": (corrupted(GREY, body_of(b"IHDR").start + 3), "wrong CRC in its IHDR chunk"),
    "CRC of IDAT": (corrupted(GREY, body_of(b"IDAT").start + 3), "wrong CRC in its IDAT chunk"),
    "CRC itself": (corrupted(GREY, len(GREY) - 1), "wrong CRC in its IEND chunk"),
    "interlaced": (with_idat(ROWS, interlace=1), "interlaced.*save it without interlacing"),
    "depth": (with_idat(ROWS, depth=3), "invalid header"),
    "colour": (with_idat(ROWS, colour=5), "invalid header"),
    "depth of colour": (with_idat(ROWS, depth=4, colour=2), "invalid header"),
    "compression": (with_idat(ROWS, compression=1), "invalid header"),
    "filtering": (with_idat(ROWS, filtering=1), "invalid header"),
    "interlace": (with_idat(ROWS, interlace=2), "invalid header"),
    "no pixels": (score.PNG_SIGNATURE + header(0, 2) + chunk(b"IEND", b""), "PNG is 0x2 pixels"),
    "bomb": (score.PNG_SIGNATURE + header(2**31 - 1, 2**31 - 1) + chunk(b"IEND", b""), "outside"),
    "IHDR length": (score.PNG_SIGNATURE + chunk(b"IHDR", b"short"), "IHDR chunk of 5 bytes"),
    "no IHDR": (score.PNG_SIGNATURE + chunk(b"IEND", b""), "does not start with an IHDR"),
    "no IDAT": (score.PNG_SIGNATURE + header(3, 2) + chunk(b"IEND", b""), "not the 8 bytes"),
    "bad zlib": (with_idat(b"no zlib stream"), "do not decompress"),
    "bad adler": (with_idat(corrupted(ROWS, len(ROWS) - 1)), "do not decompress"),
    "short zlib": (with_idat(ROWS[:-1]), "not the 8 bytes"),
    "few rows": (with_idat(zlib.compress(bytes(7))), "not the 8 bytes"),
    "many rows": (with_idat(zlib.compress(bytes(10**6))), "not the 8 bytes"),
    "filter type": (with_idat(zlib.compress(b"\0\1\2\3\5\1\2\3")), "row 1 has the unknown filter"),
    "no palette": (with_idat(ROWS, colour=3), "no valid palette"),
    "odd palette": (with_idat(ROWS, chunk(b"PLTE", b"1234"), colour=3), "no valid palette"),
    "beyond palette": (
        with_idat(zlib.compress(b"\0\0\0\1\0\0\0\2"), chunk(b"PLTE", b"123456"), colour=3),
        "beyond its palette of 2",
    ),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
def test_read_png_names_the_broken_file(tmp_path, data, message):
    path = write(tmp_path / "broken.png", data)
    with pytest.raises(ValueError, match=message) as caught:
        score.read_png(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_read_png_detects_every_cut_and_every_changed_byte(tmp_path):
    path = tmp_path / "x.png"
    broken = [GREY[:length] for length in range(len(GREY))]
    broken += [corrupted(GREY, position) for position in range(len(GREY))]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="PNG"):
            score.read_png(path)


def test_read_png_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        score.read_png(tmp_path / "missing.png")


# --- load_images ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((5, 3, 4, 6), 3, (5, 3, 4, 6)),
        ((3, 4, 6), 3, (1, 3, 4, 6)),
        ((3, 4, 6), None, (1, 3, 4, 6)),
        ((5, 1, 4, 6), 1, (5, 1, 4, 6)),
        ((5, 4, 6), 1, (5, 1, 4, 6)),
        ((1, 4, 6), 1, (1, 1, 4, 6)),
        ((4, 6), 1, (1, 1, 4, 6)),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_load_images_takes_float_arrays_as_they_are(tmp_path, rng, shape, channels, expected, dtype):
    array = rng.normal(size=shape).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    images = score.load_images(tmp_path / "x.npy", channels, 0.3, 0.2)
    assert images.shape == expected
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images.ravel(), array.astype(np.float32).ravel())


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.0, 1.0), (0.4, 0.25)])
def test_load_images_normalises_uint8_and_png_alike(tmp_path, rng, mean, std):
    pixels = rng.integers(256, size=(3, 4, 6), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "x.PNG")
    images = score.load_images(tmp_path / "x.npy", 3, mean, std)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images[0], (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(images, score.load_images(tmp_path / "x.PNG", 3, mean, std))


def test_load_images_normalises_to_minus_one_and_one_by_default(tmp_path):
    write(tmp_path / "x.png", png(np.array([[[0], [255]]])))
    np.testing.assert_array_equal(score.load_images(tmp_path / "x.png"), [[[[-1, 1]]]])


def test_load_images_converts_png_to_the_channels_of_the_model(tmp_path, rng):
    colour = rng.integers(256, size=(4, 6, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "rgb.png")
    Image.fromarray(colour[..., 0]).save(tmp_path / "grey.png")
    grey = score.load_images(tmp_path / "rgb.png", 1, 0, 1)
    luma = np.asarray(Image.fromarray(colour).convert("L")) / 255
    assert grey.shape == (1, 1, 4, 6)
    np.testing.assert_allclose(grey[0, 0], luma, atol=1 / 255)  # PIL rounds to integers
    repeated = score.load_images(tmp_path / "grey.png", 3, 0, 1)
    assert repeated.shape == (1, 3, 4, 6)
    for channel in repeated[0]:
        np.testing.assert_allclose(channel, colour[..., 0] / 255, rtol=1e-6)
    with pytest.raises(ValueError, match=r"rgb\.png: a PNG gives 1 or 3 channels.* takes 4"):
        score.load_images(tmp_path / "rgb.png", 4)


@pytest.mark.parametrize(
    ("array", "channels", "message"),
    [
        (np.zeros((4, 6)), 3, r"shape \[4, 6\] is not that of images"),
        (np.zeros((4, 6)), None, r"shape \[4, 6\] is not that of images"),
        (np.zeros(4), 1, r"shape \[4\] is not that of images"),
        (np.zeros((1, 1, 3, 4, 6)), 3, "is not that of images"),
        (np.zeros((0, 3, 4, 6)), 3, "holds no image"),
        (np.zeros((1, 3, 4, 6), int), 3, "dtype int64 is not read"),
        (np.zeros((1, 3, 4, 6), bool), 3, "dtype bool is not read"),
        (np.zeros((1, 3, 4, 6), complex), 3, "dtype complex128 is not read"),
        (np.full((1, 3, 4, 6), None), 3, "not a .npy array.*numpy.save"),
    ],
)
def test_load_images_refuses_arrays_that_are_not_images(tmp_path, array, channels, message):
    path = tmp_path / "x.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=message) as caught:
        score.load_images(path, channels)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x08\x00{'descr(\n"])
def test_load_images_refuses_files_that_are_not_npy(tmp_path, data):
    path = write(tmp_path / "x.npy", data)
    with pytest.raises(ValueError, match=r"x\.npy: not a \.npy array"):
        score.load_images(path)


def test_load_images_refuses_truncated_npy(tmp_path):
    np.save(tmp_path / "whole.npy", np.zeros((1, 3, 4, 6)))
    path = write(tmp_path / "x.npy", (tmp_path / "whole.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"x\.npy: not a \.npy array"):
        score.load_images(path)


def test_load_images_refuses_npz(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((1, 3, 4, 6)))
    path = (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="npz archive"):
        score.load_images(path)


def test_load_images_refuses_other_extensions(tmp_path):
    with pytest.raises(ValueError, match=r"x\.jpg: unsupported extension '\.jpg'"):
        score.load_images(write(tmp_path / "x.jpg", b""))


def test_load_images_missing_npy(tmp_path):
    with pytest.raises(FileNotFoundError):
        score.load_images(tmp_path / "missing.npy")


# --- Models --------------------------------------------------------------------------------------

# Versions that old releases of onnxruntime load as well.
OPSET, IR_VERSION = 13, 8
FLOAT = TensorProto.FLOAT


def save_model(path, nodes, inputs, outputs, constants=()):
    graph = helper.make_graph(nodes, "discriminator", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def linear_model(path, shape, dtype=FLOAT):
    """One logit an image: the mean over pixels, channels weighted by 1, 2, 3."""
    weight = np.arange(1, 1 + shape[1]).astype(helper.tensor_dtype_to_np_dtype(dtype))
    constants = [numpy_helper.from_array(weight.reshape(-1, 1), "weight")]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["features"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["features", "weight"], ["logit"]),
    ]
    inputs = [helper.make_tensor_value_info("x", dtype, shape)]
    outputs = [helper.make_tensor_value_info("logit", dtype, [shape[0], 1])]
    return save_model(path, nodes, inputs, outputs, constants)


def linear_scores(images):
    return images.mean(axis=(2, 3), dtype=np.float64) @ np.arange(1, 1 + images.shape[1])


def patch_model(path, shape):
    """Outputs: a patch map (2x2 average pool of the first channel mean), and decoy features."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("AveragePool", ["mean"], ["patches"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Neg", ["x"], ["features"]),
    ]
    inputs = [helper.make_tensor_value_info("x", FLOAT, shape)]
    outputs = [
        helper.make_tensor_value_info("patches", FLOAT, [shape[0], 1, None, None]),
        helper.make_tensor_value_info("features", FLOAT, shape),
    ]
    return save_model(path, nodes, inputs, outputs)


@pytest.fixture
def model(tmp_path):
    return linear_model(tmp_path / "disc.onnx", ["batch", 3, 4, 6])


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 11])
@pytest.mark.parametrize("dim", ["batch", None, 1, 4])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_score_agrees_with_numpy(tmp_path, rng, dim, count, batch):
    path = linear_model(tmp_path / "disc.onnx", [dim, 3, 4, 6])
    images = rng.normal(size=(count, 3, 4, 6)).astype(np.float32)
    scores = score.score(path, images, batch)
    assert scores.shape == (count,)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, linear_scores(images), rtol=1e-5, atol=1e-6)


class Recorder:
    """A session that records the batches it is run on."""

    def __init__(self, session):
        self.session = session
        self.batches = []

    def get_inputs(self):
        return self.session.get_inputs()

    def get_outputs(self):
        return self.session.get_outputs()

    def run(self, names, feeds):
        self.batches += feeds.values()
        return self.session.run(names, feeds)


@pytest.mark.parametrize(("dim", "sizes"), [("batch", [3, 3, 1]), (2, [2, 2, 2, 2]), (8, [8])])
def test_score_batches(tmp_path, rng, dim, sizes):
    session = Recorder(score.open_session(linear_model(tmp_path / "d.onnx", [dim, 3, 4, 6])))
    images = rng.normal(size=(7, 3, 4, 6)).astype(np.float32)
    score.score(session, images, batch=3)
    assert [len(batch) for batch in session.batches] == sizes
    fed = np.concatenate(session.batches)
    np.testing.assert_array_equal(fed[:7], images)
    for filling in fed[7:]:
        np.testing.assert_array_equal(filling, images[-1])


@pytest.mark.parametrize("dim", ["batch", 2])
def test_score_is_the_mean_of_the_first_output(tmp_path, rng, dim):
    path = patch_model(tmp_path / "disc.onnx", [dim, 3, 4, 6])
    images = rng.normal(size=(5, 3, 4, 6)).astype(np.float32)
    assert [o.name for o in ort.InferenceSession(path).get_outputs()] == ["patches", "features"]
    expected = images.mean(axis=(1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(score.score(str(path), images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["FLOAT16", "FLOAT", "DOUBLE"])
def test_score_casts_to_the_input_type_of_the_model(tmp_path, rng, dtype):
    path = linear_model(tmp_path / "d.onnx", ["batch", 3, 4, 6], getattr(TensorProto, dtype))
    images = rng.normal(size=(5, 3, 4, 6)).astype(np.float32)
    np.testing.assert_allclose(score.score(path, images), linear_scores(images), atol=1e-2)


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (2, 3, 6, 4), (2, 3, 4), (3, 4, 6), (4, 6)])
def test_score_refuses_images_of_another_shape(model, shape):
    with pytest.raises(ValueError, match=r"image shape .*but the model takes \[3, 4, 6\]"):
        score.score(model, np.zeros(shape, np.float32))


def test_score_refuses_batch_zero(model):
    with pytest.raises(ValueError, match="batch is 0; it must be 1 or more"):
        score.score(model, np.zeros((1, 3, 4, 6), np.float32), 0)


def test_score_refuses_output_without_batch(tmp_path):
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[0, 1, 2, 3], keepdims=0)]
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["n", 3, 4, 6])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, [])]
    path = save_model(tmp_path / "disc.onnx", nodes, inputs, outputs)
    with pytest.raises(ValueError, match=r"first output 'y' has shape \[\] for 1 images"):
        score.score(path, np.zeros((1, 3, 4, 6), np.float32))


def baked_model(path):
    """A model with a batch of 2 baked in, as by a careless export, though its input is dynamic."""
    nodes = [helper.make_node("Reshape", ["x", "flat"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["n", 3, 4, 6])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, [2, 72])]
    flat = numpy_helper.from_array(np.array([2, 72]), "flat")
    return save_model(path, nodes, inputs, outputs, [flat])


def test_score_reports_a_run_that_fails(tmp_path):
    path = baked_model(tmp_path / "disc.onnx")
    assert score.score(path, np.zeros((2, 3, 4, 6), np.float32)).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"cannot be run on a batch of shape \[3, 3, 4, 6\]"):
        score.score(path, np.zeros((3, 3, 4, 6), np.float32))


@pytest.mark.parametrize(
    "inputs",
    [
        [("x", FLOAT, ["n", 72])],
        [("x", TensorProto.INT64, ["n", 3, 4, 6])],
        [("x", FLOAT, ["n", 3, 4, 6]), ("label", FLOAT, ["n"])],
    ],
    ids=["rank", "dtype", "label"],
)
def test_model_input_refuses_other_inputs(tmp_path, inputs):
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    infos = [helper.make_tensor_value_info(*each) for each in inputs]
    outputs = [helper.make_tensor_value_info("y", *inputs[0][1:])]
    path = save_model(tmp_path / "disc.onnx", nodes, infos, outputs)
    with pytest.raises(ValueError, match="not one float image input"):
        score.model_input(score.open_session(path))


# --- Command line --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, rng):
    """A folder with a .npy of two images, two .png images, and a file to leave alone."""
    folder = tmp_path / "images"
    folder.mkdir()
    np.save(folder / "b.npy", rng.normal(size=(2, 3, 4, 6)).astype(np.float32))
    for name in ("c.PNG", "a.png"):
        pixels = rng.integers(256, size=(4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def expected_of(folder, mean=0.5, std=0.5):
    """Names and scores of the images of `folder`, in order."""
    arrays = np.load(folder / "b.npy")
    a, c = (np.asarray(Image.open(folder / name)).transpose(2, 0, 1) for name in ("a.png", "c.PNG"))
    a, c = ((pixels / 255 - mean) / std for pixels in (a, c))
    names = [f"{folder / 'a.png'}", *(f"{folder / 'b.npy'}[{i}]" for i in (0, 1))]
    return [*names, f"{folder / 'c.PNG'}"], linear_scores(np.stack([a, *arrays, c]))


@pytest.mark.parametrize("dim", ["batch", 3])
@pytest.mark.parametrize("options", [[], ["--batch", "3"], ["--mean", "0.25", "--std", "2"]])
def test_main_text(tmp_path, folder, capsys, dim, options):
    model = linear_model(tmp_path / "disc.onnx", [dim, 3, 4, 6])
    assert score.main([str(model), str(folder), *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    scores, names = zip(*(line.split("\t") for line in captured.out.splitlines()), strict=True)
    expected_names, expected = expected_of(folder, *map(float, options[1::2] if len(options) > 2 else ()))
    assert list(names) == expected_names
    np.testing.assert_allclose([float(each) for each in scores], expected, rtol=1e-5, atol=1e-6)


def test_main_json(model, folder, capsys):
    assert score.main(["--json", str(model), "--batch", "2", str(folder)]) == 0
    results = json.loads(capsys.readouterr().out)
    names, expected = expected_of(folder)
    assert [set(each) for each in results] == [{"name", "score"}] * 4
    assert [each["name"] for each in results] == names
    np.testing.assert_allclose([each["score"] for each in results], expected, rtol=1e-5, atol=1e-6)


def test_main_keeps_the_order_of_its_arguments(model, folder, capsys):
    paths = [str(folder / name) for name in ("c.PNG", "a.png", "c.PNG")]
    assert score.main([str(model), *paths]) == 0
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()] == paths


def test_main_takes_options_between_model_and_images(model, folder, capsys):
    assert score.main([str(model), "--batch", "2", str(folder / "a.png"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_main_takes_images_of_several_sizes_for_dynamic_sizes(tmp_path, rng, capsys):
    model = linear_model(tmp_path / "disc.onnx", ["batch", 3, "height", "width"])
    arrays = [rng.normal(size=(3, size, 5)).astype(np.float32) for size in (4, 4, 6, 4)]
    for index, array in enumerate(arrays):
        np.save(tmp_path / f"{index}.npy", array)
    assert score.main([str(model), *(str(tmp_path / f"{i}.npy") for i in range(4))]) == 0
    scores = [float(line.split("\t")[0]) for line in capsys.readouterr().out.splitlines()]
    expected = [linear_scores(array[None])[0] for array in arrays]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_main_writes_scores_that_are_not_finite(model, tmp_path, capsys):
    path = tmp_path / "x.npy"
    np.save(path, np.full((3, 4, 6), np.nan))
    assert score.main([str(model), str(path)]) == 0
    assert capsys.readouterr().out == f"nan\t{path}[0]\n"
    assert score.main([str(model), str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": f"{path}[0]", "score": None}]


@pytest.fixture
def files(tmp_path, monkeypatch, model, folder):
    """Make the current folder hold what the cases of ERRORS name."""
    baked_model(tmp_path / "baked.onnx")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "photo.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "large.png")
    np.save(tmp_path / "grey.npy", np.zeros((2, 1, 4, 6), np.float32))
    np.save(tmp_path / "last.npy", np.zeros((4, 6, 3), np.float32))
    monkeypatch.chdir(tmp_path)


ERRORS = [
    ("", "the following arguments are required: model"),
    ("disc.onnx", "nothing to score"),
    ("disc.onnx empty", "nothing to score"),
    ("disc.onnx images missing.png", "missing.png: no such file or folder"),
    ("missing.onnx images", "missing.onnx: no such model file"),
    ("images images", "images: no such model file"),
    ("text.onnx images", "text.onnx: not an ONNX model"),
    ("disc.onnx images photo.jpg", "photo.jpg: unsupported extension '.jpg'"),
    ("disc.onnx images text.png", "text.png: not a PNG file"),
    ("disc.onnx images text.png --batch 1", "text.png: not a PNG file"),
    ("baked.onnx images", "the model cannot be run on a batch of shape [4, 3, 4, 6]"),
    ("disc.onnx large.png", "large.png: image shape [3, 5, 6], but the model takes [3, 4, 6]"),
    ("disc.onnx grey.npy", "grey.npy: image shape [1, 4, 6], but the model takes [3, 4, 6]"),
    ("disc.onnx last.npy", "last.npy: image shape [4, 6, 3], but the model takes [3, 4, 6]"),
    ("disc.onnx images --batch 0", "--batch is 0; it must be 1 or more"),
    ("disc.onnx images --batch many", "argument --batch: invalid int value: 'many'"),
    ("disc.onnx images --std 0", "--mean 0.5 --std 0.0: they must be finite"),
    ("disc.onnx images --mean nan", "--mean nan --std 0.5: they must be finite"),
    ("disc.onnx images --unknown", "unrecognized arguments: --unknown"),
]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("arguments", "message"), ERRORS)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_main_reports_user_errors(capfd, arguments, message, options):
    assert score.main([*arguments.split(), *options]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"score.py: error: {message}")
    assert captured.err.count("\n") == 1


def test_main_help(capsys):
    with pytest.raises(SystemExit) as caught:
        score.main(["--help"])
    assert caught.value.code == 0
    assert "--batch" in capsys.readouterr().out


# --- Deployment ----------------------------------------------------------------------------------

# Runs a script where torch and PIL cannot be imported, as on a machine without them.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["PIL"] = None
for name in ("torch", "PIL"):
    try:
        __import__(name)
    except ImportError:
        print(name, "cannot be imported")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_torch(*arguments):
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_script_scores_without_torch(model, folder):
    done = run_without_torch(model, folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["torch cannot be imported", "PIL cannot be imported"]
    scores, names = zip(*(line.split("\t") for line in lines[2:]), strict=True)
    expected_names, expected = expected_of(folder)
    assert list(names) == expected_names
    np.testing.assert_allclose([float(each) for each in scores], expected, rtol=1e-5, atol=1e-6)


def test_script_exits_with_2_after_an_error(model, tmp_path):
    done = run_without_torch(model, tmp_path / "missing.png")
    assert done.returncode == 2
    assert "score.py: error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_script_imports_only_the_standard_library_numpy_and_onnxruntime():
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime"}
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] in allowed

"""Tests of the deployment scorer, export/score.py."""

import ast
import csv
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import tracemalloc
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


def read(path, channels=None, mean=0.5, std=0.5):
    """All images of a file, [n, c, h, w]."""
    return np.stack(list(score.images_of(path, channels, mean, std)))


# --- Image files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [e for e in score.EXTENSIONS if e not in (".jpg", ".jpeg", ".npy")])
@pytest.mark.parametrize("channels", [1, 3, None])
def test_images_of_reads_every_kind(tmp_path, rng, extension, channels):
    grey = extension == ".pgm"
    pixels = rng.integers(256, size=(4, 6) if grey else (4, 6, 3), dtype=np.uint8)
    pixels[..., 1:] &= (
        0xF0 if extension == ".gif" else 0xFF
    )  # it holds 256 colours: here there are 24 at most
    path = tmp_path / f"x{extension.upper()}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if extension == ".webp" else {}))
    (image,) = read(path, channels, 0, 1)
    assert image.dtype == np.float32
    if grey:
        expected = np.repeat(pixels[None], channels or 1, axis=0)
    elif channels == 1:
        expected = np.asarray(Image.fromarray(pixels).convert("L"))[None]
    else:
        expected = pixels.transpose(2, 0, 1)
    np.testing.assert_array_equal(image, expected.astype(np.float32) / np.float32(255))


def test_images_of_reads_jpeg(tmp_path):
    ramp = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    Image.fromarray(ramp).save(tmp_path / "x.jpg", quality=95)
    (image,) = read(tmp_path / "x.jpg", 3, 0, 1)
    assert image.shape == (3, 16, 16)
    np.testing.assert_allclose(image[0], ramp / 255, atol=4 / 255)  # of quality 95


@pytest.mark.parametrize("extension", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, None])
def test_images_of_keeps_16_bits_of_grey(tmp_path, rng, extension, channels):
    pixels = rng.integers(2**16, size=(4, 6), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"x{extension}")
    (image,) = read(tmp_path / f"x{extension}", channels, 0, 1)
    expected = np.repeat(pixels[None].astype(np.float32) / np.float32(65535), channels or 1, axis=0)
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("largest", [1023, 65535])
def test_images_of_keeps_more_than_8_bits_of_a_pgm(tmp_path, rng, largest):
    pixels = rng.integers(largest + 1, size=(4, 6), dtype=np.uint16)
    (tmp_path / "x.pgm").write_bytes(b"P5 6 4 %d\n" % largest + pixels.astype(">u2").tobytes())
    for channels in (1, 3):
        (image,) = read(tmp_path / "x.pgm", channels, 0, 1)
        assert image.shape == (channels, 4, 6)
        np.testing.assert_allclose(image, np.repeat(pixels[None] / largest, channels, axis=0), atol=1 / 65535)


def tiff(pixels, bits, photometric, order="<"):
    """Grey, in one strip, as scanners write it."""
    rows = np.unpackbits(pixels.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, -bits:]
    data = np.packbits(rows).tobytes() if bits < 16 else pixels.astype(f"{order}u2").tobytes()
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    tags[279] = len(data)
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return start + entries + bytes(4) + data


@pytest.mark.parametrize(
    ("bits", "photometric", "order"),  # of the others Pillow takes none
    [(8, 0, "<"), (8, 1, "<"), (12, 1, "<"), (16, 0, "<"), (16, 1, "<"), (16, 1, ">")],
)
def test_images_of_keeps_all_bits_of_a_tiff(tmp_path, rng, bits, photometric, order):
    pixels = rng.integers(2**bits, size=(4, 6), dtype=np.uint16)
    (tmp_path / "x.tif").write_bytes(tiff(pixels, bits, photometric, order))
    (image,) = read(tmp_path / "x.tif", 1, 0, 1)
    grey = pixels / (2**bits - 1)
    np.testing.assert_allclose(image[0], grey if photometric else 1 - grey, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, None])
def test_images_of_converts_every_mode_and_drops_alpha(tmp_path, rng, mode, channels):
    """The truth is taken pixel by pixel: colour as it was put in, alpha left aside."""
    colour = rng.integers(256, size=(4, 6, 3), dtype=np.uint8)
    if mode in ("1", "L", "LA"):
        colour[:] = colour[..., :1] if mode != "1" else colour[..., :1] // 128 * 255
    image = Image.fromarray(colour)
    if mode == "P":
        image = image.quantize(24)
        image.info["transparency"] = 0  # of a palette index: no reason to change its colour
        colour = np.asarray(image.convert("RGB"))
        assert len(np.unique(colour.reshape(-1, 3), axis=0)) > 2
    elif mode == "1":
        image = image.convert("L").convert("1", dither=Image.Dither.NONE)
    elif mode == "CMYK":
        image = image.convert("CMYK")
        colour = np.asarray(image.convert("RGB"))
    else:
        image = image.convert(mode)
        if mode.endswith("A"):
            image.putalpha(Image.fromarray(rng.integers(256, size=(4, 6), dtype=np.uint8)))
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
    (found,) = read(path, channels, 0, 1)
    is_grey = mode in ("1", "L", "LA")
    assert len(found) == (channels or (1 if is_grey else 3))
    if len(found) == 3 or is_grey:
        expected = colour.transpose(2, 0, 1)[: len(found)].astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found[0], colour @ [0.299, 0.587, 0.114] / 255, atol=1 / 255)


def test_images_of_reads_the_upper_8_of_16_bits_of_colour(tmp_path, rng):
    """Pillow writes none such, so by hand: chunks of a type, data and their CRC; each row has a filter, 0."""
    pixels = rng.integers(2**16, size=(4, 6, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">2I5B", 6, 4, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "x.png").write_bytes(data)
    expected = (pixels // 256).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(read(tmp_path / "x.png", 3, 0, 1)[0], expected)


BROKEN = {
    "empty": (b"", "not one of the kinds BMP,.*; convert it to PNG"),
    "text": (b"no image", "not one of the kinds"),
    # Read as what it says it is, it would start a program.
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\n",
        "not one of the kinds",
    ),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
def test_images_of_refuses_what_is_no_image(tmp_path, data, message):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.png")


@pytest.mark.parametrize("extension", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_images_of_refuses_truncated_files(tmp_path, rng, extension):
    whole = tmp_path / f"whole{extension}"
    Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    path = tmp_path / f"x{extension}"
    for length in (len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"damaged or incomplete .*copy or export it again"):
            read(path)


def test_images_of_never_takes_a_damaged_png_for_another_picture(tmp_path, rng):
    pixels = rng.integers(256, size=(5, 4, 3), dtype=np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    data, expected = path.read_bytes(), read(path)
    refused = 0
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            np.testing.assert_array_equal(read(path), expected)
        except ValueError:
            refused += 1
    assert refused > pixels.size  # incompressible: the rest is checksums and the end


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_refuses_pixels_without_a_range(tmp_path, mode):
    Image.new(mode, (6, 4)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"pixels of mode '{mode}' .*convert it to .npy"):
        read(tmp_path / "x.tif")


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_refuses_a_model_of_other_channels(tmp_path, channels):
    Image.new("RGB", (6, 4)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=f"gives 1 or 3 channels, but the model takes {channels}"):
        read(tmp_path / "x.png", channels)


# --- .npy files ----------------------------------------------------------------------------------


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
@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_images_of_takes_float_arrays_as_they_are(tmp_path, rng, shape, channels, expected, dtype):
    array = rng.normal(size=shape).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    images = read(tmp_path / "x.npy", channels, 0.3, 0.2)
    assert images.shape == expected
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images.ravel(), array.astype(np.float32).ravel())


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.0, 1.0), (0.4, 0.25)])
def test_images_of_normalises_uint8_and_png_alike(tmp_path, rng, mean, std):
    pixels = rng.integers(256, size=(3, 4, 6), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "x.PNG")
    images = read(tmp_path / "x.npy", 3, mean, std)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images[0], (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(images, read(tmp_path / "x.PNG", 3, mean, std))


@pytest.mark.parametrize(
    ("array", "channels", "message"),
    [
        (np.zeros((4, 6)), 3, r"shape \[4, 6\] is not that of images"),
        (np.zeros((4, 6)), None, r"shape \[4, 6\] is not that of images"),
        (np.zeros(4), 1, r"shape \[4\] is not that of images"),
        (np.zeros((1, 1, 3, 4, 6)), 3, "is not that of images"),
        (np.zeros((0, 3, 4, 6)), 3, "holds no image"),
        (np.zeros((2, 3, 0, 6)), 3, "holds no image"),
        (np.zeros((1, 3, 4, 6), int), 3, "dtype int64 is not read"),
        (np.zeros((1, 3, 4, 6), bool), 3, "dtype bool is not read"),
        (np.zeros((1, 3, 4, 6), complex), 3, "dtype complex128 is not read"),
        (np.full((1, 3, 4, 6), None), 3, "not a .npy array.*numpy.save"),
    ],
)
def test_images_of_refuses_arrays_that_are_not_images(tmp_path, array, channels, message):
    path = tmp_path / "x.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read(path, channels)


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x08\x00{'descr(\n"])
def test_images_of_refuses_files_that_are_not_npy(tmp_path, data):
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"not a \.npy array"):
        read(tmp_path / "x.npy")


def test_images_of_refuses_truncated_npy(tmp_path):
    np.save(tmp_path / "whole.npy", np.zeros((1, 3, 4, 6)))
    (tmp_path / "x.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"not a \.npy array"):
        read(tmp_path / "x.npy")


def test_images_of_refuses_npz(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((1, 3, 4, 6)))
    path = (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"not a \.npy array .*; save it by numpy\.save"):
        read(path)


def test_images_of_refuses_other_extensions(tmp_path):
    with pytest.raises(ValueError, match=r"unsupported extension '\.eps'; convert it"):
        read(tmp_path / "x.eps")


@pytest.mark.parametrize("name", ["missing.npy", "missing.png"])
def test_images_of_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / name)


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


def patch_model(path, shape, dtype=FLOAT):
    """Outputs: a patch map (2x2 average pool of the first channel mean), and decoy features."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("AveragePool", ["mean"], ["patches"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Neg", ["x"], ["features"]),
    ]
    inputs = [helper.make_tensor_value_info("x", dtype, shape)]
    outputs = [
        helper.make_tensor_value_info("patches", dtype, [shape[0], 1, None, None]),
        helper.make_tensor_value_info("features", dtype, shape),
    ]
    return save_model(path, nodes, inputs, outputs)


@pytest.fixture
def model(tmp_path):
    return linear_model(tmp_path / "disc.onnx", ["batch", 3, 4, 6])


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("dim", ["batch", None, 1, 4])
@pytest.mark.parametrize("batch", [4, 64])
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


def test_score_of_a_map_is_finer_than_the_output_of_the_model(tmp_path, rng):
    path = patch_model(tmp_path / "disc.onnx", ["batch", 3, 4, 6], TensorProto.FLOAT16)
    images = rng.normal(size=(5, 3, 4, 6)).astype(np.float16)
    (patches,) = ort.InferenceSession(path).run(["patches"], {"x": images})
    np.testing.assert_array_equal(score.score(path, images), patches.mean(axis=(1, 2, 3), dtype=np.float64))


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


@pytest.mark.parametrize(("axes", "left"), [([0, 1, 2, 3], []), ([0], [3, 4, 6])])
def test_score_refuses_output_without_batch(tmp_path, axes, left):
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=axes, keepdims=0)]
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["n", 3, 4, 6])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, left)]
    path = save_model(tmp_path / "disc.onnx", nodes, inputs, outputs)
    with pytest.raises(ValueError, match=rf"first output 'y' has shape {re.escape(str(left))} for 1 images"):
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
        [("x", FLOAT, ["n", 3, 5, 4, 6])],
        [("x", TensorProto.INT64, ["n", 3, 4, 6])],
        [("x", FLOAT, ["n", 3, 4, 6]), ("label", FLOAT, ["n"])],
    ],
    ids=["rank 2", "rank 5", "dtype", "label"],
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


def rows_of(text):
    """The rows of either format, as [name, score, error]."""
    if text.startswith("{"):
        return [list(json.loads(line).values()) for line in text.splitlines()]
    header, *rows = csv.reader(text.splitlines())
    assert header == ["name", "score", "error"]
    return [[name, float(found) if found else None, error or None] for name, found, error in rows]


@pytest.mark.parametrize("dim", ["batch", 3])
@pytest.mark.parametrize("options", [[], ["--batch", "3"], ["--mean", "0.25", "--std", "2"]])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_main_scores_a_folder(tmp_path, folder, capsys, dim, options, kind):
    model = linear_model(tmp_path / "disc.onnx", [dim, 3, 4, 6])
    assert score.main([str(model), str(folder), "--format", kind, *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    names, scores, errors = zip(*rows_of(captured.out), strict=True)
    expected_names, expected = expected_of(folder, *map(float, options[1::2] if len(options) > 2 else ()))
    assert list(names) == expected_names
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert errors == (None,) * 4


def test_main_keeps_the_order_of_its_arguments(model, folder, capsys):
    paths = [str(folder / name) for name in ("c.PNG", "a.png", "c.PNG")]
    assert score.main([str(model), paths[0], "--batch", "2", *paths[1:]]) == 0
    assert [name for name, *_ in rows_of(capsys.readouterr().out)] == paths


def test_main_quotes_names_and_writes_those_that_are_no_unicode(model, folder, capsysbinary):
    for name in (b'a,"b".png', b"caf\xe9.png"):
        (folder / os.fsdecode(name)).write_bytes((folder / "a.png").read_bytes())
    assert score.main([str(model), str(folder)]) == 0
    names = [Path(name).name for name, *_ in rows_of(capsysbinary.readouterr().out.decode())]
    assert names == ['a,"b".png', "a.png", "b.npy[0]", "b.npy[1]", "c.PNG", "caf\\xe9.png"]


def test_main_takes_images_of_several_sizes_for_dynamic_sizes(tmp_path, rng, capsys):
    model = linear_model(tmp_path / "disc.onnx", ["batch", 3, "height", "width"])
    arrays = [rng.normal(size=(3, size, 5)).astype(np.float32) for size in (4, 4, 6, 4)]
    for index, array in enumerate(arrays):
        np.save(tmp_path / f"{index}.npy", array)
    assert score.main([str(model), *(str(tmp_path / f"{i}.npy") for i in range(4))]) == 0
    _, scores, _ = zip(*rows_of(capsys.readouterr().out), strict=True)
    np.testing.assert_allclose(scores, [linear_scores(a[None])[0] for a in arrays], rtol=1e-5, atol=1e-6)


@pytest.fixture
def damaged(folder):
    """The folder, with files among the others that give no score."""
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "b.jpg").write_bytes(b"")
    (folder / "d.png").symlink_to("nowhere")
    np.save(folder / "e.npy", np.zeros((2, 1, 4, 6), np.float32))
    np.save(folder / "f.npy", np.full((3, 4, 6), np.nan))
    Image.new("RGB", (5, 4)).save(folder / "g.png")
    return folder


ERRORS = {
    "b.jpg": "not one of the kinds",
    "b.png": "damaged or incomplete",
    "d.png": "No such file or directory",
    "e.npy": "image shape [1, 4, 6], but the model takes [3, 4, 6]",
    "f.npy[0]": "the score is nan; check that",
    "g.png": "image shape [3, 4, 5], but the model takes [3, 4, 6]",
}


@pytest.mark.parametrize("dim", ["batch", 3])
@pytest.mark.parametrize("batch", ["1", "2", "64"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_main_skips_and_lists_what_it_cannot_score(tmp_path, damaged, capsys, dim, batch, kind):
    model = linear_model(tmp_path / "disc.onnx", [dim, 3, 4, 6])
    assert score.main([str(model), str(damaged), "--batch", batch, "--format", kind]) == 1
    captured = capsys.readouterr()
    rows = {Path(name).name: (found, error) for name, found, error in rows_of(captured.out)}
    assert (
        list(rows)
        == [
            *(
                "a.png",
                "b.jpg",
                "b.npy[0]",
                "b.npy[1]",
                "b.png",
                "c.PNG",
                "d.png",
                "e.npy",
                "f.npy[0]",
                "g.png",
            )
        ]
        == sorted(rows, key=lambda name: name.replace("PNG", "png"))
    )
    errors = {name: error for name, (found, error) in rows.items() if found is None}
    assert errors.keys() == ERRORS.keys()
    for name, line in zip(ERRORS, captured.err.splitlines(), strict=True):
        assert errors[name].startswith(ERRORS[name])
        assert line == f"score.py: no score for {damaged / name}: {errors[name]}"
    scores = [found for found, error in rows.values() if error is None]
    np.testing.assert_allclose(scores, expected_of(damaged)[1], rtol=1e-5, atol=1e-6)


def test_main_lists_a_link_that_leads_nowhere(model, folder, tmp_path):
    (folder / "z.png").symlink_to(folder / "missing")
    output = tmp_path / "scores.csv"
    for _ in range(2):  # the second time over what the first has written
        assert score.main([str(model), str(folder), "-o", str(output)]) == 1
        *_, (name, value, error) = rows_of(output.read_text())
        assert (name, value, error) == (str(folder / "z.png"), None, "No such file or directory")


def test_main_says_which_images_of_an_array_have_no_finite_score(model, tmp_path, capsys):
    values = np.array([0, np.inf, -np.inf, np.nan])
    with (tmp_path / "x.NPY").open("wb") as file:
        np.save(file, np.broadcast_to(values[:, None, None, None], (4, 3, 4, 6)))
    assert score.main([str(model), str(tmp_path / "x.NPY")]) == 1
    names, scores, errors = zip(*rows_of(capsys.readouterr().out), strict=True)
    assert names == tuple(f"{tmp_path / 'x.NPY'}[{i}]" for i in range(4))
    assert scores == (0, None, None, None)
    assert [error.split(";")[0] for error in errors[1:]] == [
        f"the score is {x}" for x in ("inf", "-inf", "nan")
    ]


def test_main_goes_on_where_a_model_of_any_size_has_a_smallest_one(tmp_path, capsys):
    nodes = [helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3])]
    shape = ["n", 1, "h", "w"]
    infos = [helper.make_tensor_value_info(name, FLOAT, shape) for name in "xy"]
    model = save_model(tmp_path / "disc.onnx", nodes, infos[:1], infos[1:])
    for name, size in (("a", 4), ("b", 2), ("c", 5)):
        np.save(tmp_path / f"{name}.npy", np.ones((1, size, size), np.float32))
    assert score.main([str(model), *(str(tmp_path / f"{name}.npy") for name in "abc")]) == 1
    (_, first, _), (_, none, error), (_, last, _) = rows_of(capsys.readouterr().out)
    assert (first, none, last) == (1, None, 1)
    assert error.startswith("the model's first output 'y' has shape [1, 1, 0, 0] for 1 images")


# --- Streaming -----------------------------------------------------------------------------------


def test_main_reads_no_more_than_a_batch_ahead(model, folder, monkeypatch):
    """What has been read when each batch is run, and what has been written when the next is read."""
    read_until, written, images_of = [], [], score.images_of

    def counted(*arguments):
        written.append(output.read_text().count("\n"))
        return images_of(*arguments)

    class Session(Recorder):
        def run(self, names, feeds):
            read_until.append(len(written))
            return super().run(names, feeds)

    session = Session(score.open_session(model))
    monkeypatch.setattr(score, "open_session", lambda path: session)
    monkeypatch.setattr(score, "images_of", counted)
    output = folder / "scores.csv"
    with output.open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert score.main([str(model), *[str(folder / "a.png")] * 10, "--batch", "4"]) == 0
    assert [len(batch) for batch in session.batches] == [4, 4, 2]
    assert read_until == [4, 8, 10]
    assert written == [0] * 4 + [5] * 4 + [9] * 2  # with the header


def test_main_needs_memory_for_a_few_batches(tmp_path, monkeypatch):
    shape, batch = (3, 16, 16), 8
    model = linear_model(tmp_path / "disc.onnx", ["batch", *shape])
    images = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (4000, *shape))
    as_floats = 4 * images.nbytes
    del images
    command = [str(model), str(tmp_path / "x.npy"), "--batch", str(batch), "-o", str(tmp_path / "scores")]
    assert score.main([*command, "--batch", "1"]) == 0  # what the libraries allocate once
    tracemalloc.start()
    assert score.main(command) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A batch as it is read, the one before it, both stacked; 256 KiB for all that is not images.
    assert peak < 4 * batch * 4 * np.prod(shape) + 2**18 < as_floats / 20


def test_main_writes_a_file_in_one_step(model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))  # from there it would be several
    output = tmp_path / "scores.csv"
    output.write_text("old")
    assert score.main([str(model), str(folder), "-o", str(output)]) == 0
    assert capsys.readouterr() == ("", "")
    assert [name for name, *_ in rows_of(output.read_text())] == expected_of(folder)[0]
    assert output.read_bytes().count(b"\n") == 5
    assert b"\r" not in output.read_bytes()
    (tmp_path / "plain").touch()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as any new file


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_main_leaves_the_old_file_where_it_is_stopped(model, folder, tmp_path, capsys, monkeypatch, error):
    output = tmp_path / "scores.csv"
    output.write_text("old")
    before = sorted(tmp_path.iterdir())

    def broken(file, kind):
        def write(row):
            raise error

        return write

    monkeypatch.setattr(score, "_writer", broken)
    assert score.main([str(model), str(folder), "-o", str(output)]) == 2
    assert output.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line in ("score.py: stopped", "score.py: error: [Errno 28] No space left on device")


def test_main_shows_progress_where_asked_to(model, damaged, capsys):
    assert score.main([str(model), str(damaged), "--progress", "--batch", "1"]) == 1
    err = capsys.readouterr().err
    assert "[" + "#" * 30 + "] 9/9 files, 10 rows, " in err
    # Messages stand on lines of their own, the bar below them.
    lines = [line.rpartition("\r")[2].removeprefix("\x1b[K") for line in err.removesuffix("\n").split("\n")]
    assert [line.split(":")[0] for line in lines] == [*["score.py"] * len(ERRORS), lines[-1]]


@pytest.mark.parametrize(
    ("terminals", "output", "shown"),
    [(2, True, True), (2, False, True), (12, True, True), (12, False, False), (0, True, False)],
)
def test_main_shows_progress_on_a_terminal(model, folder, capsys, monkeypatch, terminals, output, shown):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminals == 12)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminals in (2, 12))
    to = ["-o", str(folder / "scores.csv")] if output else []
    for options, expected in (([], shown), (["--progress"], True), (["--no-progress"], False)):
        assert score.main([str(model), str(folder), *to, *options]) == 0
        assert ("] 3/3 files, 4 rows" in capsys.readouterr().err) == expected


# --- Errors --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch, model, folder):
    """Make the current folder hold what the cases of STOPPED name."""
    baked_model(tmp_path / "baked.onnx")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("no model")
    os.mkfifo(tmp_path / "pipe")  # by root, /dev/null would become a file where this is not refused
    monkeypatch.chdir(tmp_path)


STOPPED = [
    ("", "the following arguments are required: model"),
    ("disc.onnx", "nothing to score"),
    ("disc.onnx empty", "nothing to score"),
    ("disc.onnx images missing.png", "missing.png: no such file or folder"),
    ("missing.onnx images", "missing.onnx: no such model file"),
    ("images images", "images: no such model file"),
    ("text.onnx images", "text.onnx: not an ONNX model"),
    ("baked.onnx images", "the model cannot be run on a batch of shape [4, 3, 4, 6]"),
    ("disc.onnx images --batch 0", "--batch is 0; it must be 1 or more"),
    ("disc.onnx images --batch many", "argument --batch: invalid int value: 'many'"),
    ("disc.onnx images --std 0", "--mean 0.5 --std 0.0: they must be finite"),
    ("disc.onnx images --std -1", "--mean 0.5 --std -1.0: they must be finite"),
    ("disc.onnx images --std inf", "--mean 0.5 --std inf: they must be finite"),
    ("disc.onnx images --mean nan", "--mean nan --std 0.5: they must be finite"),
    ("disc.onnx images --format xml", "argument --format: invalid choice: 'xml'"),
    ("disc.onnx images --unknown", "unrecognized arguments: --unknown"),
    ("disc.onnx images -o empty", "-o empty is not a file; give the path"),
    ("disc.onnx images -o pipe", "-o pipe is not a file"),
    ("disc.onnx images -o disc.onnx", "-o disc.onnx is a file that is read; give another path"),
    ("disc.onnx images -o images/a.png", "-o images/a.png is a file that is read"),
    ("disc.onnx images -o missing/x.csv", "-o missing/x.csv cannot be written: No such file or directory"),
]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("arguments", "message"), STOPPED)
def test_main_reports_user_errors(capfd, arguments, message):
    before = sorted(Path().iterdir())
    assert score.main([*arguments.split(), *([] if "-o" in arguments else ["-o", "scores.csv"])]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"score.py: error: {message}")
    assert captured.err.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_main_help(capsys):
    with pytest.raises(SystemExit) as caught:
        score.main(["--help"])
    assert caught.value.code == 0
    assert "--batch" in capsys.readouterr().out


# --- Deployment ----------------------------------------------------------------------------------

# Runs a script where some modules cannot be imported, as on a machine without them.
WITHOUT = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(modules, *arguments, **options):
    command = [sys.executable, "-W", "error", "-c", WITHOUT, modules, SCRIPT, *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60, **options)


def test_script_scores_with_numpy_onnxruntime_and_pillow(model, folder):
    done = run_without("torch,onnx,specnorm_fx,scipy", model, folder, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    names, scores, _ = zip(*rows_of(done.stdout), strict=True)
    expected_names, expected = expected_of(folder)
    assert list(names) == expected_names
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_script_scores_arrays_without_pillow(model, folder):
    done = run_without("torch,PIL", model, folder / "b.npy", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows_of(done.stdout)) == 2


def test_image_files_need_pillow(model, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert score.main([str(model), str(folder), "-o", str(folder / "scores.csv")]) == 2
    message = "score.py: error: image files are read by Pillow: pip install pillow, or use .npy files\n"
    assert capsys.readouterr().err == message
    assert not (folder / "scores.csv").exists()


def test_script_is_silent_when_nobody_reads_its_rows(model, folder):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = run_without("torch", model, folder, stdout=write_end)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (2, "")


def test_script_imports_only_the_standard_library_numpy_onnxruntime_and_pillow():
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime", "PIL"}
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] in allowed

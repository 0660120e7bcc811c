"""Score images with a discriminator exported to ONNX.

    python export/score.py disc.onnx images.npy more/*.png folder/ [--batch 64]
                           [--mean 0.5 --std 0.5] [--json]

Needs the standard library, numpy and onnxruntime only, so this one file can be copied to the
machine that serves the model. It can be imported too: see `score`, `load_images`, `read_png`.

Inputs:
    .npy: [n, c, h, w], or [c, h, w] for one image; for a model of 1 channel also [n, h, w] or
        [h, w]. Floats are taken as they are, that is, already preprocessed as in training; uint8
        is scaled to 0..1 and then normalised, (x - mean) / std.
    .png: one image, scaled to 0..1, converted to the model's channel count and normalised.
    folder: all its .png and .npy files, sorted by name, without subfolders.

The images must have the size that the model takes: nothing is resized or cropped.

The score of an image is the mean of the model's first output over all non-batch dimensions, so
the patch map of a PatchGAN gives one number. Its unit is that of the output: a logit, unless the
exported model ends in a sigmoid. One line `score<TAB>name` is printed for each image, or with
--json a list of {"name", "score"}, where a score that is not finite is null. An error prints one
line on stderr, no scores, and gives exit code 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

EXTENSIONS = (".npy", ".png")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 weights of R, G, B
INPUT_DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
}

# --- PNG -----------------------------------------------------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_MAX_PIXELS = 2**28  # no real input is larger: a header that says so is damaged or hostile
PNG_PALETTE = 3
# By colour type: samples per pixel, those of them that are colour and not alpha, bits per sample.
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_COLOURS = {0: 1, 2: 3, 3: 1, 4: 1, 6: 3}
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
DAMAGED = "the file is damaged or incomplete, copy or export it again"


class PngHeader(NamedTuple):
    """What decoding needs of an IHDR chunk."""

    width: int
    height: int
    depth: int  # bits per sample
    colour: int  # colour type

    @property
    def pixel_bits(self) -> int:
        """Bits per pixel."""
        return self.depth * PNG_SAMPLES[self.colour]

    @property
    def row_bytes(self) -> int:
        """Bytes per row, without the byte that names the filter."""
        return (self.width * self.pixel_bits + 7) // 8


def read_png(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Read a PNG file, dropping alpha.

    Samples are divided by their largest value (255 for 8 bits); gamma and colour profiles are
    ignored, as training pipelines do.

    Args:
        path: A non-interlaced PNG file of any colour type and bit depth.

    Returns:
        [c, h, w] float32 in 0..1, with c = 1 for grey and c = 3 for RGB and palette images.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no PNG, is damaged or truncated, or is interlaced.
    """
    data = Path(path).read_bytes()
    try:
        return _decode_png(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _decode_png(data: bytes) -> NDArray[np.float32]:
    """Decode the bytes of a PNG file to [c, h, w] float32 in 0..1."""
    chunks = _png_chunks(data)
    kind, body = next(chunks)
    if kind != b"IHDR":
        raise ValueError(f"PNG does not start with an IHDR chunk; {DAMAGED}")
    header = _png_header(body)
    palette, pixels = b"", bytearray()
    for kind, body in chunks:
        if kind == b"PLTE":
            palette = body
        elif kind == b"IDAT":
            pixels += body
    rows = _unfilter(_inflate(pixels, header), header)
    samples = _unpack(rows, header)[..., : PNG_COLOURS[header.colour]]
    if header.colour == PNG_PALETTE:
        samples, largest = _look_up(samples[..., 0], palette), 255
    else:
        largest = 2**header.depth - 1
    image = samples.astype(np.float32) / np.float32(largest)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (type, body) of each chunk up to and with IEND, each checked against its CRC."""
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("not a PNG file (wrong signature); convert the image to PNG")
    position, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise ValueError(f"PNG is truncated (no IEND chunk); {DAMAGED}")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise ValueError(f"PNG is truncated within a {_printable(kind)} chunk; {DAMAGED}")
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(data[position + 4 : end]) != crc:  # of type and body
            raise ValueError(f"PNG has a wrong CRC in its {_printable(kind)} chunk; {DAMAGED}")
        yield kind, data[position + 8 : end]
        position = end + 4


def _printable(kind: bytes) -> str:
    """Name a chunk type, which is any four bytes in a damaged file."""
    return kind.decode("ascii", "backslashreplace")


def _png_header(body: bytes) -> PngHeader:
    """Parse and check the body of an IHDR chunk."""
    if len(body) != 13:
        raise ValueError(f"PNG has an IHDR chunk of {len(body)} bytes, not 13; {DAMAGED}")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">2I5B", body)
    if depth not in PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise ValueError(f"PNG has an invalid header (IHDR {body.hex()}); {DAMAGED}")
    if not 0 < width * height <= PNG_MAX_PIXELS:
        raise ValueError(f"PNG is {width}x{height} pixels, outside 1..{PNG_MAX_PIXELS} in all; {DAMAGED}")
    if interlace:
        raise ValueError("PNG is interlaced (Adam7), not supported; save it without interlacing")
    return PngHeader(width, height, depth, colour)


def _inflate(pixels: bytearray, header: PngHeader) -> bytes:
    """Decompress the image data to exactly `height` rows of filter byte and `row_bytes` bytes."""
    expected = header.height * (1 + header.row_bytes)
    stream = zlib.decompressobj()
    try:
        # The limit keeps a decompression bomb out; one byte more than expected shows excess data.
        rows = stream.decompress(pixels, expected + 1)
    except zlib.error as error:
        raise ValueError(f"PNG image data do not decompress ({error}); {DAMAGED}") from error
    if len(rows) != expected or not stream.eof:
        raise ValueError(f"PNG image data are not the {expected} bytes of its header; {DAMAGED}")
    return rows


def _unfilter(data: bytes, header: PngHeader) -> NDArray[np.uint8]:
    """Undo the row filters: [h * (1 + row_bytes)] bytes to [h, row_bytes] uint8."""
    lines = np.frombuffer(data, np.uint8).reshape(header.height, 1 + header.row_bytes)
    step = max(1, header.pixel_bits // 8)  # distance in bytes to the pixel on the left
    rows = np.zeros((header.height + 1, header.row_bytes), np.uint8)  # the row above the first is 0
    for y, line in enumerate(lines):
        unfilter = PNG_FILTERS.get(int(line[0]))
        if unfilter is None:
            raise ValueError(f"PNG row {y} has the unknown filter type {line[0]}; {DAMAGED}")
        rows[y + 1] = unfilter(line[1:], rows[y], step)
    return rows[1:]


Row = NDArray[np.uint8]  # [row_bytes] uint8; sums of rows wrap around modulo 256, as PNG asks


def _none(line: Row, above: Row, step: int) -> Row:
    """Filter type 0: bytes as they are."""
    return line


def _sub(line: Row, above: Row, step: int) -> Row:
    """Filter type 1: differences to the left, undone by a running sum for each byte of a pixel."""
    return np.cumsum(line.reshape(-1, step), axis=0, dtype=np.uint8).reshape(-1)


def _up(line: Row, above: Row, step: int) -> Row:
    """Filter type 2: differences to the row above."""
    return line + above


def _average(line: Row, above: Row, step: int) -> Row:
    """Filter type 3: differences to the mean of left and above, rounded down."""
    # Each byte needs the one decoded before it. Python integers are faster here than numpy scalars.
    row = bytearray(step) + line.tobytes()  # with the zero pixel on the left of the first
    for x, up in enumerate(above.tobytes()):
        row[x + step] = (row[x + step] + (row[x] + up) // 2) & 255
    return np.frombuffer(row, np.uint8)[step:]


def _paeth(line: Row, above: Row, step: int) -> Row:
    """Filter type 4: differences to the Paeth predictor of left, above and above left."""
    row = bytearray(step) + line.tobytes()
    corners = bytes(step) + above.tobytes()
    for x, (corner, up) in enumerate(zip(corners, corners[step:], strict=False)):
        left = row[x]
        to_left, to_up = abs(up - corner), abs(left - corner)
        to_corner = abs(left + up - 2 * corner)
        if to_left <= to_up and to_left <= to_corner:
            predictor = left
        else:
            predictor = up if to_up <= to_corner else corner
        row[x + step] = (row[x + step] + predictor) & 255
    return np.frombuffer(row, np.uint8)[step:]


PNG_FILTERS: dict[int, Callable[[Row, Row, int], Row]] = {
    0: _none,
    1: _sub,
    2: _up,
    3: _average,
    4: _paeth,
}


Samples = NDArray[np.unsignedinteger[Any]]  # uint8, or big-endian uint16 for a depth of 16


def _unpack(rows: NDArray[np.uint8], header: PngHeader) -> Samples:
    """Split rows of bytes into samples: [h, row_bytes] uint8 to [h, w, samples]."""
    samples: Samples = rows
    if header.depth == 16:
        samples = rows.view(">u2")
    elif header.depth < 8:
        bits = np.unpackbits(rows, axis=1).reshape(header.height, -1, header.depth)
        place_values = 2 ** np.arange(header.depth, dtype=np.uint8)[::-1]
        samples = (bits @ place_values)[:, : header.width]  # a row is padded to a whole byte
    return samples.reshape(header.height, header.width, -1)


def _look_up(indices: Samples, palette: bytes) -> Samples:
    """Replace palette indices [h, w] by colours [h, w, 3] uint8."""
    if not palette or len(palette) % 3:
        raise ValueError(f"PNG has no valid palette ({len(palette)} bytes in PLTE); {DAMAGED}")
    colours: Samples = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    if indices.max() >= len(colours):
        raise ValueError(f"PNG uses colours beyond its palette of {len(colours)}; {DAMAGED}")
    return np.take(colours, indices, axis=0)


# --- Images --------------------------------------------------------------------------------------


def load_images(
    path: str | os.PathLike[str],
    channels: int | None = None,
    mean: float = 0.5,
    std: float = 0.5,
) -> NDArray[np.float32]:
    """Load the images of a .png or .npy file, preprocessed for the model.

    Args:
        path: A .png file (one image), or a .npy file of shape [n, c, h, w] or [c, h, w], or, with
            `channels` = 1, [n, h, w] or [h, w].
        channels: Channel count of the model. PNG images are converted to it: grey to RGB by
            repetition, RGB to grey by ITU-R BT.601 luma. None: leave them as they are.
        mean: Subtracted from images scaled to 0..1 (PNG and uint8); float arrays keep their values.
        std: Divides them after that.

    Returns:
        [n, c, h, w] float32.

    Raises:
        OSError: The file cannot be read.
        ValueError: The extension is not .npy or .png, the file is damaged, or its shape, dtype or
            channel count does not suit.
    """
    extension = Path(path).suffix.lower()
    if extension == ".png":
        image = _to_channels(path, read_png(path), channels)
        return _normalise(image, mean, std)[np.newaxis]
    if extension == ".npy":
        array = _to_nchw(path, _read_npy(path), channels)
        if array.dtype == np.uint8:
            return _normalise(array.astype(np.float32) / np.float32(255), mean, std)
        return array.astype(np.float32)
    raise ValueError(f"{path}: unsupported extension {extension!r}; convert it to .png or .npy")


def _normalise(images: NDArray[np.float32], mean: float, std: float) -> NDArray[np.float32]:
    """Map values in 0..1 to (x - mean) / std, in float32."""
    normalised: NDArray[np.float32] = (images - np.float32(mean)) / np.float32(std)
    return normalised


def _to_channels(
    path: str | os.PathLike[str], image: NDArray[np.float32], channels: int | None
) -> NDArray[np.float32]:
    """Convert a PNG image [c, h, w] between grey and RGB to [channels, h, w]."""
    found = len(image)
    if channels is None or channels == found:
        return image
    if channels == 1:
        grey: NDArray[np.float32] = np.tensordot(LUMA, image, axes=1)
        return grey[np.newaxis]
    if channels == 3:
        return np.repeat(image, 3, axis=0)
    raise ValueError(f"{path}: a PNG gives 1 or 3 channels, but the model takes {channels}; use a .npy file")


def _read_npy(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read a .npy file of uint8 or float values."""
    with open(path, "rb") as file:
        try:
            array = np.load(file, allow_pickle=False)
        except Exception as error:  # a damaged header makes numpy raise errors of many kinds
            raise ValueError(f"{path}: not a .npy array ({error}); save it by numpy.save") from error
    if not isinstance(array, np.ndarray):  # np.load also opens .npz archives
        raise ValueError(f"{path}: holds an .npz archive; save one array by numpy.save")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{path}: dtype {array.dtype} is not read; save it as uint8 or float32")
    return array


def _to_nchw(path: str | os.PathLike[str], array: NDArray[Any], channels: int | None) -> NDArray[Any]:
    """Add the dimensions that a .npy file may leave out: the result is [n, c, h, w]."""
    if array.ndim == 4:
        images = array
    elif array.ndim == 3:
        images = array[:, np.newaxis] if channels == 1 else array[np.newaxis]
    elif array.ndim == 2 and channels == 1:
        images = array[np.newaxis, np.newaxis]
    else:
        raise ValueError(
            f"{path}: shape {list(array.shape)} is not that of images; save [n, c, h, w] or "
            "[c, h, w], or for a model of 1 channel [n, h, w] or [h, w]"
        )
    if not images.size:
        raise ValueError(f"{path}: shape {list(array.shape)} holds no image; leave the file out")
    return images


# --- Model ---------------------------------------------------------------------------------------


class ModelInput(NamedTuple):
    """The image input of an ONNX model; None stands for a dynamic dimension."""

    name: str
    dtype: type[np.floating[Any]]
    batch: int | None
    image_shape: tuple[int | None, int | None, int | None]  # channels, height, width


def open_session(path: str | os.PathLike[str]) -> ort.InferenceSession:
    """Open an ONNX file on the CPU.

    Other execution providers need a session made by the caller, which `score` takes as well.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: onnxruntime cannot load it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, not logged as well
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the errors of onnxruntime share no narrower class
        raise ValueError(
            f"{path}: not an ONNX model that onnxruntime {ort.__version__} loads ({error}); export it again"
        ) from error


def model_input(session: ort.InferenceSession) -> ModelInput:
    """Read from a session what images its model takes.

    Raises:
        ValueError: The model does not have one float input [n, c, h, w].
    """
    inputs = session.get_inputs()
    found = ", ".join(f"{each.name}: {each.type} {each.shape}" for each in inputs)
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in INPUT_DTYPES:
        raise ValueError(
            f"the model takes ({found}), not one float image input [n, c, h, w]; export the "
            "discriminator with the image as its only input"
        )
    (only,) = inputs
    batch, *image_shape = (size if isinstance(size, int) else None for size in only.shape)
    channels, height, width = image_shape
    return ModelInput(only.name, INPUT_DTYPES[only.type], batch, (channels, height, width))


def _check_shape(source: object, images: NDArray[Any], model: ModelInput) -> None:
    """Raise ValueError unless the images of `source`, [n, c, h, w], fit the model."""
    shape = images.shape[1:]
    if len(shape) == 3 and all(
        size in (None, got) for size, got in zip(model.image_shape, shape, strict=True)
    ):
        return
    expected = ", ".join("any" if size is None else str(size) for size in model.image_shape)
    raise ValueError(
        f"{source}: image shape {list(shape)}, but the model takes [{expected}] (channels, "
        "height, width); prepare the images as in training, nothing is resized here"
    )


def score(
    session: ort.InferenceSession | str | os.PathLike[str],
    images: NDArray[np.floating[Any]],
    batch: int = 64,
) -> NDArray[np.float64]:
    """Score preprocessed images.

    The score of an image is the mean of the model's first output over all non-batch dimensions.

    Args:
        session: An onnxruntime session, or the path of an ONNX file.
        images: [n, c, h, w] float, preprocessed as in training.
        batch: Images per run if the model's batch dimension is dynamic. A fixed batch dimension
            takes its place: the last batch is then filled up by repeating the last image, and
            the scores of the repetitions are dropped.

    Returns:
        [n] float64, in the unit of the model's output.

    Raises:
        FileNotFoundError: There is no such model file.
        ValueError: The model cannot be loaded or run, its first output has no batch dimension, or
            the images do not fit it.
    """
    if isinstance(session, (str, os.PathLike)):
        session = open_session(session)
    model = model_input(session)
    _check_shape("images", images, model)
    size = model.batch or batch
    if size < 1:
        raise ValueError(f"batch is {batch}; it must be 1 or more")
    scores = np.empty(len(images), np.float64)
    for start in range(0, len(images), size):
        scores[start : start + size] = _score_batch(session, model, images[start : start + size])
    return scores


def _score_batch(
    session: ort.InferenceSession, model: ModelInput, images: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Score at most one batch: [n, c, h, w] to [n]."""
    count = len(images)
    if model.batch:
        filling = np.repeat(images[-1:], model.batch - count, axis=0)
        images = np.concatenate([images, filling])
    first = session.get_outputs()[0].name
    try:
        (output,) = session.run([first], {model.name: images.astype(model.dtype, copy=False)})
    except Exception as error:  # the errors of onnxruntime share no narrower class
        raise ValueError(
            f"the model cannot be run on a batch of shape {list(images.shape)} ({error}); check "
            "the exported model"
        ) from error
    if output.shape[:1] != (len(images),):
        raise ValueError(
            f"the model's first output {first!r} has shape {list(output.shape)} for "
            f"{len(images)} images; export it with the batch as its first dimension"
        )
    means: NDArray[np.float64] = output[:count].reshape(count, -1).mean(axis=1, dtype=np.float64)
    return means


# --- Command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are reported by `main`, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see score.py --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = _Parser(prog="score.py", description="Score images with a discriminator exported to ONNX.")
    parser.add_argument("model", help="ONNX file")
    parser.add_argument("images", nargs="*", help=".npy files, .png files and folders of them")
    parser.add_argument(
        "--batch", type=int, default=64, help="images per run of a dynamic batch (default: 64)"
    )
    parser.add_argument("--mean", type=float, default=0.5, help="subtracted from 0..1 images (default: 0.5)")
    parser.add_argument("--std", type=float, default=0.5, help="divides them after that (default: 0.5)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    args = parser.parse_intermixed_args(argv)  # options may stand between model and images
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}; it must be 1 or more")
    if not (math.isfinite(args.mean) and math.isfinite(args.std) and args.std > 0):
        parser.error(f"--mean {args.mean} --std {args.std}: they must be finite, --std above 0")
    return args


def _expand(arguments: Iterable[str]) -> list[Path]:
    """Replace each folder by its image files, sorted by name."""
    files: list[Path] = []
    for path in map(Path, arguments):
        if path.is_dir():
            files += sorted(each for each in path.iterdir() if each.suffix.lower() in EXTENSIONS)
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not files:
        raise ValueError("nothing to score; name .png or .npy files, or folders that hold them")
    return files


def _named_images(
    files: Iterable[Path], model: ModelInput, mean: float, std: float
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the name and the preprocessed [c, h, w] of each image, file by file."""
    for path in files:
        images = load_images(path, model.image_shape[0], mean, std)
        _check_shape(path, images, model)
        for index, image in enumerate(images):
            yield (str(path) if path.suffix.lower() == ".png" else f"{path}[{index}]"), image


def _score_files(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Yield the name and the score of each image on the command line."""
    files = _expand(args.images)
    session = open_session(args.model)
    model = model_input(session)
    size = model.batch or args.batch
    named = _named_images(files, model, args.mean, args.std)
    # Images of a fully convolutional model may differ in size; a batch takes those of one size.
    for _, same_shape in groupby(named, key=lambda item: item[1].shape):
        while chunk := list(islice(same_shape, size)):
            names, images = zip(*chunk, strict=True)
            yield from zip(names, score(session, np.stack(images), size).tolist(), strict=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program name; None takes those of the process.

    Returns:
        The exit code: 0, or 2 after an error.
    """
    try:
        args = _parse(argv)
        results = list(_score_files(args))  # all before any is printed: an error leaves no output
        if args.json:
            finite = [(name, value if math.isfinite(value) else None) for name, value in results]
            print(json.dumps([{"name": name, "score": value} for name, value in finite], indent=2))
        else:
            for name, value in results:
                print(f"{value:.9g}\t{name}")
    except (OSError, ValueError) as error:
        print("score.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

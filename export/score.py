"""Score images with a discriminator exported to ONNX.

    python score.py disc.onnx folder/ more/*.jpg images.npy [--format csv|jsonl] [-o scores.csv]
                    [--batch 64] [--mean 0.5 --std 0.5] [--progress | --no-progress]

Needs numpy, onnxruntime, and for image files Pillow, so this one file can be copied to the machine that
serves the model. It can be imported too: see `score` and `images_of`.

Inputs:
    image file: .png, .jpg, .webp and the others of `EXTENSIONS`: one image (of several, the first),
        converted to the model's channels, scaled to 0..1 and normalised, (x - mean) / std. Alpha,
        gamma, colour profiles and EXIF orientation are left aside, as training pipelines do.
    .npy: [n, c, h, w], or [c, h, w] for one image; for a model of 1 channel also [n, h, w] or
        [h, w]. Floats are taken as they are, that is, already preprocessed as in training; uint8
        is scaled to 0..1 and then normalised.
    folder: all these files in it, sorted by name, without subfolders.

The images must have the size that the model takes: nothing is resized or cropped. They are read and
scored batch by batch, so memory does not grow with their number.

The score of an image is the mean of the model's first output over all non-batch dimensions, so
the patch map of a PatchGAN gives one number. Its unit is that of the output: a logit, unless the
exported model ends in a sigmoid.

Output: one row for each image, in the order of the inputs: name, score, error. Exactly one of the last
two is there. A file that cannot be read, or is of another size, and a score that is not finite, give an
error and a line on stderr, and the others are scored. A file given by -o appears when it is whole.

Exit codes: 0, all scored; 1, some were not, see the errors; 2, an error stopped it: one line on stderr,
and no file at -o.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

# What Pillow may take a file for, whatever its name says: of its other formats, EPS starts a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp", ".npy")
INPUT_DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
}

# --- Images --------------------------------------------------------------------------------------


def images_of(
    path: str | os.PathLike[str],
    channels: int | None = None,
    mean: float = 0.5,
    std: float = 0.5,
) -> Iterator[NDArray[np.float32]]:
    """Read the images of a file one by one, preprocessed for the model.

    Args:
        path: An image file, or a .npy file of shape [n, c, h, w] or [c, h, w], or, with `channels` = 1,
            [n, h, w] or [h, w].
        channels: Channel count of the model; an image file is converted to it, as by Pillow: grey to RGB
            by repetition, RGB to grey by ITU-R BT.601 luma. None: 1 for grey files, else 3.
        mean: Subtracted from values scaled to 0..1 (image files and uint8 arrays); float arrays keep theirs.
        std: Divides them after that.

    Yields:
        [c, h, w] float32.

    Raises:
        ImportError: It is an image file, and Pillow is not installed.
        OSError: The file cannot be opened.
        ValueError: It is of another kind or damaged, or its shape, dtype or channel count does not suit.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in EXTENSIONS:
        raise ValueError(f"unsupported extension {suffix!r}; convert it to .png or .npy")
    if suffix != ".npy":
        yield _normalise(_read_image(path, channels), mean, std)
        return
    for image in _read_npy(path, channels):
        values = np.array(image, np.float32)
        yield _normalise(values / np.float32(255), mean, std) if image.dtype == np.uint8 else values


def _normalise(image: NDArray[np.float32], mean: float, std: float) -> NDArray[np.float32]:
    """Map values in 0..1 to (x - mean) / std, in float32."""
    normalised: NDArray[np.float32] = (image - np.float32(mean)) / np.float32(std)
    return normalised


def _read_image(path: str | os.PathLike[str], channels: int | None) -> NDArray[np.float32]:
    """Read the first image of a file to [c, h, w] float32 in 0..1."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("image files are read by Pillow: pip install pillow, or use .npy files") from error
    if channels not in (None, 1, 3):
        raise ValueError(f"an image file gives 1 or 3 channels, but the model takes {channels}; use .npy")
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                mode = image.mode
                # Of more than 8 bits, to which Pillow would clip it. Of a PGM it makes 16.
                deep = mode.startswith("I;16") or (mode == "I" and image.format == "PPM")
                tags = image.tag_v2 if deep and image.format == "TIFF" else {}
                grey = channels == 1 or (channels is None and mode in ("1", "L", "LA"))
                pixels = np.asarray(image if deep else image.convert("L" if grey else "RGB"))
        except UnidentifiedImageError as error:
            raise ValueError(f"not one of the kinds {', '.join(FORMATS)}; convert it to PNG") from error
        except Exception as error:  # damaged files make Pillow raise errors of many kinds
            raise ValueError(f"damaged or incomplete ({error}); copy or export it again") from error
    if mode in ("I", "F") and not deep:
        raise ValueError(f"pixels of mode {mode!r} have 32 bits and no known range; convert it to .npy")
    bits = tags.get(TIFF_BITS, (16,))[0] if deep else 8
    values = np.atleast_3d(pixels).astype(np.float32) / np.float32(2**bits - 1)
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow turns over in 8 bits alone
        values = np.float32(1) - values
    image_values = np.ascontiguousarray(values.transpose(2, 0, 1))
    return np.repeat(image_values, 3, axis=0) if deep and channels == 3 else image_values


def _read_npy(path: str | os.PathLike[str], channels: int | None) -> NDArray[Any]:
    """Map a .npy file of uint8 or float values into memory, as [n, c, h, w]."""
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(os.fspath(path), mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy raise errors of many kinds
        raise ValueError(f"not a .npy array ({error}); save it by numpy.save") from error
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"dtype {array.dtype} is not read; save it as uint8 or float32")
    return _to_nchw(array, channels)


def _to_nchw(array: NDArray[Any], channels: int | None) -> NDArray[Any]:
    """Add the dimensions that a .npy file may leave out: the result is [n, c, h, w]."""
    if array.ndim == 4:
        images = array
    elif array.ndim == 3:
        images = array[:, np.newaxis] if channels == 1 else array[np.newaxis]
    elif array.ndim == 2 and channels == 1:
        images = array[np.newaxis, np.newaxis]
    else:
        raise ValueError(
            f"shape {list(array.shape)} is not that of images; save [n, c, h, w] or [c, h, w], or for a "
            f"model of 1 channel [n, h, w] or [h, w]"
        )
    if not images.size:
        raise ValueError(f"shape {list(array.shape)} holds no image; leave the file out")
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


def _check_shape(shape: tuple[int, ...], model: ModelInput) -> None:
    """Raise ValueError unless an image of this shape, [c, h, w], fits the model."""
    if len(shape) == 3 and all(
        size in (None, got) for size, got in zip(model.image_shape, shape, strict=True)
    ):
        return
    expected = ", ".join("any" if size is None else str(size) for size in model.image_shape)
    raise ValueError(
        f"image shape {list(shape)}, but the model takes [{expected}] (channels, "
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
    _check_shape(images.shape[1:], model)
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
    if output.shape[:1] != (len(images),) or not output.size:
        raise ValueError(
            f"the model's first output {first!r} has shape {list(output.shape)} for {len(images)} images of "
            f"shape {list(images.shape[1:])}; it must have values, and the batch as its first dimension"
        )
    means: NDArray[np.float64] = output[:count].reshape(count, -1).mean(axis=1, dtype=np.float64)
    return means


# --- Stream --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What is written of one image."""

    name: str
    score: float | None  # finite
    error: str | None = None  # why there is no score


class _Entry(NamedTuple):
    """One image as read, or why there is none."""

    name: str
    image: NDArray[np.float32] | None
    error: str | None = None


class _Progress:
    """A bar on stderr, below the messages that go there."""

    WIDTH, SECONDS = 30, 0.1  # of the bar; between two updates

    def __init__(self, files: int, shown: bool) -> None:
        self.files, self.shown = files, shown
        self.read = self.rows = 0
        self.start, self.drawn = time.monotonic(), -math.inf

    def draw(self, last: bool = False) -> None:
        """Bring the bar up to date, unless that was done just now and more is to come."""
        now = time.monotonic()
        if not self.shown or (now - self.drawn < self.SECONDS and not last):
            return
        self.drawn = now
        done = "#" * (self.WIDTH * self.read // self.files)
        rate = self.rows / max(now - self.start, 1e-9)
        line = f"\r[{done:.<{self.WIDTH}}] {self.read}/{self.files} files, {self.rows} rows, {rate:.0f}/s "
        print(line, end="", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        clear = "\r\x1b[K" if self.drawn > -math.inf else ""
        print(f"{clear}score.py: {message}", file=sys.stderr)
        self.drawn = -math.inf

    def end(self) -> None:
        """Leave the line of the bar."""
        if self.drawn > -math.inf:
            print(file=sys.stderr)
            self.drawn = -math.inf


def _printable(path: Path) -> str:
    """A file's name, of which not every one is valid Unicode."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _in_one_line(error: Exception) -> str:
    """The message, without the path that an OSError has in it."""
    reason = error.strerror if isinstance(error, OSError) else None
    return " ".join((reason or str(error)).split())


def _read(
    paths: Iterable[Path], model: ModelInput, mean: float, std: float, progress: _Progress
) -> Iterator[_Entry]:
    """Read the images of all files, one by one."""
    for path in paths:
        name = _printable(path)
        try:
            for index, image in enumerate(images_of(path, model.image_shape[0], mean, std)):
                _check_shape(image.shape, model)
                yield _Entry(f"{name}[{index}]" if path.suffix.lower() == ".npy" else name, image)
        except (OSError, ValueError) as error:
            yield _Entry(name, None, _in_one_line(error))
        progress.read += 1


def _score_entries(
    session: ort.InferenceSession, model: ModelInput, entries: Iterator[_Entry], batch: int
) -> Iterator[list[Row]]:
    """Score images batch by batch, in their order; those of a batch that differ in size, apart."""
    while chunk := list(islice(entries, model.batch or batch)):
        by_shape = defaultdict(list)
        for index, entry in enumerate(chunk):
            if entry.image is not None:
                by_shape[entry.image.shape].append((index, entry.image))
        rows = [Row(entry.name, None, entry.error) for entry in chunk]
        for images in by_shape.values():
            try:
                scores = _score_batch(session, model, np.stack([image for _, image in images]))
            except ValueError as error:
                if None not in model.image_shape:
                    raise
                # A model of any size may yet have a smallest one, say that of its kernels.
                for index, _ in images:
                    rows[index] = Row(chunk[index].name, None, _in_one_line(error))
                continue
            for (index, _), found in zip(images, scores.tolist(), strict=True):
                rows[index] = _row(chunk[index].name, found)
        yield rows


def _row(name: str, found: float) -> Row:
    if math.isfinite(found):
        return Row(name, found)
    return Row(name, None, f"the score is {found}; check that the image and the model's weights are finite")


# --- Output --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Stdout, or a file that takes its place when the block has ended without an error."""
    if output is None:
        yield sys.stdout
        return
    if output.exists() and not output.is_file():
        raise ValueError(f"-o {output} is not a file; give the path of a file to write")
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise ValueError(f"-o {output} cannot be written: {error.strerror}; give another path") from error
    with folder as name:
        written = Path(name, output.name)
        with written.open("w", encoding="utf-8", newline="") as file:
            yield file
        written.replace(output)


def _writer(file: TextIO, kind: str) -> Callable[[Row], object]:
    """What writes a row in a format."""
    if kind == "jsonl":
        return lambda row: print(json.dumps(row._asdict()), file=file)
    table = csv.writer(file, lineterminator="\n")
    table.writerow(Row._fields)
    return table.writerow


# --- Command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are reported by `main`, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see score.py --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = _Parser(prog="score.py", description="Score images with a discriminator exported to ONNX.")
    add = parser.add_argument
    add("model", help="ONNX file")
    add("images", nargs="*", help="image files, .npy files and folders of them")
    add("--batch", type=int, default=64, help="images per run of a dynamic batch (default: 64)")
    add("--mean", type=float, default=0.5, help="subtracted from 0..1 images (default: 0.5)")
    add("--std", type=float, default=0.5, help="divides them after that (default: 0.5)")
    add("--format", choices=("csv", "jsonl"), default="csv", help="a table or JSON lines (default: csv)")
    add("-o", "--output", type=Path, help="file to write (default: stdout)")
    shown = "a bar on stderr (default: where that is a terminal, and the rows go elsewhere)"
    add("--progress", action=argparse.BooleanOptionalAction, help=shown)
    args = parser.parse_intermixed_args(argv)  # options may stand between model and images
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}; it must be 1 or more")
    if not (math.isfinite(args.mean) and math.isfinite(args.std) and args.std > 0):
        parser.error(f"--mean {args.mean} --std {args.std}: they must be finite, --std above 0")
    if args.progress is None:
        args.progress = sys.stderr.isatty() and (args.output is not None or not sys.stdout.isatty())
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
            raise ValueError(f"{path}: no such file or folder")
    if not files:
        raise ValueError("nothing to score; name image or .npy files, or folders that hold them")
    return files


def _score_files(args: argparse.Namespace) -> bool:
    """Score the images on the command line; tells whether all have a score."""
    files = _expand(args.images)
    session = open_session(args.model)
    model = model_input(session)
    # In a folder, a link may lead nowhere.
    read = [path for path in (Path(args.model), *files) if path.exists()]
    if args.output is not None and args.output.exists() and any(map(args.output.samefile, read)):
        raise ValueError(f"-o {args.output} is a file that is read; give another path")
    progress = _Progress(len(files), args.progress)
    entries = _read(files, model, args.mean, args.std, progress)
    complete = True
    try:
        with _opened(args.output) as file:
            write = _writer(file, args.format)
            for rows in _score_entries(session, model, entries, args.batch):
                for row in rows:
                    write(row)
                    if row.error is not None:
                        complete = False
                        progress.say(f"no score for {row.name}: {row.error}")
                file.flush()
                progress.rows += len(rows)
                progress.draw()
            progress.draw(last=True)
    finally:
        progress.end()
    return complete


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program name; None takes those of the process.

    Returns:
        The exit code: 0, 1 if an image has no score, or 2 if an error or Ctrl-C has stopped it.
    """
    try:
        return 0 if _score_files(_parse(argv)) else 1
    except BrokenPipeError:  # whoever reads the rows has had enough, and needs no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
    except KeyboardInterrupt:
        print("score.py: stopped", file=sys.stderr)
    except (ImportError, OSError, ValueError) as error:
        print("score.py: error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

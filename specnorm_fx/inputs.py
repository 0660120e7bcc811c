"""The inputs of a model: random ones of given shapes, those of a program, and stored ones for calibration."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from specnorm_fx.load import LoadError, brief, read_program

__all__ = [
    "DTYPES",
    "Input",
    "calibration_batches",
    "example_inputs",
    "file_inputs",
    "one_row_more",
    "program_inputs",
    "try_inputs",
]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool),
    )
}


class Input(NamedTuple):
    """What an example input looks like.

    Attributes:
        name: The argument of the forward; ``None`` for the next one in order.
        shape: Its sizes, the batch first.
        dtype: ``None`` for that of the model.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def program_inputs(spec: str) -> tuple[Any, ...]:
    """The example inputs that a program was exported with.

    Args:
        spec: The ``.pt2`` file.

    Raises:
        LoadError: It cannot be read, or has no inputs by position.
    """
    args, kwargs = read_program(spec).example_inputs or ((), {})
    if kwargs or not args:
        raise LoadError(f"{spec} must hold example inputs by position alone. Give the inputs' shapes.")
    return tuple(args)


def file_inputs(taken: Mapping[str, tuple[tuple[int | None, ...], str]], batch: int) -> list[Input]:
    """Shapes that fit what an ONNX file takes.

    Args:
        taken: From `specnorm_fx.onnx.inputs_of`.
        batch: The size to take for a first dimension that is free.

    Returns:
        One for each input of the graph, in order; floats are to be of the model's dtype.

    Raises:
        LoadError: Another dimension is free, or a dtype is none that a model takes.
    """
    inputs = []
    for name, (sizes, dtype) in taken.items():
        if sizes[:1] == (None,):
            sizes = (batch, *sizes[1:])
        shape = tuple(size for size in sizes if size is not None)
        if shape != sizes or dtype not in DTYPES:
            raise LoadError(f"The file leaves the shape of its input {name!r} open: give the inputs' shapes.")
        inputs.append(Input(None, shape, None if DTYPES[dtype].is_floating_point else DTYPES[dtype]))
    return inputs


def example_inputs(model: fx.GraphModule, inputs: Sequence[Input]) -> tuple[Tensor, ...]:
    """Random inputs of given shapes, on which the model has been tried.

    Args:
        model: In eval mode.
        inputs: One for each argument, all by name or all in order.

    Returns:
        One tensor for each, in the order of the forward: floats are normal, integers and bools 0 or 1.

    Raises:
        LoadError: The forward has no such argument, or the model does not run on them.
    """
    arguments = [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
    # One more argument than inputs is no error here: it may have a default.
    given = arguments[: len(inputs)]
    named = {input.name or argument: input for argument, input in zip(given, inputs, strict=False)}
    if named.keys() != set(given) or len(named) != len(inputs):
        raise LoadError(
            f"The inputs must be the first arguments of the forward, which are {', '.join(arguments)}, got "
            f"{', '.join(input.name or 'one without a name' for input in inputs)}."
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    examples = tuple(_random(named[name].shape, named[name].dtype or dtype) for name in given)
    try_inputs(model, examples)
    return examples


def try_inputs(model: fx.GraphModule, examples: tuple[Any, ...]) -> None:
    """Run a model on inputs, to see that it does.

    Args:
        model: In eval mode.
        examples: Its arguments, by position.

    Raises:
        LoadError: It does not.
    """
    interpreter = fx.Interpreter(model)  # the model itself, called, would print a traceback
    interpreter.extra_traceback = False
    try:
        with torch.no_grad():
            interpreter.run(*examples)
    except Exception as error:  # it is the user's code
        sizes = ", ".join("x".join(map(str, x.shape)) for x in examples if isinstance(x, Tensor))
        raise LoadError(
            f"The model does not run on an input of {sizes} ({brief(error)}). Give the shapes of a training "
            f"batch; a program takes what it was exported for."
        ) from error


def one_row_more(examples: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs in a batch of another size.

    Args:
        examples: Tensors with the batch first; what is no tensor stays.
    """
    return tuple(torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.ndim else x for x in examples)


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(2, shape).to(dtype)


def calibration_batches(
    path: str | os.PathLike[str], example: tuple[Tensor, ...]
) -> list[tuple[Tensor, ...]]:
    """Stored inputs in batches, as many rows each as the example has.

    Args:
        path: A ``.npy`` file with an array ``[n, ...]`` (or ``.npz``, with one for each input, in order), or
            a folder of such files. They are inputs as in training: of the shapes and kinds of the example.
        example: One batch.

    Returns:
        Batches in the example's dtypes; rows left over at a file's end are not used.

    Raises:
        LoadError: There is no such file, or it holds something else, or too few rows for one batch.
    """
    path = Path(path)
    files = sorted(path.glob("*.np[yz]")) if path.is_dir() else [path]
    if not files:
        raise LoadError(f"The folder {path} must hold .npy or .npz files, got none.")
    batches = [batch for file in files for batch in _slices(_arrays(file, example), example)]
    if not batches:
        raise LoadError(f"{path} must hold at least {len(example[0])} inputs, one batch, got fewer.")
    return [
        tuple(torch.from_numpy(np.array(part)).to(x.dtype) for part, x in zip(batch, example, strict=True))
        for batch in batches
    ]


def _arrays(file: Path, example: tuple[Tensor, ...]) -> list[np.ndarray]:
    try:
        loaded = np.load(file, mmap_mode="r", allow_pickle=False)
        arrays = list(loaded.values()) if isinstance(loaded, np.lib.npyio.NpzFile) else [loaded]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise ValueError("a zip archive of other files")  # a checkpoint of torch.save is one
    except Exception as error:  # of many kinds, for a file that is damaged
        raise LoadError(f"{file} must be an array from numpy.save ({brief(error)}).") from error
    got = [(array.shape[1:], array.dtype.kind) for array in arrays]
    want = [(tuple(x.shape[1:]), "f" if x.is_floating_point() else x.numpy().dtype.kind) for x in example]
    if got != want:
        raise LoadError(f"{file} must hold inputs of the shape and kind of dtype {want}, got {got}.")
    return arrays


def _slices(arrays: list[np.ndarray], example: tuple[Tensor, ...]) -> Iterator[list[np.ndarray]]:
    rows = len(example[0])
    for start in range(0, min(map(len, arrays)) - rows + 1, rows):
        yield [array[start : start + rows] for array in arrays]

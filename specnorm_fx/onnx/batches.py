"""Batches: arguments of a model, as an ONNX file takes them, with its dynamic dimensions."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specnorm_fx.onnx.extra import require

__all__ = [
    "Args",
    "Axes",
    "array",
    "as_batch",
    "as_dims",
    "dynamic_dimensions",
    "feeds",
    "in_order_of",
    "inputs_in_order",
    "names_by_key",
    "random_batches",
    "tensor_names",
    "tensors",
]

Args: TypeAlias = "Tensor | tuple[Any, ...]"
# Of each tensor among the inputs: its dynamic dimensions, with their names where they have one.
Axes: TypeAlias = "list[dict[int, str | None]]"


def as_batch(args: Args) -> tuple[Any, ...]:
    """Positional arguments, also where there is one alone.

    Args:
        args: One tensor, or a tuple.
    """
    return tuple(args) if isinstance(args, tuple) else (args,)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a batch or an output, in order.

    Args:
        tree: Tensors and other things, nested in tuples, lists and dicts.
    """
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def array(tensor: Tensor) -> np.ndarray:
    """A tensor for numpy, which has no bf16: in fp32.

    Args:
        tensor: On any device.
    """
    tensor = tensor.detach().cpu()
    values: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values


def feeds(inputs: list[Any], batch: tuple[Any, ...], names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """A batch by the names of a file's inputs, floating tensors in the dtypes that it takes.

    Args:
        inputs: From `specnorm_fx.onnx.reading.graph_inputs`.
        batch: With as many tensors.
        names: Of these; where they are not those of the inputs, the tensors are in the order of the inputs.
    """
    (onnx,) = require("onnx")
    fed = {}
    by_name = {value.name: value for value in inputs}
    for name, tensor in zip(inputs_in_order(by_name, names), tensors(batch), strict=True):
        fed[name] = array(tensor)
        if tensor.is_floating_point():
            taken = onnx.helper.tensor_dtype_to_np_dtype(by_name[name].type.tensor_type.elem_type)
            fed[name] = fed[name].astype(taken)
    return fed


def inputs_in_order(inputs: Iterable[str], names: Sequence[str]) -> list[str]:
    """The input of a file that each tensor of a batch goes to.

    Args:
        inputs: Names of the file's inputs.
        names: Of the tensors, as in `feeds`.
    """
    inputs = list(inputs)
    return list(names) if {*names} == {*inputs} else inputs


def tensor_names(model: nn.Module, args: tuple[Any, ...], input_names: Sequence[str] | None) -> list[str]:
    """The names that the input tensors have in the file.

    Args:
        model: Whose forward has the arguments.
        args: Example inputs.
        input_names: The first of them, where they are given.

    Raises:
        ValueError: ``args`` hold no tensor, or there are more names than tensors.
    """
    leaves: Any = pytree.tree_flatten_with_path(args)[0]
    paths = [path for path, leaf in leaves if isinstance(leaf, Tensor)]
    if not paths:
        raise ValueError("args must hold at least one tensor, the example input.")
    parameters = list(inspect.signature(model.forward).parameters)
    names = []
    for position, *inner in paths:
        name = parameters[position.idx] if position.idx < len(parameters) else f"args_{position.idx}"
        names.append("_".join([name, *map(_text, inner)]))
    given = list(input_names or ())
    if len(given) > len(names):
        raise ValueError(f"input_names must name {len(names)} inputs at most, got {', '.join(given)}.")
    return [*given, *names[len(given) :]]


def _text(key: Any) -> str:
    """Of a dict, a sequence or a named tuple."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def names_by_key(model: nn.Module, batch: tuple[Any, ...]) -> list[str]:
    """The names that export gives the tensors of a batch with dicts, whose keys may come in any order.

    Args:
        model: As in `tensor_names`.
        batch: For it.

    Returns:
        None of them for a batch without dicts, whose order is all there is, and where there are no names.
    """
    try:
        leaves: Any = pytree.tree_flatten_with_path(batch)[0]
        has_dicts = any(isinstance(key, pytree.MappingKey) for path, _ in leaves for key in path)
        return tensor_names(model, batch, None) if has_dicts else []
    except ValueError:  # classes of the user's without keys, a ScriptModule without a signature, no tensor
        return []


def in_order_of(example: Any, batch: Any) -> Any:
    """A batch with the keys of its dicts in the order of the example's, which is that of the file's inputs.

    Args:
        example: Inputs, or a part of them.
        batch: Like them, or not: then it is as it was.
    """
    if isinstance(example, dict) and isinstance(batch, dict):
        ordered = copy.copy(batch)
        for key in [*(key for key in example if key in batch), *(key for key in batch if key not in example)]:
            ordered[key] = in_order_of(example.get(key), ordered.pop(key))
        return ordered
    is_sequence = type(batch) in (tuple, list) and isinstance(example, (tuple, list))
    if is_sequence and len(example) == len(batch):
        return type(batch)(map(in_order_of, example, batch))
    return batch


def dynamic_dimensions(
    args: tuple[Any, ...],
    names: list[str],
    axes: Mapping[str, Mapping[int, str | None]],
    dynamic_batch: bool,
) -> Axes:
    """The dynamic dimensions of each input tensor.

    Args:
        args: Example inputs.
        names: From `tensor_names`.
        axes: As in `specnorm_fx.onnx.export`.
        dynamic_batch: As there.

    Raises:
        ValueError: ``axes`` name an input or a dimension that there is not, or give no identifier.
    """
    if unknown := sorted(set(axes) - set(names)):
        raise ValueError(f"axes must name inputs ({', '.join(names)}), got {', '.join(unknown)}.")
    free: Axes = []
    for name, tensor in zip(names, tensors(args), strict=True):
        dims: dict[int, str | None] = {0: "batch"} if dynamic_batch and tensor.ndim else {}
        named = axes.get(name, {})
        if not isinstance(named, Mapping):
            raise ValueError(f"axes[{name!r}] must be a mapping such as {{0: 'batch'}}, got {named!r}.")
        for dim, label in named.items():
            if not 0 <= dim < tensor.ndim:
                raise ValueError(
                    f"axes[{name!r}] must name dimensions from 0 to {tensor.ndim - 1}, got {dim}."
                )
            if label is not None and not (isinstance(label, str) and label.isidentifier()):
                raise ValueError(f"axes[{name!r}][{dim}] must be a Python identifier or None, got {label!r}.")
            dims[dim] = label
        free.append(dims)
    return free


def as_dims(args: tuple[Any, ...], free: Axes) -> Any:
    """The dynamic dimensions as ``torch.export.export`` takes them.

    Args:
        args: Example inputs.
        free: From `dynamic_dimensions`.
    """
    each = iter(free)

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        dynamic: Any = torch.export.Dim.DYNAMIC
        return {dim: torch.export.Dim(name) if name else dynamic for dim, name in next(each).items()}

    return pytree.tree_map(of_leaf, args)


def random_batches(args: tuple[Any, ...], free: Axes, n_batches: int) -> list[tuple[Any, ...]]:
    """Batches like ``args``: dimensions of one name grow together, a first dimension from 1 on.

    Args:
        args: Example inputs; integers are drawn from the values in them.
        free: From `dynamic_dimensions`.
        n_batches: How many.
    """
    generator = torch.Generator().manual_seed(0)
    # Without a name, dimensions of one size may have to be the same.
    keyed = [
        {dim: name or str(tensor.shape[dim]) for dim, name in dims.items()}
        for tensor, dims in zip(tensors(args), free, strict=True)
    ]
    firsts = {dims[0] for dims in keyed if 0 in dims}

    def redrawn(leaf: Any, number: int, each: Iterator[dict[int, str]]) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        for dim, key in next(each).items():
            shape[dim] = number + (1 if key in firsts else shape[dim])
        if leaf.is_floating_point():
            return torch.randn(shape, generator=generator).to(leaf)
        # Labels and masks: only the values of the example are known to be valid.
        index = torch.randint(leaf.numel(), shape, generator=generator)
        return leaf.flatten()[index.to(leaf.device)]

    batches = []
    for number in range(n_batches):
        each = iter(keyed)
        batches.append(pytree.tree_map(lambda leaf, n=number, e=each: redrawn(leaf, n, e), args))
    return batches

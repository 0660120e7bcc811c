"""What an ONNX file holds: inputs, operators, precision, weights, metadata."""

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specnorm_fx.onnx.extra import require

__all__ = [
    "StoredWeight",
    "graph_inputs",
    "inputs_of",
    "operators",
    "precision_of",
    "read_checked",
    "weights_of",
]

# Which dimension of the weight is the output's, by the operator that takes it as its second input.
OUTPUT_DIMS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}


class StoredWeight(NamedTuple):
    """A weight in an ONNX file.

    Attributes:
        name: That of its initializer.
        values: On the CPU; of an int8 weight what it stands for, in fp32.
        dim: Which dimension is the output's.
    """

    name: str
    values: Tensor
    dim: int


def read_checked(path: str | os.PathLike[str]) -> Any:
    """Read a file that ``onnx.checker`` finds valid, without its external data.

    Args:
        path: The file.

    Returns:
        The ``ModelProto``.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        FileNotFoundError: There is no such file.
        ValueError: It is no valid ONNX file.
    """
    (onnx,) = require("onnx")
    path = _existing(path)
    try:
        onnx.checker.check_model(path, full_check=True)
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # types of its own, and those of protobuf, directly under Exception
        raise ValueError(f"{path} is not a valid ONNX model: {error}") from error


def graph_inputs(graph: Any) -> list[Any]:
    """What a graph takes: some files list their initializers among the inputs.

    Args:
        graph: A ``GraphProto``.

    Returns:
        The ``ValueInfoProto`` of each input, in order.
    """
    initializers = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in initializers]


def inputs_of(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int | None, ...], str]]:
    """What an ONNX file takes, once ``onnx.checker`` has found the file valid.

    Args:
        path: The file.

    Returns:
        Input names to sizes (``None`` where free) and the dtype's name (``"float32"``).

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        FileNotFoundError: There is no such file.
        ValueError: It is no valid ONNX file.
    """
    (onnx,) = require("onnx")
    inputs = {}
    for value in graph_inputs(read_checked(path).graph):
        tensor = value.type.tensor_type
        sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        inputs[value.name] = (sizes, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    return inputs


def operators(model: Any) -> Counter[str]:
    """How many nodes of each operator the graph of a file has.

    Args:
        model: A ``ModelProto``.
    """
    return Counter(node.op_type for node in model.graph.node)


def precision_of(graph: Any) -> str:
    """What a graph computes in: ``"fp64"``, or one of `specnorm_fx.onnx.precision.PRECISIONS`.

    Args:
        graph: A ``GraphProto``.
    """
    (onnx,) = require("onnx")
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        return "int8"
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in graph.input}
    coarsest_first = {"BFLOAT16": "bf16", "FLOAT16": "fp16", "FLOAT": "fp32", "DOUBLE": "fp64"}
    found = (
        name for type_, name in coarsest_first.items() if onnx.TensorProto.DataType.Value(type_) in types
    )
    return next(found, "fp32")


def weights_of(path: str | os.PathLike[str]) -> tuple[list[StoredWeight], dict[str, str]]:
    """The weights of the layers in an ONNX file, and its metadata.

    Args:
        path: The file, its external data beside it.

    Returns:
        The initializers that a Conv, ConvTranspose, Gemm or MatMul takes as its weight, or a Gather as its
        table, by themselves or through a DequantizeLinear, in the order of use; and ``metadata_props``.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        FileNotFoundError: There is no such file.
        OSError: The file, or its external data, cannot be read.
        ValueError: It is no ONNX file.
    """
    (onnx,) = require("onnx")
    _existing(path)
    try:
        model = onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # protobuf's own types, and those of onnx
        raise ValueError(f"{path} is damaged or no ONNX file: {error}") from error
    if not model.graph.node:
        raise ValueError(f"{path} is damaged or no ONNX file: it has no nodes.")
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = {
        name: node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for name in node.output[:1]
    }
    found: dict[str, StoredWeight] = {}
    for node in model.graph.node:
        name, dim = _weight_input(node)
        by = dequantized.get(name)
        sources = [name] if by is None else list(by.input)
        if dim is None or name in found or not all(source in initializers for source in sources):
            continue
        try:
            values = _values([initializers[source] for source in sources], by)
        except Exception as error:  # of many kinds: sizes, scales, an axis or a type that do not fit
            raise ValueError(f"{path} is damaged: {sources[0]} cannot be read ({error}).") from error
        if values is not None:
            # ONNX Runtime's quantizer appends to the name.
            fqn = name if by is None else sources[0].removesuffix("_quantized")
            found[name] = StoredWeight(fqn, values, dim)
    return list(found.values()), {entry.key: entry.value for entry in model.metadata_props}


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no ONNX file {path}.")
    return path


def _weight_input(node: Any) -> tuple[str, int | None]:
    """The input of a node that is a weight if it has one, and the output's dimension: None if it has none."""
    place, dim = (0, 0) if node.op_type == "Gather" else (1, OUTPUT_DIMS.get(node.op_type))
    if node.op_type == "Gemm":
        dim = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return node.input[place] if len(node.input) > place else "", dim


def _values(tensors: list[Any], dequantize: Any) -> Tensor | None:
    """What is stored in the initializers of one weight, or None for a bias, and for integers."""
    (onnx,) = require("onnx")
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in tensors]
    if arrays[0].ndim < 2:
        return None
    if dequantize is not None:
        return _dequantized(dequantize, *arrays)
    if arrays[0].dtype.kind in "fc":
        return torch.from_numpy(arrays[0].copy())
    if tensors[0].data_type == onnx.TensorProto.BFLOAT16:
        # Numpy has no bf16 of its own.
        return torch.from_numpy(arrays[0].astype(np.float32)).to(torch.bfloat16)
    return None


def _dequantized(
    node: Any, quantized: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None
) -> Tensor:
    """What a DequantizeLinear makes of a weight: one scale, or one for each place or block along an axis."""
    options = {attribute.name: attribute.i for attribute in node.attribute}
    axis, block = options.get("axis", 1), options.get("block_size", 0)

    def spread(x: np.ndarray) -> np.ndarray:
        """As many as there are weights, or as broadcasts to that."""
        if block:
            size = quantized.shape[axis]
            return np.repeat(x, min(block, size), axis).take(range(size), axis).astype(np.float32)
        shape = [1] * quantized.ndim
        if x.ndim:
            shape[axis] = x.size
        return x.astype(np.float32).reshape(shape)

    shifted = quantized.astype(np.float32)
    if zero is not None:
        shifted -= spread(zero)
    return torch.from_numpy(shifted * spread(scale))

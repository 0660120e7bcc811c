"""What a file computes in: fp16 and bf16 inside fp32 inputs and outputs, int8 by calibration."""

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from specnorm_fx.onnx.batches import Args, as_batch, feeds, tensors
from specnorm_fx.onnx.extra import require
from specnorm_fx.onnx.reading import graph_inputs

__all__ = [
    "PRECISIONS",
    "checked_calibration",
    "convert_",
    "converted",
    "opset_for",
    "quantize",
    "round_folded_",
]

# What `export` writes, and the dtype that the graph is converted to.
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # quantized afterwards
}
BF16_OPSET = 22  # the first with a Conv for it


def opset_for(precision: str, opset_version: int | None) -> int | None:
    """The opset to ask the exporter for.

    Args:
        precision: One of `PRECISIONS`.
        opset_version: What the user asks for; None leaves it to the exporter.

    Raises:
        ValueError: It has not the operators for this precision.
    """
    if precision != "bf16":
        return opset_version
    if opset_version is not None and opset_version < BF16_OPSET:
        raise ValueError(
            f"opset_version must be at least {BF16_OPSET} for bf16, the first with a Conv for it, got "
            f"{opset_version}."
        )
    return opset_version or BF16_OPSET


# --- Half precision ---


def convert_(model: fx.GraphModule, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Compute in a dtype between fp32 inputs and fp32 outputs, in place.

    Args:
        model: Without spectral norm.
        args: Example inputs.
        dtype: From `PRECISIONS`.
    """
    floating = [
        t.dtype for t in (*model.parameters(), *model.buffers(), *tensors(args)) if t.is_floating_point()
    ]
    if {*floating, dtype} == {torch.float32}:
        return
    model.to(dtype)
    graph = model.graph
    for node in graph.find_nodes(op="placeholder"):
        users = list(node.users)
        with graph.inserting_after(node):
            inside = graph.call_function(converted, (node, dtype))
        for user in users:
            user.replace_input_with(node, inside)
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        output.args = fx.map_arg(
            output.args, lambda node: graph.call_function(converted, (node, torch.float32))
        )
    model.recompile()


def converted(tree: Any, dtype: torch.dtype) -> Any:
    """The same, its floating tensors in another dtype.

    Args:
        tree: Tensors and other things, nested in tuples, lists and dicts.
        dtype: A floating one.
    """
    return pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )


def round_folded_(model: Any) -> None:
    """To bf16 what the exporter has folded in fp32: batch norm into the weights of a Conv, in place.

    Args:
        model: The ``onnx_ir.Model`` of a bf16 file.
    """
    (ir,) = require("onnx_ir")
    for node in model.graph:
        kinds = {value.dtype for value in node.inputs if value is not None}
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and ir.DataType.BFLOAT16 in kinds:
            for value in node.inputs:
                if value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT:
                    rounded = value.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy())
                    value.const_value = ir.tensor(rounded, name=value.name)
                    value.dtype = ir.DataType.BFLOAT16


# --- int8 ---


def checked_calibration(
    precision: str, calibration: Iterable[Args] | None, names: list[str]
) -> list[tuple[Any, ...]]:
    """The calibration data as a list, empty where the precision needs none.

    Args:
        precision: As in `specnorm_fx.onnx.export`.
        calibration: As there.
        names: Of the input tensors.

    Raises:
        ValueError: There is no such precision; calibration data are missing, or given where they have no
            use; or they are no batches of as many tensors.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if (precision == "int8") != (calibration is not None):
        raise ValueError(
            "calibration must be given for precision='int8', and for no other: batches of real data, which "
            "decide on the ranges of activations."
        )
    listed = [calibration] if isinstance(calibration, Tensor) else calibration
    batches = [as_batch(batch) for batch in listed or ()]
    if calibration is not None and not batches:
        raise ValueError("calibration must hold at least one batch, got none.")
    for number, batch in enumerate(batches):
        if len(tensors(batch)) != len(names):
            raise ValueError(
                f"calibration must hold batches like args ({', '.join(names)}), got "
                f"{len(tensors(batch))} tensors in batch {number}."
            )
    return batches


def quantize(source: Path, written: Path, calibration: list[tuple[Any, ...]], external_data: bool) -> None:
    """ONNX Runtime's static quantization, weights per channel in 7 bits.

    Not in 8: a processor without VNNI adds two products in 16 bits, which saturate. So a file that is right
    here would be wrong on another machine (a Linear of 64 x 64 by 0.3 of its output instead of 0.02).

    Args:
        source: A file in fp32.
        written: The file to write.
        calibration: From `checked_calibration`, not empty.
        external_data: Whether the weights go into a file beside.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        ValueError: The graph does not run on the calibration data, or no weight of it is quantized.
    """
    onnx, quantization = require("onnx", "onnxruntime.quantization")
    graph = onnx.load(source, load_external_data=False).graph
    inputs = graph_inputs(graph)
    # Its bias gets one scale for each channel of a group, which fits no graph.
    grouped = [
        node.name
        for node in graph.node
        if node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute)
    ]
    reader = _Reader(feeds(inputs, batch) for batch in calibration)
    with _quiet_quantizer():
        try:
            quantization.quantize_static(
                source,
                written,
                reader,
                per_channel=True,
                reduce_range=True,
                nodes_to_exclude=grouped,
                use_external_data_format=external_data,
            )
        except Exception as error:  # onnxruntime raises types of its own, directly under Exception
            raise ValueError(
                f"calibration must hold finite batches of the shapes of args: {error}"
            ) from error
    quantized = onnx.load(written, load_external_data=False).graph
    matrices = {tensor.name for tensor in quantized.initializer if len(tensor.dims) > 1}
    if not any(node.op_type == "DequantizeLinear" and node.input[0] in matrices for node in quantized.node):
        raise ValueError(
            "precision='int8' must find a weight to quantize, and found none: ONNX Runtime does not look "
            "into the branches of torch.cond, and grouped transposed convolutions stay in fp32. Use another "
            "precision."
        )


class _Reader:
    """Calibration data as onnxruntime.quantization asks for it."""

    def __init__(self, fed: Iterable[dict[str, np.ndarray]]) -> None:
        self.fed = iter(fed)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.fed, None)


_one_quantizer = threading.Lock()


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Without what onnxruntime.quantization advises through the root logger; one thread at a time."""
    with _one_quantizer:
        root, silent = logging.getLogger(), logging.NullHandler()
        level = logging.root.manager.disable
        root.addHandler(silent)  # logging.warning() would configure a root logger that has no handler
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
            root.removeHandler(silent)

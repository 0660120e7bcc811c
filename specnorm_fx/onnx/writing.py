"""A model without spectral norm to an ONNX file, by torch's exporter."""

import contextlib
import logging
import re
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from specnorm_fx.onnx.batches import Axes, array, as_dims
from specnorm_fx.onnx.extra import require
from specnorm_fx.onnx.precision import PRECISIONS, convert_, converted, opset_for, quantize, round_folded_

__all__ = ["Written", "append_metadata", "write"]


class Written(NamedTuple):
    """What `write` has made of a model.

    Attributes:
        opset: The opset.
        folded: Parameters that the exporter has multiplied with the scales of a batch norm after them.
    """

    opset: int
    folded: list[str]


def write(
    model: fx.GraphModule,
    args: tuple[Any, ...],
    written: Path,
    *,
    precision: str,
    calibration: list[tuple[Any, ...]],
    opset_version: int | None,
    external_data: bool,
    free: Axes,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Written:
    """Write a file that nothing has checked yet.

    Args:
        model: Without spectral norm; it is changed.
        args: Example inputs.
        written: The file.
        precision: One of `specnorm_fx.onnx.precision.PRECISIONS`.
        calibration: Batches for int8.
        opset_version: As in `specnorm_fx.onnx.export`.
        external_data: Whether the weights go into ``<written>.data``.
        free: The dynamic dimensions of each input tensor.
        dynamic_shapes: Instead of ``free``, as in ``torch.export.export``.
        input_names: As in `specnorm_fx.onnx.export`.
        output_names: As there.

    Returns:
        The opset, and what is not as in the model.

    Raises:
        ValueError: The exporter cannot write this opset; the model fixes a dimension of ``free``, or does
            not run on ``calibration``; there are more ``output_names`` than outputs; or a name stands for
            two tensors.
        RuntimeError: The exporter fails.
    """
    opset_version = opset_for(precision, opset_version)
    convert_(model, args, PRECISIONS[precision])
    # A tensor that is given twice would become one input; and a dict that comes last, keyword arguments.
    example = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
    example = converted(example, torch.float32)
    if isinstance(example[-1], dict):
        example = (*example, {})
    try:
        with _quiet_exporter():
            if any(free):  # which it says where there are numbers among args; _name_dimensions_ does it
                warnings.filterwarnings("ignore", message="# ONNX model has different number of inputs")
            program: Any = torch.onnx.export(
                model,
                example,
                dynamo=True,
                verbose=False,
                dynamic_shapes=as_dims(args, free) if any(free) else dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                opset_version=opset_version,
            )
    except torch.onnx.OnnxExporterError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise RuntimeError(
            f"{type(model).__name__} cannot be written by the exporter of torch {torch.__version__}: {why}"
        ) from error
    _refuse_changed(program.model, free, opset_version, dynamic_shapes)
    folded = _folded(program.model, model)
    if precision == "bf16":
        round_folded_(program.model)
    _name_dimensions_(program.model, free)
    _name_initializers_(program.model, model)
    _name_outputs_(program.model, output_names or ())
    _drop_stack_traces_(program.model)
    if precision != "int8":
        program.save(written, external_data=external_data)
    else:
        with tempfile.TemporaryDirectory(dir=written.parent) as folder:
            written_whole = Path(folder, written.name)
            program.save(written_whole, external_data=external_data)
            quantize(written_whole, written, calibration, external_data)
    return Written(int(program.model.opset_imports[""]), folded)


def append_metadata(written: Path, metadata: Mapping[str, str]) -> None:
    """Add ``metadata_props``, and leave the bytes that have been verified as they are.

    Args:
        written: The file.
        metadata: By keys without the prefix ``specnorm_fx.``.
    """
    (onnx,) = require("onnx")
    props = [
        onnx.StringStringEntryProto(key=f"specnorm_fx.{key}", value=value) for key, value in metadata.items()
    ]
    # Protobufs that stand one after the other are merged when read.
    with written.open("ab") as file:
        file.write(onnx.ModelProto(metadata_props=props).SerializeToString(deterministic=True))


def _refuse_changed(model: Any, free: Axes, opset_version: int | None, dynamic_shapes: Any) -> None:
    """The exporter fixes a dimension that the model does not leave free, and keeps its own opset."""
    for value, dims in zip(model.graph.inputs, free, strict=False):
        if fixed := [dim for dim in dims if isinstance(value.shape[dim], int)]:
            raise ValueError(
                f"Dynamic dimensions must be free in the model, and dimension {fixed[0]} of {value.name!r} "
                f"is always {value.shape[fixed[0]]} there. Leave it out of axes and dynamic_batch."
            )
    # Dim.DYNAMIC where the model fixes it is an error of the exporter's own.
    asked = [x for x in pytree.tree_leaves(dynamic_shapes) if isinstance(x, torch.export.Dim)]
    left = [x for value in model.graph.inputs for x in value.shape if not isinstance(x, int)]
    if len(left) < len(asked):
        raise ValueError(
            f"Dynamic dimensions must be free in the model, and of the {len(asked)} in dynamic_shapes "
            f"{len(asked) - len(left)} have one size there. Leave them out."
        )
    if opset_version not in (None, model.opset_imports[""]):
        raise ValueError(
            f"opset_version={opset_version} cannot be had for this model: the exporter of torch "
            f"{torch.__version__} writes opset {model.opset_imports['']}. Leave it out, or try one nearer to "
            f"that."
        )


def _name_dimensions_(model: Any, free: Axes) -> None:
    """Give dynamic dimensions their names, which the exporter does not if there are numbers among args."""
    (ir,) = require("onnx_ir")
    names: dict[Any, str] = {}
    for value, dims in zip(model.graph.inputs, free, strict=False):
        for dim, name in dims.items():
            if name:
                names.setdefault(value.shape[dim].value, name)

    def renamed(size: Any) -> Any:
        if isinstance(size, int) or not size.value:
            return size
        # A symbol, or a formula of some.
        return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)

    computed = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *computed):
        if value.shape is not None:  # a new one: some cannot be changed
            value.shape = ir.Shape(map(renamed, value.shape))


def _name_initializers_(model: Any, frozen: fx.GraphModule) -> None:
    """Give a matrix that the exporter folded into its transpose the name of its parameter, in place."""
    parameters, stored_by_name = dict(frozen.named_parameters()), dict(model.graph.initializers)
    missing = {
        name: array(parameter)
        for name, parameter in parameters.items()
        if name not in stored_by_name and parameter.ndim == 2
    }
    for value in [value for name, value in stored_by_name.items() if name not in parameters]:
        stored = value.const_value.numpy()
        for name, parameter in missing.items():
            if np.array_equal(stored, parameter.T):
                value.name = name
                del missing[name]
                break


def _folded(model: Any, frozen: fx.GraphModule) -> list[str]:
    """Initializers under the names of parameters that are no longer theirs."""
    stored = model.graph.initializers
    return [
        name
        for name, parameter in frozen.named_parameters()
        if name in stored and not np.array_equal(stored[name].const_value.numpy(), array(parameter))
    ]


def _name_outputs_(model: Any, output_names: Sequence[str]) -> None:
    """Have no name stand for two tensors, in place: the exporter names an output that is an input so."""
    if len(output_names) > len(model.graph.outputs):
        raise ValueError(
            f"output_names must name {len(model.graph.outputs)} outputs at most, got "
            f"{', '.join(output_names)}."
        )
    given = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for value in model.graph.outputs[len(output_names) :]:
        if value.name in given and not (value.is_graph_input() or value.is_initializer()):
            value.name = f"{value.name}_output"
    computed = [value.name for node in model.graph for value in node.outputs]
    named = Counter([*(value.name for value in model.graph.inputs), *model.graph.initializers, *computed])
    if twice := [name for name, count in named.items() if name and count > 1]:
        raise ValueError(
            f"input_names and output_names must be none of the names in the graph, got {', '.join(twice)}."
        )


def _drop_stack_traces_(model: Any) -> None:
    """The paths and source lines of the exporting machine have no place in a deployed file, in place."""
    for node in model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


_one_exporter = threading.Lock()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without what torch.onnx says about itself: each message here was seen with torch 2.13.

    One thread at a time: these are settings of the process, and so are some of the exporter's own.
    """
    with _one_exporter:
        loggers = [
            logging.getLogger(name)
            for name in (
                "torch.onnx._internal.exporter._registration",  # "torchvision is not installed. Skipping ..."
                "torch.onnx._internal.exporter._compat",  # an opset that it cannot convert to, with traceback
                "onnxscript.version_converter",
                "onnxscript.version_converter._version_converter",
            )
        ]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                # The exporter uses what torch.utils._pytree has deprecated.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                # Several inputs with one name for a dimension share it, which is meant.
                warnings.filterwarnings("ignore", message="# The axis name: .* will not be used")
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

"""Export to ONNX, frozen and verified. The only file that imports onnx and onnxruntime.

``export`` freezes, so that the file has the nodes of the same model without spectral norm, and lets a
file stand at its path only after ``verify`` has passed.
"""

import contextlib
import copy
import dataclasses
import glob
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from specnorm_fx.atomic import replaced
from specnorm_fx.freeze import freeze
from specnorm_fx.graph_module import SpectralNormGraphModule, resolve
from specnorm_fx.passes import unroute_
from specnorm_fx.report import sigmas

__all__ = ["Verification", "VerificationError", "export", "inputs_of", "verify"]

Args: TypeAlias = "Tensor | tuple[Any, ...]"
# Of each tensor among the inputs: its dynamic dimensions, with their names where they have one.
Axes: TypeAlias = "list[dict[int, str | None]]"

# What `export` writes; bf16 has a Conv from this opset on.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
BF16_OPSET = 22

# How far outputs may be apart, by what the file computes in. Machine epsilons: a sum of n products in
# another order differs by about sqrt(n) of them, and layers add up. In half precision the operators add in
# fp32, and what is left is rounding between layers. int8 has no such bound: see docs/design.md.
LIMITS = {
    "fp64": 128 * torch.finfo(torch.float64).eps,
    "fp32": 128 * torch.finfo(torch.float32).eps,
    "fp16": 16 * torch.finfo(torch.float16).eps,
    "bf16": 16 * torch.finfo(torch.bfloat16).eps,
    "int8": 0.1,
}

# Weights above this size stand in a file of their own: a protobuf ends at 2 GiB.
EXTERNAL_ABOVE = 1.5 * 2**30


class VerificationError(RuntimeError):
    """An ONNX file does not compute what the model computes."""


@dataclass(frozen=True)
class Verification:
    """A file that agrees with its model.

    Attributes:
        path: The file.
        precision: What it computes in: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, or ``"fp64"`` in
            files that others wrote.
        evaluator: What ran it: ``"ONNX Runtime"``, or ``"onnx's reference evaluator"``.
        batches: On how many batches it was compared.
        max_abs_error: The largest difference of any output value.
        max_rel_error: The largest difference relative to the size of its output, see `verify`.
        rtol: What ``max_rel_error`` was held to.
        histogram: How many output values have a relative error of ``"0"``, from ``"1e-08"`` up to 1e-07,
            from ``"1e-07"`` up to 1e-06, and so on.
        nodes: How many nodes of each operator the graph has.
    """

    path: Path
    precision: str
    evaluator: str
    batches: int
    max_abs_error: float
    max_rel_error: float
    rtol: float
    histogram: dict[str, int]
    nodes: dict[str, int]

    def __str__(self) -> str:
        nodes = ", ".join(f"{count} {name}" for name, count in sorted(self.nodes.items()))
        return (
            f"{self.path}: {nodes}\n"
            f"agrees with the model on {self.batches} batches: max abs error {self.max_abs_error:.2e}, "
            f"max relative error {self.max_rel_error:.2e} (limit {self.rtol:.2e}, {self.precision}, "
            f"{self.evaluator})"
        )

    def to_json(self) -> str:
        """All attributes as a JSON object."""
        return json.dumps(dataclasses.asdict(self) | {"path": str(self.path)})


def export(
    model: nn.Module,
    args: Args,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
    axes: Mapping[str, Mapping[int, str | None]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    precision: str = "fp32",
    calibration: Iterable[Args] | None = None,
    external_data: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    n_batches: int = 3,
    rtol: float | None = None,
) -> Verification:
    """Write a transformed model to an ONNX file, its weights frozen, and verify the file.

    The graph has the nodes of the same model without spectral norm, and initializers have the
    parameters' names (a matrix that the exporter stores transposed for MatMul, too). Floating inputs and
    outputs are fp32 whatever the precision and the model's dtype, so that the same feeds work. The file
    appears at ``path`` only when it has passed `verify` on random batches of the shapes of ``args``, of
    other sizes as well where a dimension is dynamic; integer inputs are drawn from the values in ``args``.

    Its ``metadata_props`` have, under keys with the prefix ``specnorm_fx.``: ``version``, ``opset``,
    ``precision``, ``sigmas`` (a JSON object, by FQN), ``max_rel_error``, and what ``metadata`` adds. The
    same input gives the same bytes, on the same machine with the same number of threads.

    Args:
        model: A transformed model in eval mode, or what `specnorm_fx.freeze` made of one (no ``sigmas``).
        args: Example inputs: one tensor, or a tuple of positional arguments.
        path: The file to write; an existing one is replaced.
        dynamic_batch: The first dimension of every input tensor is free, under the name ``batch``.
        dynamic_shapes: Instead of ``dynamic_batch`` and ``axes``: as in ``torch.export.export``.
        axes: Dynamic dimensions by the name of the input, ``{"x": {0: "batch", 2: "height"}}``. One name
            is one size. None as the name leaves it to the exporter.
        input_names: Names of the graph's inputs; by default those of the forward's arguments.
        output_names: Names of its outputs.
        opset_version: The ONNX opset; by default the exporter's, and at least 22 for bf16.
        precision: ``"fp32"``; ``"fp16"`` or ``"bf16"``: weights and everything between inputs and
            outputs (ONNX Runtime has no bf16 on the CPU: such a file is for other devices, and verified
            by onnx's reference evaluator); ``"int8"``: ONNX Runtime's static quantization, weights
            per channel, as QuantizeLinear and DequantizeLinear around the operators.
        calibration: For int8, required: batches like ``args`` of real data, which decide on the ranges
            of activations. The file is verified on the first ``n_batches`` of them.
        external_data: Whether the weights go into a file beside ``path``, ``<path>.<hash>.data``; by
            default above 1.5 GiB. Such files of an older export to ``path`` are removed.
        metadata: More of it, such as ``{"source_checkpoint_sha256": ...}``.
        n_batches: How many random batches to verify on.
        rtol: As in `verify`.

    Returns:
        What was compared, and the nodes written.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        TypeError: ``model`` holds no transformed model.
        ValueError: Options that exclude each other, or are missing; ``args`` hold no tensor, ``axes`` name
            none or one that the model fixes, or the exporter cannot write this opset.
        RuntimeError: It is in training mode, or torch's exporter fails on it.
        OSError: ``path`` cannot be written.
        VerificationError: The file does not agree with the model; none is left behind.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    args = args if isinstance(args, tuple) else (args,)
    _refuse_training(model)
    gm = resolve(model)
    names = _tensor_names(gm, args, input_names)
    if dynamic_shapes is not None and (dynamic_batch or axes is not None):
        raise ValueError("export takes dynamic_batch and axes, or dynamic_shapes, not both.")
    free = _axes(args, names, axes or {}, dynamic_batch)
    batches = _calibration_batches(precision, calibration, names)
    own = {"version": _version(), "precision": precision}
    if taken := sorted(set(metadata or {}) & {*own, "opset", "sigmas", "max_rel_error"}):
        raise ValueError(f"metadata must have other keys than the file's own, got {', '.join(taken)}.")
    frozen = freeze(gm) if gm.sites() else copy.deepcopy(gm)
    size = sum(parameter.nbytes for parameter in frozen.parameters())
    if external_data is False and size > EXTERNAL_ABOVE:
        raise ValueError(
            f"external_data must be None or True above {EXTERNAL_ABOVE / 2**30} GiB, got {size / 2**30:.1f} "
            f"GiB of weights: an ONNX file by itself ends at 2 GiB."
        )

    target = Path(path)
    with replaced(target) as written:
        opset = _write(
            frozen,
            args,
            written,
            precision=precision,
            calibration=batches,
            opset_version=opset_version,
            external_data=size > EXTERNAL_ABOVE if external_data is None else external_data,
            free=free,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
        )
        data = _name_data_by_content(written)
        try:
            verification = verify(
                written, gm, batches[:n_batches] or _random_batches(args, free, n_batches), rtol=rtol
            )
        except VerificationError as error:
            message = str(error).replace(str(written), str(target))
            remedy = " Calibrate on more data, or give a larger rtol." if precision == "int8" else ""
            raise VerificationError(f"{message}{remedy} No file was written.") from error
        own |= {"opset": str(opset), "max_rel_error": f"{verification.max_rel_error:.2e}"}
        if gm.sites():
            own["sigmas"] = json.dumps({fqn: float(sigma) for fqn, sigma in sigmas(gm).items()})
        _append_metadata(written, own | dict(metadata or {}))
    _remove_older_data(target, data)
    return dataclasses.replace(verification, path=target)


def _version() -> str:
    """That of this library, "unknown" where it runs from a source tree that nobody installed."""
    try:
        return importlib.metadata.version("specnorm-fx")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def verify(
    path: str | os.PathLike[str],
    model: nn.Module,
    inputs: "Args | Sequence[Args]",
    *,
    rtol: float | None = None,
    structure: bool = False,
) -> Verification:
    """Hold an ONNX file against a model: ``onnx.checker``, then ONNX Runtime against eager outputs.

    Differences are relative to the size of the output: its largest value in the batch, or, where that
    is what is left of larger terms (a score near zero), what those terms are, as measured by how far the
    output moves when all parameters and inputs do.

    Args:
        path: The file. One that computes in bf16 is run by onnx's reference evaluator, which is slow,
            as ONNX Runtime has no bf16 on the CPU.
        model: Any module in eval mode, transformed or not.
        inputs: One batch (a tensor, or a tuple of positional arguments) or a list of them. Floating
            tensors are fed in the dtype that the file takes.
        rtol: The largest relative difference allowed; by default 128 machine epsilons of fp32 (1.5e-5), or
            16 of fp16 (1.6e-2) or bf16 (0.12), of the coarser of file and output; 0.1 for int8; and
            none for integer outputs.
        structure: Hold the operators against the same model without spectral norm, exported in the
            same precision and opset (for int8 with ``inputs`` as calibration), too.

    Returns:
        The largest differences found.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        FileNotFoundError: There is no such file.
        TypeError: ``structure``, and ``model`` holds no transformed model.
        ValueError: ``inputs`` is empty.
        RuntimeError: ``model`` is in training mode.
        VerificationError: The file is no valid ONNX, its inputs, outputs or operators are others, or a
            value differs by more than ``rtol``; the message has the figures.
    """
    (onnx,) = _require("onnx")
    _refuse_training(model)
    batches = [b if isinstance(b, tuple) else (b,) for b in _as_list(inputs)]
    if not batches:
        raise ValueError("inputs must hold at least one batch.")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no ONNX file {path}.")
    try:
        onnx.checker.check_model(path, full_check=True)
        proto = onnx.load(path, load_external_data=False)
        precision = _precision(proto.graph)
        evaluator, run = _evaluator(path, precision)
    except Exception as error:  # both libraries raise types of their own, directly under Exception
        raise VerificationError(f"{path} is not a valid ONNX model: {error}") from error

    worst_abs = worst_rel = limit = 0.0
    histogram: Counter[str] = Counter()
    for number, batch in enumerate(batches):
        outputs = _run(run, path, evaluator, _feeds(path, proto.graph, batch))
        expected = _outputs(model, batch)
        if len(outputs) != len(expected):
            raise VerificationError(f"{path} has {len(outputs)} outputs, and the model has {len(expected)}.")
        for output, (got, want) in enumerate(zip(outputs, expected, strict=True)):
            errors = _errors(path, got, want)
            size = float(want.double().abs().max()) if want.numel() else 0.0
            limit = _limit(want.dtype, precision) if rtol is None else rtol
            abs_error = float(errors.max(initial=0.0))
            if not abs_error <= limit * size and want.is_floating_point():
                size = max(size, _size_of_terms(model, batch, output))
            relative = errors / size if size else errors
            rel_error = float(relative.max(initial=0.0))
            # Written so that NaN fails.
            if not rel_error <= limit:
                raise VerificationError(
                    f"{path} disagrees with {type(model).__name__} on batch {number}, output {output}: max "
                    f"abs error {abs_error:.3e}, max relative error {rel_error:.3e}, limit {limit:.3e}."
                )
            worst_abs, worst_rel = max(worst_abs, abs_error), max(worst_rel, rel_error)
            histogram.update(_decades(relative))
    nodes = _operators(proto)
    if structure:
        _hold_structure(path, proto, resolve(model), batches, precision)
    return Verification(
        path,
        precision,
        evaluator,
        len(batches),
        worst_abs,
        worst_rel,
        limit,
        dict(sorted(histogram.items(), key=lambda item: float(item[0]))),
        dict(nodes),
    )


# --- Writing ---


def _write(
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
) -> int:
    """Write a model without spectral norm, which is the caller's to change, and give the opset."""
    if precision == "bf16":
        if opset_version is not None and opset_version < BF16_OPSET:
            raise ValueError(
                f"opset_version must be at least {BF16_OPSET} for bf16, the first with a Conv for it, got "
                f"{opset_version}."
            )
        opset_version = opset_version or BF16_OPSET
    _convert_(model, args, DTYPES[precision])
    as_fp32 = pytree.tree_map(_to(torch.float32), args)
    try:
        with _quiet_exporter():
            program: Any = torch.onnx.export(
                model,
                as_fp32,
                dynamo=True,
                verbose=False,
                dynamic_shapes=_as_dims(args, free) if any(free) else dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                opset_version=opset_version,
            )
    except torch.onnx.OnnxExporterError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise RuntimeError(
            f"{type(model).__name__} cannot be written by the exporter of torch {torch.__version__}: {why}"
        ) from error
    # The exporter fixes a dimension that the model does not leave free, without a word.
    for value, dims in zip(program.model.graph.inputs, free, strict=False):
        if fixed := [dim for dim in dims if isinstance(value.shape[dim], int)]:
            raise ValueError(
                f"Dynamic dimensions must be free in the model, and dimension {fixed[0]} of {value.name!r} "
                f"is always {value.shape[fixed[0]]} there. Leave it out of axes and dynamic_batch."
            )
    written_opset: int = program.model.opset_imports[""]
    # The exporter only logs that it has kept its own opset.
    if opset_version not in (None, written_opset):
        raise ValueError(
            f"opset_version={opset_version} cannot be had for this model: the exporter of torch "
            f"{torch.__version__} writes opset {written_opset}. Leave it out, or try one nearer to that."
        )
    if precision == "bf16":
        _round_folded_(program.model)
    _name_initializers_(program.model, model)
    _drop_stack_traces_(program.model)
    if precision != "int8":
        program.save(written, external_data=external_data)
        return written_opset
    with tempfile.TemporaryDirectory(dir=written.parent) as folder:
        written_whole = Path(folder, written.name)
        program.save(written_whole, external_data=external_data)
        _quantize(written_whole, written, calibration, external_data)
    return written_opset


def _convert_(model: fx.GraphModule, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Compute in a dtype between fp32 inputs and fp32 outputs, in place."""
    floating = [
        t.dtype for t in (*model.parameters(), *model.buffers(), *_tensors(args)) if t.is_floating_point()
    ]
    if {*floating, dtype} == {torch.float32}:
        return
    model.to(dtype)
    graph = model.graph
    for node in graph.find_nodes(op="placeholder"):
        users = list(node.users)
        with graph.inserting_after(node):
            converted = graph.call_function(_converted, (node, dtype))
        for user in users:
            user.replace_input_with(node, converted)
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        output.args = fx.map_arg(
            output.args, lambda node: graph.call_function(_converted, (node, torch.float32))
        )
    model.recompile()


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(_to(dtype), value)


def _to(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


class _Reader:
    """Calibration data as onnxruntime.quantization asks for it."""

    def __init__(self, feeds: Iterable[dict[str, np.ndarray]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def _quantize(source: Path, written: Path, calibration: list[tuple[Any, ...]], external_data: bool) -> None:
    onnx, quantization = _require("onnx", "onnxruntime.quantization")
    graph = onnx.load(source, load_external_data=False).graph
    reader = _Reader(_feeds(source, graph, batch) for batch in calibration)
    with _quiet_quantizer():
        try:
            quantization.quantize_static(
                source, written, reader, per_channel=True, use_external_data_format=external_data
            )
        except Exception as error:  # onnxruntime raises types of its own, directly under Exception
            raise ValueError(f"calibration must hold batches of the shapes of args: {error}") from error


def _calibration_batches(
    precision: str, calibration: Iterable[Args] | None, names: list[str]
) -> list[tuple[Any, ...]]:
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}.")
    if (precision == "int8") != (calibration is not None):
        raise ValueError(
            "calibration must be given for precision='int8', and for no other: batches of real data, which "
            "decide on the ranges of activations."
        )
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in calibration or ()]
    if calibration is not None and not batches:
        raise ValueError("calibration must hold at least one batch, got none.")
    for number, batch in enumerate(batches):
        if len(_tensors(batch)) != len(names):
            raise ValueError(
                f"calibration must hold batches like args ({', '.join(names)}), got "
                f"{len(_tensors(batch))} tensors in batch {number}."
            )
    return batches


def _append_metadata(written: Path, metadata: Mapping[str, str]) -> None:
    """Protobufs that stand one after the other are merged when read: what was verified stays as it is."""
    (onnx,) = _require("onnx")
    props = [
        onnx.StringStringEntryProto(key=f"specnorm_fx.{key}", value=value) for key, value in metadata.items()
    ]
    with written.open("ab") as file:
        file.write(onnx.ModelProto(metadata_props=props).SerializeToString(deterministic=True))


# --- Inputs and their dimensions ---


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tensor_names(model: nn.Module, args: tuple[Any, ...], input_names: Sequence[str] | None) -> list[str]:
    """The names that the input tensors have in the file."""
    leaves: Any = pytree.tree_flatten_with_path(args)[0]
    tensors = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError("args must hold at least one tensor, the example input.")
    parameters = list(inspect.signature(model.forward).parameters)
    names = []
    for (position, *inner), _ in tensors:
        name = parameters[position.idx] if position.idx < len(parameters) else f"args_{position.idx}"
        names.append("_".join([name, *(str(getattr(key, "idx", getattr(key, "key", key))) for key in inner)]))
    return [*(input_names or ()), *names[len(input_names or ()) :]]


def _axes(
    args: tuple[Any, ...],
    names: list[str],
    axes: Mapping[str, Mapping[int, str | None]],
    dynamic_batch: bool,
) -> Axes:
    """The dynamic dimensions of each input tensor."""
    if unknown := sorted(set(axes) - set(names)):
        raise ValueError(f"axes must name inputs ({', '.join(names)}), got {', '.join(unknown)}.")
    free: Axes = []
    for name, tensor in zip(names, _tensors(args), strict=True):
        dims: dict[int, str | None] = {0: "batch"} if dynamic_batch and tensor.ndim else {}
        for dim, label in axes.get(name, {}).items():
            if not 0 <= dim < tensor.ndim:
                raise ValueError(
                    f"axes[{name!r}] must name dimensions from 0 to {tensor.ndim - 1}, got {dim}."
                )
            if label is not None and not label.isidentifier():
                raise ValueError(f"axes[{name!r}][{dim}] must be a Python identifier or None, got {label!r}.")
            dims[dim] = label
        free.append(dims)
    return free


def _as_dims(args: tuple[Any, ...], free: Axes) -> Any:
    """The dynamic dimensions as ``torch.export.export`` takes them."""
    each = iter(free)

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        dynamic: Any = torch.export.Dim.DYNAMIC
        return {dim: torch.export.Dim(name) if name else dynamic for dim, name in next(each).items()}

    return pytree.tree_map(of_leaf, args)


def _random_batches(args: tuple[Any, ...], free: Axes, n_batches: int) -> list[tuple[Any, ...]]:
    """Batches like ``args``: dimensions of one name grow together, a first dimension from 1 on."""
    generator = torch.Generator().manual_seed(0)
    # Without a name, dimensions of one size may have to be the same.
    keyed = [
        {dim: name or str(tensor.shape[dim]) for dim, name in dims.items()}
        for tensor, dims in zip(_tensors(args), free, strict=True)
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


# --- Comparing ---


def _precision(graph: Any) -> str:
    """What a file computes in."""
    (onnx,) = _require("onnx")
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        return "int8"
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in graph.input}
    coarsest_first = {"BFLOAT16": "bf16", "FLOAT16": "fp16", "FLOAT": "fp32", "DOUBLE": "fp64"}
    found = (
        name for type_, name in coarsest_first.items() if onnx.TensorProto.DataType.Value(type_) in types
    )
    return next(found, "fp32")


def _limit(dtype: torch.dtype, precision: str) -> float:
    if not dtype.is_floating_point:
        return 0.0
    of_output = {torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")
    return max(LIMITS[precision], LIMITS[of_output])


def _evaluator(path: Path, precision: str) -> tuple[str, Callable[..., Any]]:
    """The name of what runs a file, and its function."""
    if precision == "bf16":
        (reference,) = _require("onnx.reference")
        return "onnx's reference evaluator", reference.ReferenceEvaluator(str(path)).run
    (onnxruntime,) = _require("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return "ONNX Runtime", session.run


def _feeds(path: Path, graph: Any, batch: tuple[Any, ...]) -> dict[str, np.ndarray]:
    (onnx,) = _require("onnx")
    weights = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in weights]
    tensors = _tensors(batch)
    if len(values) != len(tensors):
        raise VerificationError(
            f"{path} takes {len(values)} inputs ({', '.join(value.name for value in values)}), and the batch "
            f"has {len(tensors)}."
        )
    feeds = {}
    for value, tensor in zip(values, tensors, strict=True):
        array = _array(tensor)
        if tensor.is_floating_point():
            array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        feeds[value.name] = array
    return feeds


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _run(
    run: Callable[..., Any], path: Path, evaluator: str, feeds: dict[str, np.ndarray]
) -> list[np.ndarray]:
    try:
        outputs: list[np.ndarray] = run(None, feeds)
    except Exception as error:  # onnxruntime raises types of its own, directly under Exception
        raise VerificationError(f"{evaluator} cannot run {path}: {error}") from error
    return outputs


@torch.no_grad()
def _outputs(model: Callable[..., Any], batch: tuple[Any, ...]) -> list[Tensor]:
    return [tensor.cpu() for tensor in _tensors(model(*batch))]


def _errors(path: Path, got: np.ndarray, want: Tensor) -> np.ndarray:
    if got.shape != tuple(want.shape):
        raise VerificationError(
            f"{path} gives an output of shape {got.shape}, and the model {tuple(want.shape)}."
        )
    errors: np.ndarray = np.abs(got.astype(np.float64) - _array(want).astype(np.float64))
    return errors


def _size_of_terms(model: nn.Module, batch: tuple[Any, ...], output: int) -> float:
    """How far an output moves, at most, over how far all parameters and inputs do, at random.

    Rounding moves it by as many epsilons of that: for a sum of terms that cancel, their size.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    floating = [t.dtype for t in (*parameters.values(), *_tensors(batch)) if t.is_floating_point()]
    step = max((torch.finfo(dtype).eps for dtype in floating), default=0.0) ** 0.5

    def moved(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        sign = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
        return x.detach() * (1 + step * sign)

    def run(*inputs: Any) -> Any:
        at = {name: moved(parameter) for name, parameter in parameters.items()}
        return torch.func.functional_call(model, at, inputs)

    here = _outputs(model, batch)[output].double()
    there = [_outputs(run, pytree.tree_map(moved, batch))[output].double() for _ in range(8)]
    return max(float((t - here).abs().max()) for t in there) / step if step and here.numel() else 0.0


def _decades(relative: np.ndarray) -> dict[str, int]:
    positive = relative[relative > 0]
    exponents, counts = np.unique(np.floor(np.log10(positive)).astype(int), return_counts=True)
    decades = {f"1e{exponent:+03d}": int(n) for exponent, n in zip(exponents, counts, strict=True)}
    return {"0": relative.size - positive.size} | decades


def _operators(proto: Any) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def _hold_structure(
    path: Path,
    proto: Any,
    gm: SpectralNormGraphModule,
    batches: list[tuple[Any, ...]],
    precision: str,
) -> None:
    """Refuse a file with other operators than the same model without spectral norm."""
    (onnx,) = _require("onnx")
    plain = copy.deepcopy(gm)
    unroute_(plain)
    free: Axes = []
    for value in proto.graph.input:
        dims = enumerate(value.type.tensor_type.shape.dim)
        names = {i: dim.dim_param for i, dim in dims if not dim.HasField("dim_value")}
        free.append({i: name if name.isidentifier() else None for i, name in names.items()})
    with tempfile.TemporaryDirectory() as folder:
        _write(
            plain,
            batches[0],
            Path(folder, "plain.onnx"),
            precision=precision,
            calibration=batches if precision == "int8" else [],
            opset_version=next(entry.version for entry in proto.opset_import if not entry.domain),
            external_data=sum(parameter.nbytes for parameter in plain.parameters()) > EXTERNAL_ABOVE,
            free=free,
        )
        want = _operators(onnx.load(Path(folder, "plain.onnx"), load_external_data=False))
    got = _operators(proto)
    if got != want:
        differences = [
            f"{got[name]} {name} for {want[name]}" for name in sorted(got | want) if got[name] != want[name]
        ]
        raise VerificationError(
            f"{path} has other operators than the same model without spectral norm: {', '.join(differences)}."
        )


def _round_folded_(model: Any) -> None:
    """To bf16 what the exporter has folded in fp32: batch norm into the weights of a Conv, in place."""
    (ir,) = _require("onnx_ir")
    for node in model.graph:
        kinds = {value.dtype for value in node.inputs if value is not None}
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and ir.DataType.BFLOAT16 in kinds:
            for value in node.inputs:
                if value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT:
                    rounded = value.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy())
                    value.const_value = ir.tensor(rounded, name=value.name)
                    value.dtype = ir.DataType.BFLOAT16


def _name_initializers_(model: Any, frozen: fx.GraphModule) -> None:
    """Give a matrix that the exporter folded into its transpose the name of its parameter, in place."""
    taken = set(model.graph.initializers)
    missing = {
        name: _array(parameter)
        for name, parameter in frozen.named_parameters()
        if name not in taken and parameter.ndim == 2
    }
    for value in list(model.graph.initializers.values()):
        array = value.const_value.numpy()
        for name, parameter in missing.items():
            if array.shape == parameter.shape[::-1] and np.array_equal(array, parameter.T):
                value.name = name
                del missing[name]
                break


def _drop_stack_traces_(model: Any) -> None:
    """The paths and source lines of the exporting machine have no place in a deployed file, in place."""
    for node in model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _name_data_by_content(written: Path) -> str | None:
    """Name the file of the weights, if there is one, by what is in it.

    Two files cannot be replaced in one step. By a fixed name, an export killed between the two would leave
    the old graph with the new weights.

    Args:
        written: The file of the graph.

    Returns:
        The name.
    """
    data = written.with_name(f"{written.name}.data")
    if not data.exists():
        return None
    (onnx,) = _require("onnx")
    digest = hashlib.sha256()
    with data.open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    name = f"{written.name}.{digest.hexdigest()[:16]}.data"
    proto = onnx.load(written, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(proto, written)
    data.rename(data.with_name(name))
    return name


def _remove_older_data(target: Path, current: str | None) -> None:
    """The weights of the graphs that have stood at ``target`` before."""
    for file in target.parent.glob(f"{glob.escape(target.name)}.{'[0-9a-f]' * 16}.data"):
        if file.name != current:
            file.unlink()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without what torch.onnx says about itself: each message here was seen with torch 2.13."""
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


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Without the advice that onnxruntime.quantization gives through the root logger."""
    root, silent = logging.getLogger(), logging.NullHandler()
    level = logging.root.manager.disable
    root.addHandler(silent)  # logging.warning() would configure a root logger that has no handler
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        root.removeHandler(silent)


def _refuse_training(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise RuntimeError(
            f"{type(model).__name__} is in training mode, and the file would hold what one training step "
            f"computes. Call .eval() first."
        )


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
    (onnx,) = _require("onnx")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no ONNX file {path}.")
    try:
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # types of its own, and those of protobuf, directly under Exception
        raise ValueError(f"{path} is not a valid ONNX model: {error}") from error
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = {}
    for value in graph.input:
        if value.name not in initializers:
            tensor = value.type.tensor_type
            sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
            inputs[value.name] = (sizes, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    return inputs


def _as_list(inputs: Any) -> list[Any]:
    return list(inputs) if isinstance(inputs, list) else [inputs]


def _require(*names: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ImportError(f"specnorm_fx.onnx needs {error.name}: pip install 'specnorm-fx[onnx]'.") from error


class Weight(NamedTuple):
    """A weight in an ONNX file.

    Attributes:
        name: That of its initializer.
        values: On the CPU; of an int8 weight what it stands for, in fp32.
        dim: Which dimension is the output's.
    """

    name: str
    values: Tensor
    dim: int


# Which dimension of the weight is the output's, by the operator that takes it as its second input.
OUTPUT_DIMS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}


def weights_of(path: str | os.PathLike[str]) -> tuple[list[Weight], dict[str, str]]:
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
    (onnx,) = _require("onnx")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no ONNX file {path}.")
    try:
        model = onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # protobuf's own types, and those of onnx
        raise ValueError(f"{path} is damaged or no ONNX file: {error}") from error
    if not model.graph.node:
        raise ValueError(f"{path} is damaged or no ONNX file: it has no nodes.")
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, Weight] = {}
    for node in model.graph.node:
        place, dim = (0, 0) if node.op_type == "Gather" else (1, OUTPUT_DIMS.get(node.op_type))
        if node.op_type == "Gemm":
            dim = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
        name = node.input[place] if len(node.input) > place else ""
        sources = [name] if name not in dequantized else list(dequantized[name].input)
        if dim is None or name in found or not all(source in initializers for source in sources):
            continue
        arrays = [onnx.numpy_helper.to_array(initializers[source]) for source in sources]
        if arrays[0].ndim < 2:
            continue
        if name in dequantized:
            # ONNX Runtime's quantizer appends this to the name.
            fqn = sources[0].removesuffix("_quantized")
            found[name] = Weight(fqn, _dequantized(dequantized[name], *arrays), dim)
        elif arrays[0].dtype.kind in "fc":
            found[name] = Weight(name, torch.from_numpy(arrays[0].copy()), dim)
        elif initializers[name].data_type == onnx.TensorProto.BFLOAT16:
            values = torch.from_numpy(arrays[0].astype(np.float32))  # numpy has no bf16 of its own
            found[name] = Weight(name, values.to(torch.bfloat16), dim)
    return list(found.values()), {entry.key: entry.value for entry in model.metadata_props}


def _dequantized(
    node: Any, quantized: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None
) -> Tensor:
    """What a DequantizeLinear makes of a weight: one scale, or one for each place along its axis."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [1] * quantized.ndim
    if scale.ndim:
        shape[axis] = scale.size
    shifted = quantized.astype(np.float32)
    if zero is not None:
        shifted -= zero.astype(np.float32).reshape(shape)
    return torch.from_numpy(shifted * scale.astype(np.float32).reshape(shape))

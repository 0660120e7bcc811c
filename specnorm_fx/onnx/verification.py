"""An ONNX file held against its model: ``onnx.checker``, values, operators."""

import copy
import dataclasses
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specnorm_fx.graph_module import resolve
from specnorm_fx.onnx.batches import (
    Args,
    Axes,
    array,
    as_batch,
    feeds,
    in_order_of,
    inputs_in_order,
    names_by_key,
    tensors,
)
from specnorm_fx.onnx.external_data import is_external
from specnorm_fx.onnx.extra import require
from specnorm_fx.onnx.reading import graph_inputs, operators, precision_of, read_checked
from specnorm_fx.onnx.writing import write
from specnorm_fx.passes import unroute_

__all__ = ["Verification", "VerificationError", "refuse_training", "verify"]

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
        rtol: What ``max_rel_error`` was held to; of several outputs the largest.
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
            tensors are fed in the dtype that the file takes; those of a dict by the names that `export` gives
            inputs, where the file has these, and all else in the order of the inputs.
        rtol: The largest relative difference allowed; by default 128 machine epsilons of fp32 (1.5e-5), or
            16 of fp16 (1.6e-2) or bf16 (0.12), of the coarsest of file, output and the model's parameters;
            0.1 for int8; and none for integer outputs.
        structure: Hold the operators against the same model without spectral norm, exported in the
            same precision and opset (for int8 with ``inputs`` as calibration), too.

    Returns:
        The largest differences found.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        FileNotFoundError: There is no such file.
        TypeError: ``structure``, and ``model`` holds no transformed model.
        ValueError: ``inputs`` is empty, or ``rtol`` is no number from 0 on.
        RuntimeError: ``model`` is in training mode.
        VerificationError: The file is no valid ONNX, its inputs, outputs or operators are others, or a
            value differs by more than ``rtol``; the message has the figures. NaN and inf must be where the
            model has them; a model that gives nothing but NaN, or no value (a batch of zero), is an
            error.
    """
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol must be 0 or larger, got {rtol}.")
    refuse_training(model)
    listed: list[Any] = inputs if isinstance(inputs, list) else [inputs]
    batches = [as_batch(batch) for batch in listed]
    if not batches:
        raise ValueError("inputs must hold at least one batch.")
    file = _File(Path(path))
    compared = [
        one for number, batch in enumerate(batches) for one in _compare(file, model, batch, number, rtol)
    ]
    if all(difference.says_nothing for difference in compared):
        raise VerificationError(
            f"{type(model).__name__} gives nothing but NaN on these inputs, or no value at all, so that "
            f"{file.path} cannot be held against it."
        )
    histogram: Counter[str] = Counter()
    for difference in compared:
        histogram.update(difference.decades)
    if structure:
        _hold_structure(file, model, batches)
    return Verification(
        file.path,
        file.precision,
        file.evaluator,
        len(batches),
        max(difference.absolute for difference in compared),
        max(difference.relative for difference in compared),
        max(difference.limit for difference in compared),
        dict(sorted(histogram.items(), key=lambda item: float(item[0]))),
        dict(operators(file.proto)),
    )


def refuse_training(model: nn.Module) -> None:
    """A file has no training mode to be held against.

    Args:
        model: Any module.

    Raises:
        RuntimeError: A module in it is in training mode.
    """
    if any(module.training for module in model.modules()):
        raise RuntimeError(
            f"{type(model).__name__} is in training mode, and the file would hold what one training step "
            f"computes. Call .eval() first."
        )


# --- Values ---


class _File:
    """A valid ONNX file, and what runs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.proto = read_checked(path)
        except ValueError as error:
            raise VerificationError(str(error)) from error
        self.precision = precision_of(self.proto.graph)
        self.evaluator = "ONNX Runtime" if self.precision != "bf16" else "onnx's reference evaluator"
        onnxruntime, reference = require("onnxruntime", "onnx.reference")
        try:
            if self.precision == "bf16":
                self.run = reference.ReferenceEvaluator(str(path)).run
            else:
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 4  # what it logs on stderr is in its exceptions, too
                self.run = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run
        except Exception as error:  # both libraries raise types of their own, directly under Exception
            raise VerificationError(f"{path} is not a valid ONNX model: {error}") from error

    def outputs(self, batch: tuple[Any, ...], names: Sequence[str] = ()) -> list[np.ndarray]:
        inputs, given = graph_inputs(self.proto.graph), len(tensors(batch))
        if len(inputs) != given:
            raise VerificationError(
                f"{self.path} takes {len(inputs)} inputs ({', '.join(value.name for value in inputs)}), and "
                f"the batch has {given}."
            )
        try:
            outputs: list[np.ndarray] = self.run(None, feeds(inputs, batch, names))
        except Exception as error:  # as above
            raise VerificationError(f"{self.evaluator} cannot run {self.path}: {error}") from error
        return outputs


class _Difference(NamedTuple):
    """Between a file and its model in one output."""

    absolute: float
    relative: float
    limit: float
    decades: dict[str, int]
    says_nothing: bool  # NaN everywhere, in both, or no value at all


def _compare(
    file: _File, model: nn.Module, batch: tuple[Any, ...], number: int, rtol: float | None
) -> Iterator[_Difference]:
    """The differences in the outputs for one batch; those above the limit are an error."""
    outputs, expected = file.outputs(batch, names_by_key(_unwrapped(model), batch)), _outputs(model, batch)
    remedy = ""
    if file.precision == "int8":
        remedy = (
            " int8 is right in the range of its calibration: compare on data like those, calibrate on more, "
            "or give a larger rtol."
        )
    if len(outputs) != len(expected):
        raise VerificationError(f"{file.path} has {len(outputs)} outputs, and the model has {len(expected)}.")
    for output, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        if got.shape != tuple(want.shape):
            raise VerificationError(
                f"{file.path} gives an output of shape {got.shape}, and the model {tuple(want.shape)}."
            )
        computed, exact = got.astype(np.float64), array(want).astype(np.float64)
        is_nan = np.isnan(exact)
        same = (computed == exact) | (np.isnan(computed) & is_nan)  # of inf, too
        with np.errstate(invalid="ignore"):
            errors = np.where(same, 0.0, np.abs(computed - exact))
        size = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
        limit = _limit(file.precision, want.dtype, model) if rtol is None else rtol
        absolute = float(errors.max(initial=0.0))
        if not absolute <= limit * size and want.is_floating_point():
            size = max(size, _size_of_terms(model, batch, output))
        relative = errors / size if size else errors
        largest = float(relative.max(initial=0.0))
        # Written so that NaN fails.
        if not largest <= limit:
            raise VerificationError(
                f"{file.path} disagrees with {type(model).__name__} on batch {number}, output {output}: max "
                f"abs error {absolute:.3e}, max relative error {largest:.3e}, limit {limit:.3e}.{remedy}"
            )
        yield _Difference(absolute, largest, limit, _decades(relative), bool(is_nan.all()))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model whose forward has the arguments' names, which wrappers hide."""
    try:
        return resolve(model)
    except TypeError:
        return model


@torch.no_grad()
def _outputs(model: Callable[..., Any], batch: tuple[Any, ...]) -> list[Tensor]:
    return [tensor.cpu() for tensor in tensors(model(*batch))]


def _limit(precision: str, output: torch.dtype, model: nn.Module) -> float:
    if not output.is_floating_point:
        return 0.0
    # A model in half precision may give its scores in fp32 (score.float()), and has rounded to half before.
    rounded = {output, *(x.dtype for x in model.parameters() if x.dtype in (torch.float16, torch.bfloat16))}
    names = {torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return max(LIMITS[precision], *(LIMITS[names.get(dtype, "fp32")] for dtype in rounded))


def _size_of_terms(model: nn.Module, batch: tuple[Any, ...], output: int) -> float:
    """How far an output moves, at most, over how far all parameters and inputs do, at random.

    Rounding moves it by as many epsilons of that: for a sum of terms that cancel, their size. 0 where it
    jumps (sign, rounding) and does not move less when they do: else any difference would be granted.
    """
    # functional_call takes some kinds of module as a part only: ScriptModule, DataParallel.
    whole = _Whole(model)
    parameters = dict(whole.named_parameters())
    floating = [t.dtype for t in (*parameters.values(), *tensors(batch)) if t.is_floating_point()]
    step = max((torch.finfo(dtype).eps for dtype in floating), default=0.0) ** 0.5

    here = _outputs(model, batch)[output].double()
    if not step or not here.numel():
        return 0.0

    def size_by(step: float) -> float:
        generator = torch.Generator().manual_seed(0)

        def moved(x: Any) -> Any:
            if not (isinstance(x, Tensor) and x.is_floating_point()):
                return x
            sign = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
            return x.detach() * (1 + step * sign)

        def run(*inputs: Any) -> Any:
            at = {name: moved(parameter) for name, parameter in parameters.items()}
            return torch.func.functional_call(whole, at, inputs)

        there = [_outputs(run, pytree.tree_map(moved, batch))[output].double() for _ in range(8)]
        moves = [(t - here).abs() for t in there]
        return max(float(move.where(move.isfinite(), 0).max()) for move in moves) / step

    size, nearer = size_by(step), size_by(step / 16)
    return min(size, nearer) if nearer <= 2 * size else 0.0


class _Whole(nn.Module):
    """A model as a part of another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


def _decades(relative: np.ndarray) -> dict[str, int]:
    positive = relative[relative > 0]
    exponents, counts = np.unique(np.floor(np.log10(positive)).astype(int), return_counts=True)
    decades = {f"1e{exponent:+03d}": int(n) for exponent, n in zip(exponents, counts, strict=True)}
    return {"0": relative.size - positive.size} | decades


# --- Operators ---


def _hold_structure(file: _File, model: nn.Module, batches: list[tuple[Any, ...]]) -> None:
    """Refuse a file with other operators than the same model without spectral norm."""
    (onnx,) = require("onnx")
    plain = copy.deepcopy(resolve(model))
    unroute_(plain)
    # Export has no fp64; its files in fp32 have the same operators.
    precision = "fp32" if file.precision == "fp64" else file.precision
    by_input = {}
    for value in graph_inputs(file.proto.graph):
        dims = enumerate(value.type.tensor_type.shape.dim)
        names = {i: dim.dim_param for i, dim in dims if not dim.HasField("dim_value")}
        by_input[value.name] = {i: name if name.isidentifier() else None for i, name in names.items()}
    names_given = names_by_key(resolve(model), batches[0])
    free: Axes = [by_input[name] for name in inputs_in_order(by_input, names_given)]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "plain.onnx")
        write(
            plain,
            batches[0],
            written,
            precision=precision,
            calibration=[in_order_of(batches[0], batch) for batch in batches] if precision == "int8" else [],
            opset_version=next(entry.version for entry in file.proto.opset_import if not entry.domain),
            external_data=is_external(plain),
            free=free,
        )
        want = operators(onnx.load(written, load_external_data=False))
    got = operators(file.proto)
    if got != want:
        differences = [
            f"{got[name]} {name} for {want[name]}" for name in sorted(got | want) if got[name] != want[name]
        ]
        raise VerificationError(
            f"{file.path} has other operators than the same model without spectral norm: "
            f"{', '.join(differences)}."
        )

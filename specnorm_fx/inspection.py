"""A look into a model, a checkpoint or an ONNX file: sigma and the singular values of every weight.

`specnorm_fx.report` is the look during training; this one is for whatever lies around, and also gives JSON, a
picture and a page.
"""

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from specnorm_fx import capture, reference, sharded
from specnorm_fx.adopt import find_torch_sn
from specnorm_fx.checkpoint import find_weights
from specnorm_fx.graph_module import SpectralNormGraphModule, owner_of, sites_of, transformed
from specnorm_fx.load import read_checkpoint
from specnorm_fx.onnx import weights_of
from specnorm_fx.passes import transform
from specnorm_fx.report import skipped_weights
from specnorm_fx.showing import Inspection, Row

__all__ = ["Inspection", "Row", "inspect_checkpoint", "inspect_model", "inspect_onnx"]

# All singular values take about min(m, n) times as long as one product with the weight. Of a weight with more
# rows and columns than this only the largest is computed, by power iteration.
SPECTRUM_SIZE = 2048

# Elements of a weight, if fewer are stored: a file of a few bytes may claim any number, all in one place.
LARGEST = 2**24

# What singular values can be computed of; a checkpoint may hold others, such as float8.
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
)

# How far from 1 the exact sigma of a divided weight may be before it is pointed out. One iteration a step
# leaves sigma some per cent behind.
LAG = 0.1


@torch.no_grad()
def inspect_model(model: nn.Module) -> Inspection:
    """Every weight of a model: what is normalised, or would be, and how it stands with sigma.

    Args:
        model: A transformed model, or one that holds some; else ``transform`` is tried on it, so a model with
            torch's spectral norm is shown with its own u and v. It is not changed. One that symbolic trace
            cannot follow: ``inspect_model(transform(model, example_inputs=...))``.

    Raises:
        TypeError: As ``transform``.
        ValueError: As ``transform``, but for NaN, inf and the meta device, which are shown.
        TraceError: As ``transform``.
    """
    named = type(model).__name__
    status = "normalised"
    stored: dict[int, Tensor] = {}
    if not any(isinstance(module, SpectralNormGraphModule) for module in model.modules()):
        if isinstance(model, torch.jit.ScriptModule):
            transform(model)  # which refuses it
        if not find_torch_sn(model):
            status = "to be normalised"
        model, stored = _with_zeros(model)
        with torch.random.fork_rng(devices=[]):
            model = transform(model)
    rows = []
    for fqn, site in sites_of(model).items():
        whole = sharded.full(stored.get(id(site.weight), site.weight).detach())
        vectors = site.vectors() if status == "normalised" else None
        rows.append(_row(fqn, whole, site.dim, status, vectors=vectors, eps=site.config.eps))
    for fqn, weight, why in skipped_weights(model):
        dim = 1 if issubclass(weight.kind, capture.TRANSPOSED) else 0
        parameter = stored.get(id(weight.parameter), weight.parameter)
        rows.append(_row(fqn, sharded.full(parameter.detach()), dim, "skipped", why))
    shown = {row.fqn for row in rows}
    for prefix, gm in transformed(model).items():
        for fqn, why in capture.computed_weights(gm).items():
            if prefix + fqn not in shown:
                owner, _ = owner_of(gm, fqn)
                dim = 1 if isinstance(owner, capture.TRANSPOSED) else 0
                rows.append(_row(prefix + fqn, _computed(owner), dim, "skipped", why))
    return Inspection(named, tuple(rows), {})


@torch.no_grad()
def inspect_checkpoint(path: str | os.PathLike[str]) -> Inspection:
    """Every weight of a checkpoint, by the names of its keys.

    Without a model it is not known which dimension is the output's. With u it is the one that has u's length,
    of several the one for which u and v give the largest sigma; without, the first is taken.

    Args:
        path: As in `specnorm_fx.load.read_checkpoint`.

    Raises:
        LoadError: As there.
    """
    state_dict = read_checkpoint(path)
    rows = []
    seen: set[str | None] = set()
    for fqn, keys in find_weights(state_dict):
        seen |= {fqn, *keys}
        weight, u, v = (state_dict.get(str(key)) for key in keys)
        if not isinstance(weight, Tensor):
            continue
        # The oldest hook format has no v.
        vectors = [x for x in (u, v) if x is not None]
        dims = [dim for dim in range(weight.ndim) if _fit(weight, dim, vectors)]
        if not dims:
            rows.append(_row(fqn, weight, 0, "normalised", "u and v do not fit its shape"))
        elif v is None:
            rows.append(_row(fqn, weight, dims[0], "normalised"))
        else:
            found = [_row(fqn, weight, dim, "normalised", vectors=vectors) for dim in dims]
            rows.append(max(found, key=lambda row: row.sigma or 0))
    for name, tensor in state_dict.items():
        is_weight = isinstance(tensor, Tensor) and tensor.ndim > 1 and _is_floating(tensor)
        if is_weight and name not in seen:
            rows.append(_row(name, tensor, 0, "plain"))
    return Inspection(os.path.basename(path), tuple(rows), {})


@torch.no_grad()
def inspect_onnx(path: str | os.PathLike[str]) -> Inspection:
    """Every weight of an ONNX file, alone: the divided weights should have sigma 1.

    Args:
        path: An ONNX file, its external data beside it. One that `specnorm_fx.onnx.export` has written
            says in its metadata what each weight was divided by, and which were then multiplied with the
            scales of a batch norm, whose sigma is any. An int8 weight is shown dequantized.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        OSError: There is no such file.
        ValueError: It is no ONNX file, or its metadata are not what `specnorm_fx.onnx.export` writes.
    """
    found, metadata = weights_of(path)
    divided_by = _divided_by(metadata, path)
    folded = _folded(metadata, path)
    rows = []
    for weight in found:
        sigma = divided_by.get(weight.name)
        status = "plain" if sigma is None else "divided"
        row = _row(weight.name, weight.values, weight.dim, status, sigma=sigma)
        if sigma is not None and weight.name in folded:
            row = replace(row, why="divided by sigma, then multiplied with the scales of a batch norm")
        elif sigma is not None and row.exact is not None and abs(row.exact - 1) > LAG:
            row = replace(row, why=f"divided by sigma, and its largest singular value is {row.exact:.4g}")
        rows.append(row)
    shown = ("specnorm_fx.sigmas", "specnorm_fx.folded")
    notes = {name: value for name, value in metadata.items() if name not in shown}
    return Inspection(os.path.basename(path), tuple(rows), notes)


def _computed(layer: nn.Module) -> Tensor:
    """The weight that a layer computes, without a step of what may move as it does."""
    if not nn.utils.parametrize.is_parametrized(layer, "weight"):
        stored: Tensor = vars(layer)["weight"].detach()
        return stored
    weight: Tensor = copy.deepcopy(layer).eval().weight  # type: ignore[assignment]
    return weight


def _with_zeros(model: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy with zeros for the parameters that ``transform`` refuses, and these by ``id`` of the zeros."""
    zeros: dict[int, nn.Parameter] = {}
    stored: dict[int, Tensor] = {}
    copied = capture.share(model)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.layout is not torch.strided:
                continue
            if parameter.is_meta or not parameter.isfinite().all():
                device = "cpu" if parameter.is_meta else parameter.device
                zero = nn.Parameter(torch.zeros_like(parameter, device=device), requires_grad=False)
                zero = module._parameters[name] = zeros.setdefault(id(parameter), zero)
                stored[id(zero)] = parameter
    return copied, stored


def _divided_by(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, float]:
    text = metadata.get("specnorm_fx.sigmas", "{}")
    try:
        found = json.loads(text)
        if all(type(sigma) in (int, float) and math.isfinite(sigma) for sigma in found.values()):
            return dict(found)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    raise _bad_metadata("sigmas", "a JSON object of numbers", text, path)


def _folded(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> list[str]:
    text = metadata.get("specnorm_fx.folded", "[]")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise _bad_metadata("folded", "a JSON list of names", text, path)
    return found


def _bad_metadata(key: str, wanted: str, text: str, path: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"The metadata specnorm_fx.{key} of {path} must be {wanted}, got {text[:80]!r}. Export the model "
        f"again."
    )


def _fit(weight: Tensor, dim: int, vectors: Sequence[Any]) -> bool:
    """Whether u, or u and v, have the lengths of the weight's sides."""
    m = weight.shape[dim]
    lengths = (m, weight.numel() // m if m else 0)[: len(vectors)]
    return all(
        _is_readable(x) and x.ndim == 1 and len(x) == length
        for x, length in zip(vectors, lengths, strict=True)
    )


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_readable(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and tensor.dtype in DTYPES
    )


def _row(
    fqn: str,
    weight: Tensor,
    dim: int,
    status: str,
    why: str = "",
    *,
    vectors: Sequence[Tensor] | None = None,
    eps: float = 1e-12,
    sigma: float | None = None,
) -> Row:
    """A row with all that can be computed of the weight, and of u and v."""
    dtype = str(weight.dtype).removeprefix("torch.")
    row = Row(fqn, tuple(weight.shape), dtype, status, why, sigma=sigma)
    if weight.numel() == 0:
        return _noted(row, "empty")
    if weight.ndim == 0:
        return _noted(row, "no matrix")
    if not _is_readable(weight):
        kind = "on the meta device, without values" if weight.is_meta else "sparse, or of another dtype"
        return _noted(row, f"{kind}: no singular values")
    if weight.numel() > max(LARGEST, weight.untyped_storage().nbytes() // weight.element_size()):
        return _noted(row, "more elements than there are stored")
    matrix = reference.weight_matrix(weight.detach(), dim)
    if not matrix.isfinite().all():
        return _noted(row, "NaN or inf in the weight")
    if vectors is not None:
        row = _by_vectors(row, matrix, vectors, eps)
    if min(matrix.shape) > SPECTRUM_SIZE:
        pair = reference.converge(matrix, *reference.random_start(matrix[:, 0], matrix[0]), eps)
        row = replace(row, exact=reference.sigma(matrix, *pair).abs().item())
        return _noted(row, "too large for all singular values: the largest by power iteration")
    values = reference.singular_values(matrix)
    exact, smallest = values[0].item(), values[-1].item()
    full_rank = smallest > exact * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    condition = exact / smallest if full_rank else None
    row = replace(row, exact=exact, condition=condition, spectrum=tuple(values.tolist()))
    if row.sigma is not None and row.residual is not None and abs(row.sigma - exact) > LAG * exact:
        return _noted(row, "u and v are not of this weight: specnorm_fx.warm_up_ mends them")
    return row


def _by_vectors(row: Row, matrix: Tensor, vectors: Sequence[Tensor], eps: float) -> Row:
    """With sigma and its error bar by u and v."""
    u, v = (x.to(matrix) for x in vectors)
    sigma, residual = (_finite(value) for value in reference.residual(matrix, u, v, eps))
    if sigma is None:
        return _noted(row, "NaN or inf in u or v: specnorm_fx.warm_up_ mends them")
    return replace(row, sigma=sigma, residual=residual)


def _noted(row: Row, why: str) -> Row:
    """With a note, where it has none yet."""
    return replace(row, why=row.why or why)


def _finite(value: Tensor) -> float | None:
    number = value.item()
    return number if math.isfinite(number) else None

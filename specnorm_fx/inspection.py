"""A look into a model, a checkpoint or an ONNX file: sigma and the singular values of every weight.

`specnorm_fx.report` is the look during training; this one is for whatever lies around, and also gives JSON, a
picture and a page.
"""

import html
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from specnorm_fx import capture, reference, sharded
from specnorm_fx.adopt import find_torch_sn
from specnorm_fx.atomic import replaced
from specnorm_fx.checkpoint import find_weights
from specnorm_fx.graph_module import SpectralNormGraphModule, sites_of
from specnorm_fx.load import read_checkpoint
from specnorm_fx.onnx import weights_of
from specnorm_fx.passes import transform
from specnorm_fx.report import skipped_weights, table

__all__ = ["Inspection", "Row", "inspect_checkpoint", "inspect_model", "inspect_onnx"]

# All singular values take about min(m, n) times as long as one product with the weight. Of a weight with more
# rows and columns than this only the largest is computed, by power iteration.
SPECTRUM_SIZE = 2048

# What singular values can be computed of; a checkpoint may hold others, such as float8.
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
)

HEADER = ("weight", "shape", "dtype", "status", "sigma", "exact", "residual", "condition")

# How far from 1 the exact sigma of a divided weight may be before it is pointed out. One iteration a step
# leaves sigma some per cent behind.
LAG = 0.1


@dataclass(frozen=True)
class Row:
    """One weight. All numbers are finite, or None where they are not known or not finite.

    Attributes:
        fqn: Its name.
        shape: Its shape.
        dtype: As torch calls it, without ``torch.``.
        status: ``"normalised"``; ``"to be normalised"``: what ``transform(model)`` would; ``"skipped"``; of
            an ONNX file ``"divided"``; ``"plain"`` where nothing is said of it.
        why: Of what is skipped, or out of the ordinary.
        sigma: By the stored u and v; of an ONNX file what the weight was divided by.
        exact: The largest singular value of the weight as it is stored.
        residual: The error bar of ``sigma``: `specnorm_fx.reference.residual`.
        condition: The largest singular value over the smallest of the ``min(m, n)``; None if that is no more
            than rounding (the table says "singular"), or not known.
        spectrum: The singular values, the largest first; empty if there are too many.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    status: str
    why: str = ""
    sigma: float | None = None
    exact: float | None = None
    residual: float | None = None
    condition: float | None = None
    spectrum: tuple[float, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What was found; ``print`` shows it as a table.

    Attributes:
        source: What was looked at: the class of a model, the name of a file.
        rows: Its weights.
        notes: What else there is to say, as the metadata of an ONNX file.
    """

    source: str
    rows: tuple[Row, ...]
    notes: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(
            [
                table([HEADER, *map(_cells, self.rows)], left=4),
                *(f"{row.fqn}: {row.why}" for row in self.rows if row.why),
                *(f"{name}: {value}" for name, value in self.notes.items()),
            ]
        )

    def to_json(self) -> str:
        """As JSON: ``{"source", "weights": [the attributes of `Row`], "notes"}``."""
        found = {"source": self.source, "weights": [asdict(row) for row in self.rows], "notes": self.notes}
        return json.dumps(found, indent=1, allow_nan=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A picture (PNG): the singular values of each weight, and sigma beside the exact value.

        Args:
            path: The file; an existing one is replaced.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        try:
            figure_module = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError(f"A plot needs {error.name}: pip install 'specnorm-fx[demo]'.") from error
        rows = self.rows
        # A Figure of its own, not pyplot's, which would change the state of the program around it.
        figure = figure_module.Figure(figsize=(13, max(4.0, 1.6 + 0.24 * len(rows))), layout="constrained")
        spectra, bars = figure.subplots(1, 2)
        drawn = [row for row in rows if len(row.spectrum) > 1 and row.spectrum[0] > 0]
        for row in drawn:
            ranks = [i / (len(row.spectrum) - 1) for i in range(len(row.spectrum))]
            values = [value / row.spectrum[0] for value in row.spectrum]
            # Rounding is no value, and would stretch the axis over 16 decades.
            spectra.plot(ranks, [v if v > 1e-7 else math.nan for v in values], linewidth=1, alpha=0.8)
        spectra.set(
            yscale="log",
            title=f"singular values of {len(drawn)} weights",
            xlabel="number / count",
            ylabel="relative to the largest",
        )
        spectra.grid(alpha=0.3)
        places = range(len(rows))
        bars.barh(places, [row.exact or 0 for row in rows], height=0.75, color="#bbbbbb", label="exact")
        known = [(i, row.sigma) for i, row in enumerate(rows) if row.sigma is not None]
        if known:
            bars.barh(*zip(*known, strict=True), height=0.35, color="#2a6f97", label="sigma by u and v")
        bars.set_yticks(places, [_shortened(row.fqn) for row in rows], fontsize=8)
        bars.invert_yaxis()
        bars.set(title="sigma", ylim=(len(rows) - 0.4, -0.6))
        bars.grid(axis="x", alpha=0.3)
        bars.legend(loc="best", fontsize=8)
        with replaced(path) as written:
            figure.savefig(written, dpi=110, format="png")

    def html(self, path: str | os.PathLike[str]) -> None:
        """A page with the table and the singular values, in one file that loads nothing else.

        Args:
            path: The file; an existing one is replaced.

        Raises:
            OSError: The file cannot be written.
        """
        with replaced(path) as written:
            written.write_text(_page(self), encoding="utf-8")


# --- What is looked at ---


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
        rows.append(_row(fqn, whole, site.config.dim or 0, status, vectors=vectors, eps=site.config.eps))
    for fqn, weight, why in skipped_weights(model):
        dim = 1 if issubclass(weight.kind, capture.TRANSPOSED) else 0
        parameter = stored.get(id(weight.parameter), weight.parameter)
        rows.append(_row(fqn, sharded.full(parameter.detach()), dim, "skipped", why))
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
            says in its metadata what each weight was divided by. An int8 weight is shown dequantized.

    Raises:
        ImportError: The extra ``onnx`` is not installed.
        OSError: There is no such file.
        ValueError: It is no ONNX file, or the sigmas in its metadata are none.
    """
    found, metadata = weights_of(path)
    divided_by = _divided_by(metadata, path)
    rows = []
    for weight in found:
        sigma = divided_by.get(weight.name)
        status = "plain" if sigma is None else "divided"
        row = _row(weight.name, weight.values, weight.dim, status, sigma=sigma)
        if sigma is not None and row.exact is not None and abs(row.exact - 1) > LAG:
            row = replace(row, why=f"divided by sigma, and its largest singular value is {row.exact:.4g}")
        rows.append(row)
    notes = {name: value for name, value in metadata.items() if name != "specnorm_fx.sigmas"}
    return Inspection(os.path.basename(path), tuple(rows), notes)


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
    except json.JSONDecodeError:
        found = None
    numbers = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError(
            f"The metadata specnorm_fx.sigmas of {path} must be a JSON object of numbers, got {text[:80]!r}. "
            f"Export the model again."
        )
    return dict(found)


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
    about: dict[str, Any] = {
        "fqn": fqn,
        "shape": tuple(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "status": status,
        "why": why,
        "sigma": sigma,
        "residual": None,
    }
    if weight.numel() == 0:
        return Row(**about | {"why": why or "empty"})
    if not _is_readable(weight):
        kind = "on the meta device, without values" if weight.is_meta else "sparse, or of another dtype"
        return Row(**about | {"why": why or f"{kind}: no singular values"})
    matrix = reference.weight_matrix(weight.detach(), dim)
    if not matrix.isfinite().all():
        return Row(**about | {"why": why or "NaN or inf in the weight"})
    if vectors is not None:
        u, v = (x.to(matrix) for x in vectors)
        pair = reference.residual(matrix, u, v, eps)
        about |= {"sigma": _finite(pair[0]), "residual": _finite(pair[1])}
        if about["sigma"] is None:
            about["residual"] = None
            about["why"] = why or "NaN or inf in u or v: specnorm_fx.warm_up_ mends them"
    if min(matrix.shape) > SPECTRUM_SIZE:
        pair = reference.converge(matrix, *reference.random_start(matrix[:, 0], matrix[0]), eps)
        exact = reference.sigma(matrix, *pair).abs().item()
        about["why"] = why or "too large for all singular values: the largest by power iteration"
        return Row(**about, exact=exact)
    values = _singular_values(matrix)
    smallest, exact = values[-1].item(), values[0].item()
    full_rank = smallest > exact * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    both = about["sigma"] is not None and about["residual"] is not None
    if both and abs(about["sigma"] - exact) > LAG * exact:
        about["why"] = why or "u and v are not of this weight: specnorm_fx.warm_up_ mends them"
    return Row(
        **about,
        exact=exact,
        condition=exact / smallest if full_rank else None,
        spectrum=tuple(values.tolist()),
    )


def _singular_values(matrix: Tensor) -> Tensor:
    """The largest first.

    Of an fp32 matrix by the eigenvalues of its product with itself, which in fp64 squares no rounding that
    fp32 would not have: 1024 x 9216 takes seconds where the SVD in fp32 takes most of a minute.
    """
    double = {torch.float32: torch.float64, torch.complex64: torch.complex128}.get(matrix.dtype)
    if double is None:
        svd: Tensor = torch.linalg.svdvals(matrix)
        return svd
    matrix = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mH).to(double)
    squares: Tensor = torch.linalg.eigvalsh(matrix @ matrix.mH)
    return squares.clamp(min=0).sqrt().flip(0)


def _finite(value: Tensor) -> float | None:
    number = value.item()
    return number if math.isfinite(number) else None


# --- How it is shown ---


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (
        "" if value is None else f"{value:{form}}"
        for value, form in (
            (row.sigma, ".6g"),
            (row.exact, ".6g"),
            (row.residual, ".1e"),
        )
    )
    condition = "" if row.condition is None else f"{row.condition:.3g}"
    if row.spectrum and row.condition is None:
        condition = "singular"
    return row.fqn, "x".join(map(str, row.shape)), row.dtype, row.status, *numbers, condition


def _shortened(name: str, length: int = 40) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --mark: #2a6f97; }
@media (prefers-color-scheme: dark) { :root { --mark: #7cc0e8; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th, td { text-align: right; white-space: nowrap; }
th:nth-child(-n+4), td:nth-child(-n+4), th:last-child, td:last-child { text-align: left; }
td:first-child { font-family: ui-monospace, monospace; font-size: .85em; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
tr:hover { background: var(--soft); }
svg { display: block; }
polyline { fill: none; stroke: var(--mark); stroke-width: 1.5; }
.why { opacity: .75; white-space: normal; min-width: 12rem; }
dt { font-family: ui-monospace, monospace; font-size: .85em; }
dd { margin: 0 0 .5rem 1rem; overflow-wrap: anywhere; }
"""


def _page(found: Inspection) -> str:
    header = "".join(f"<th>{name}</th>" for name in (*HEADER, "singular values"))
    lines = []
    for row in found.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
        why = f'<div class="why">{html.escape(row.why)}</div>' if row.why else ""
        lines.append(f"<tr>{cells}<td>{_curve(row.spectrum)}{why}</td></tr>")
    notes = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in found.notes.items()
    )
    title = f"Spectral norm of {html.escape(found.source)}"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n<h1>{title}</h1>\n"
        f"<p>{len(found.rows)} weights. The curve: the singular values, relative to the largest.</p>\n"
        f'<div class="table"><table>\n<thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>\n"
        f"{f'<dl>{notes}</dl>' if notes else ''}\n</html>\n"
    )


def _curve(spectrum: tuple[float, ...], width: int = 120, height: int = 28) -> str:
    """A small picture of the singular values, as SVG."""
    if len(spectrum) < 2 or not spectrum[0] > 0:
        return ""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in _points(spectrum, width, height))
    return f'<svg width="{width}" height="{height}" role="img"><polyline points="{points}"/></svg>'


def _points(spectrum: tuple[float, ...], width: int, height: int) -> Iterator[tuple[float, float]]:
    step = max(1, len(spectrum) // width)  # no more points than pixels
    for i in range(0, len(spectrum), step):
        yield 1 + (width - 2) * i / (len(spectrum) - 1), 1 + (height - 2) * (1 - spectrum[i] / spectrum[0])

"""What an inspection has found, and how it is shown: as a table, JSON, a picture, a page."""

import html
import importlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from specnorm_fx.atomic import replaced
from specnorm_fx.report import table

__all__ = ["Inspection", "Row"]

HEADER = ("weight", "shape", "dtype", "status", "sigma", "exact", "residual", "condition")


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
            raise ImportError(f"A plot needs {error.name}: pip install matplotlib.") from error
        # A Figure of its own, not pyplot's, which would change the state of the program around it.
        size = 13, max(4.0, 1.6 + 0.24 * len(self.rows))
        figure = figure_module.Figure(figsize=size, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_spectra(left, self.rows)
        _draw_sigmas(right, self.rows)
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


# --- The picture ---


def _draw_spectra(axes: Any, rows: Sequence[Row]) -> None:
    drawn = [row for row in rows if len(row.spectrum) > 1 and row.spectrum[0] > 0]
    for row in drawn:
        ranks = [i / (len(row.spectrum) - 1) for i in range(len(row.spectrum))]
        values = [value / row.spectrum[0] for value in row.spectrum]
        # Rounding is no value, and would stretch the axis over 16 decades.
        axes.plot(ranks, [v if v > 1e-7 else math.nan for v in values], linewidth=1, alpha=0.8)
    axes.set(
        yscale="log",
        title=f"singular values of {len(drawn)} weights",
        xlabel="number / count",
        ylabel="relative to the largest",
    )
    axes.grid(alpha=0.3)


def _draw_sigmas(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    axes.barh(places, [row.exact or 0 for row in rows], height=0.75, color="#bbbbbb", label="exact")
    known = [(i, row.sigma) for i, row in enumerate(rows) if row.sigma is not None]
    if known:
        axes.barh(*zip(*known, strict=True), height=0.35, color="#2a6f97", label="sigma by u and v")
    axes.set_yticks(places, [_shortened(row.fqn) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(title="sigma", ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize=8)


def _shortened(name: str, length: int = 40) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"


# --- The page ---


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

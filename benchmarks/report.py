"""Results as tables and as a picture.

    python benchmarks/report.py benchmarks/results/<device>-<date>.json

makes both anew from the numbers, say of a machine without matplotlib.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import CASES
from onnx_runtime import ONNX_LABELS
from variants import DIRECTIONS, LABELS, MODES, VARIANTS, variants_in

from specnorm_fx.atomic import replaced

__all__ = ["markdown", "write"]

ABSENT = "-"
BACKEND = f"{LABELS['backend']} / {LABELS['ours']}"
# Okabe and Ito's, which the colour-blind tell apart.
COLORS = {"torch": "#E69F00", "legacy": "#999999", "ours": "#0072B2", "backend": "#56B4E9"}
HATCHES = {"eager": "", "compiled": "//", "reduce-overhead": ".."}


def write(path: Path) -> None:
    """Print the tables; leave them, and the picture, beside the numbers.

    Args:
        path: The JSON file that run.py writes.
    """
    results = json.loads(path.read_text())
    measured = results["models"]
    results["models"] = {name: measured[name] for name in CASES if name in measured}
    text = markdown(results)
    with replaced(path.with_suffix(".md")) as written:
        written.write_text(text)
    print(text)
    try:
        import matplotlib
    except ImportError:
        print(f"No matplotlib here, hence no picture: report.py draws it from {path.name} where there is.")
        return
    matplotlib.use("Agg")
    _draw(results, path.with_suffix(".png"))


def markdown(results: dict[str, Any]) -> str:
    """All tables.

    Args:
        results: What run.py writes as JSON.
    """
    models = results["models"]
    found = results["environment"]
    where = ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("device", "date"))
    sections = [f"# {found['device']}, {found['date']}", f"{where}.", _sizes(models)]
    tables = {
        "step": _step,
        "sn": _sn,
        "penalty": _penalty,
        "compile": _compile,
        "memory": _memory,
        "onnx": _onnx,
    }
    for what, section in tables.items():
        measured = {name: model[what] for name, model in models.items() if what in model}
        if measured:
            sections += section(measured)
    kernels = _kernels(models)
    sections += kernels if found["device"] == "cuda" else ["Kernels are counted on CUDA only."]
    failures = [f"- {' / '.join(keys)}: {why}" for keys, why in _failures(models)]
    if failures:
        sections += ["## Fails", "\n".join(failures)]
    return "\n\n".join(sections) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def _sizes(models: dict[str, Any]) -> str:
    keys = ("batch", "parameters", "normalized_layers", "normalized_weights")
    rows = [[name, *(f"{model[key]:,}" for key in keys)] for name, model in models.items()]
    return _table(["model", "batch", "parameters", "normalised layers", "their weights"], rows)


def _step(measured: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            mode,
            *(_time(step[mode].get(v), "over_none") for v in VARIANTS),
            _ratio(step[mode].get("backend"), "over_ours"),
        ]
        for name, step in measured.items()
        for mode in _modes(step)
    ]
    return [
        "## Full training step, ms",
        "Median [20, 80 percentile], and how many times no SN: the median of the ratios within a round.",
        _table(["model", "mode", *LABELS.values(), BACKEND], rows),
    ]


def _sn(measured: dict[str, Any]) -> list[str]:
    ours = LABELS["ours"]
    rows = [
        [
            *(name, mode, direction, _time(sn["copy"])),
            *(_time(sn[mode].get(v, {}).get(direction), "over_torch") for v in VARIANTS[1:]),
            _ratio(sn[mode]["ours"][direction], "over_copy"),
            _ratio(sn[mode].get("backend", {}).get(direction), "over_ours"),
        ]
        for name, sn in measured.items()
        for mode in _modes(sn)
        for direction in DIRECTIONS
    ]
    header = ["model", "mode", "pass", "copy", *list(LABELS.values())[1:], f"{ours} / copy", BACKEND]
    return [
        "## Spectral norm alone, ms",
        "Of all normalised weights, and how many times torch SN. Copy: to clone these weights once, eagerly, "
        "the limit that memory sets.",
        _table(header, rows),
    ]


def _penalty(measured: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            mode,
            *(_time(entry[mode].get(v), "over_none" if mode == "eager" else "over_eager") for v in VARIANTS),
        ]
        for name, entry in measured.items()
        for mode in _modes(entry)
    ]
    return [
        "## Training step with gradient penalty (WGAN-GP), ms",
        "Eager: how many times no SN. Other modes: how many times the same variant in eager mode.",
        _table(["model", "mode", *LABELS.values()], rows),
    ]


def _compile(measured: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            *(_time(entry.get(v), "over_none", 1.0) for v in VARIANTS),
            _time(entry["transform"], scale=1.0),
        ]
        for name, entry in measured.items()
    ]
    return [
        "## First compile, s",
        "Forward and backward of one batch in a fresh process with an empty cache, and how many times no SN. "
        "transform() is not part of it.",
        _table(["model", *LABELS.values(), "transform()"], rows),
    ]


def _memory(measured: dict[str, Any]) -> list[str]:
    rows = [
        [name, mode, *(_bytes(entry[mode].get(v), entry[mode]["none"], v) for v in VARIANTS)]
        for name, entry in measured.items()
        for mode in _modes(entry)
    ]
    return [
        "## Peak memory of a training step, MiB",
        "No SN in full (on the CPU with what Python and torch take), the others above it.",
        _table(["model", "mode", *LABELS.values()], rows),
    ]


def _onnx(measured: dict[str, Any]) -> list[str]:
    header = ["model", *ONNX_LABELS.values()]

    def table(cell: Callable[[dict[str, Any]], str]) -> str:
        rows = [
            [name, *(cell(entry[v]) if v in entry else ABSENT for v in ONNX_LABELS)]
            for name, entry in measured.items()
        ]
        return _table(header, rows)

    return [
        "## ONNX Runtime: latency, ms",
        "A batch of one, and how many times no SN. All but ours are files of the stock exporter.",
        table(lambda entry: _time(entry["latency"], "over_none")),
        "## ONNX Runtime: loading, ms",
        "To open a session, which folds constants, and how many times no SN.",
        table(lambda entry: _time(entry["loading"], "over_none")),
        "## ONNX file: KiB, nodes",
        table(lambda entry: f"{entry['bytes'] / 1024:,.1f}, {entry['nodes']}"),
    ]


def _kernels(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, model in models.items():
        for what in ("step", "penalty"):
            step = model.get(what, {})
            rows += [
                [name, mode, what, *(_counts(step[mode].get(v)) for v in VARIANTS)] for mode in _modes(step)
            ]
        sn = model.get("sn", {})
        rows += [
            [
                *(name, mode, f"SN {direction}", ABSENT),
                *(_counts(sn[mode].get(v, {}).get(direction)) for v in VARIANTS[1:]),
            ]
            for mode in _modes(sn)
            for direction in DIRECTIONS
        ]
    return [
        "## Kernels",
        "Kernels + copies (memcpy, memset) that run on the device; in brackets the launches by the host.",
        _table(["model", "mode", "what", *LABELS.values()], rows),
    ]


def _modes(measured: dict[str, Any]) -> list[str]:
    return [mode for mode in MODES["cuda"] if mode in measured]


def _time(entry: dict[str, Any] | None, over: str = "", scale: float = 1000.0) -> str:
    if entry is None:
        return ABSENT
    if "fails" in entry:
        return "fails"
    median, p20, p80 = (_digits(scale * entry[key]) for key in ("median", "p20", "p80"))
    ratio = f" x{_ratio(entry, over)}" if over in entry else ""
    return f"{median} [{p20}, {p80}]{ratio}"


def _ratio(entry: dict[str, Any] | None, over: str) -> str:
    return _digits(entry[over]["median"]) if entry is not None and over in entry else ABSENT


def _digits(x: float) -> str:
    """Three digits or more."""
    return f"{x:.{0 if x >= 100 else 1 if x >= 10 else 2 if x >= 1 else 3}f}"


def _bytes(entry: dict[str, Any] | None, none: dict[str, Any], variant: str) -> str:
    if entry is None:
        return ABSENT
    if "fails" in entry:
        return "fails"
    if variant == "none":
        return f"{entry['bytes'] / 2**20:,.0f}"
    return f"{(entry['bytes'] - none['bytes']) / 2**20:+,.1f}" if "fails" not in none else ABSENT


def _counts(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ABSENT
    launches = entry.get("launches", {})
    if "fails" in entry or "fails" in launches:
        return "fails"
    return f"{launches['kernels']} + {launches['copies']} [{launches['launches']}]" if launches else ABSENT


def _failures(tree: dict[str, Any], *keys: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where in the results something fails, and why."""
    for key, value in tree.items():
        if key == "fails":
            yield keys, value
        elif isinstance(value, dict):
            yield from _failures(value, *keys, key)


@dataclass(frozen=True)
class _Panel:
    """Grouped bars: a group for each model, in it a bar for each label."""

    title: str
    unit: str
    level: float  # what the bars are to be seen against
    text: str  # format of the numbers on them
    bars: list[tuple[str, str, str, list[float]]]  # label, color, hatch, a value for each model


def _panels(models: dict[str, Any]) -> Iterator[_Panel]:
    """The training step in each mode, and the spectral norm alone in each direction."""

    def medians(*keys: str) -> list[float]:
        return [_median(model, *keys) for model in models.values()]

    def measured(what: str) -> list[str]:
        return [mode for mode in MODES["cuda"] if any(mode in m.get(what, {}) for m in models.values())]

    for mode in measured("step"):
        bars = []
        for variant in variants_in(mode)[1:]:
            added = [100 * (ratio - 1) for ratio in medians("step", mode, variant, "over_none")]
            if not all(map(math.isnan, added)):  # run.py --without
                bars.append((LABELS[variant], COLORS[variant], "", added))
        yield _Panel(f"training step, {mode}", "added to the step\nwithout SN, %", 0.0, "{:+.1f}", bars)
    for direction in DIRECTIONS if measured("sn") else ():
        bars = []
        for mode in measured("sn"):
            ratios = medians("sn", mode, "ours", direction, "over_torch")
            bars.append((f"{LABELS['ours']}, {mode}", COLORS["ours"], HATCHES[mode], ratios))
        yield _Panel(
            f"SN alone, {direction}", "time / time of torch SN\nin the same mode", 1.0, "{:.2f}", bars
        )


def _median(model: dict[str, Any], *keys: str) -> float:
    """At the end of a path through the results; NaN where there is none."""
    found: Any = model
    for key in keys:
        found = found.get(key, {})
    return found.get("median", math.nan)


def _draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    models, found = results["models"], results["environment"]
    panels = list(_panels(models))
    if not panels:
        return
    names = [f"{name}\nbatch {model['batch']}" for name, model in models.items()]
    size = (1.5 + 1.5 * max(3, len(models)), 2.6 * len(panels))
    figure, axes = plt.subplots(len(panels), squeeze=False, figsize=size, layout="constrained")
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        width = 0.8 / len(panel.bars)
        for i, (label, color, hatch, values) in enumerate(panel.bars):
            shift = (i - (len(panel.bars) - 1) / 2) * width
            places = [group + shift for group in range(len(models))]
            style = {"color": color, "hatch": hatch, "edgecolor": "white", "label": label}
            bars = axis.bar(places, values, 0.9 * width, **style)
            texts = ["" if math.isnan(value) else panel.text.format(value) for value in values]
            axis.bar_label(bars, texts, fontsize=7, padding=1)
        axis.axhline(panel.level, color="black", linewidth=0.8)
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.set_ylabel(panel.unit, fontsize=8)
        axis.set_xticks(range(len(models)), names, fontsize=8)
        axis.set_xlim(-0.5, len(models) - 0.5)  # one below the other, whatever was not measured
        axis.margins(y=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, ncols=3, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{found.get('gpu', found['cpu'])}, torch {found['torch']}, {found['date']}", fontsize=10)
    with replaced(path) as written:
        figure.savefig(written, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

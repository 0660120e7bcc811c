"""Measure what spectral norm costs, torch's, its old one and specnorm_fx's: in training, and in an ONNX file.

    python benchmarks/run.py [--device cuda] [--models mlp sngan-32] [--only step sn] [--out DIR]

Goes on with what the results in DIR lack, prints tables, and leaves <device>-<date>.json, .md and .png. See
benchmarks/README.md.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from fresh import in_fresh_process
from measure import Series, count_kernels, failure, interleave
from models import CASES, Case
from onnx_runtime import measure_files, versions
from torch import Tensor
from variants import (
    DIRECTIONS,
    MODES,
    VARIANTS,
    build,
    in_mode,
    normalization,
    penalty_step,
    training_step,
    variants_in,
)

from specnorm_fx.atomic import replaced

# Fresh large tensors would else come from the system page by page, and the page faults swamp every number:
# 17 ms instead of 0.3 ms for a clone of SNGAN-32's weights. So: no mmap (a large MALLOC_MMAP_THRESHOLD_ would
# say the same, but glibc ignores one above its limit), nothing given back, large steps.
PINNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def measure_step(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """A full training step: by mode and variant."""
    inputs = case.inputs(case.batch(args.device), args.device)
    return _measure_steps(training_step, inputs, case, args)


def measure_penalty(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """A training step with gradient penalty (WGAN-GP): by mode and variant."""
    real, *labels = case.inputs(case.batch(args.device), args.device)
    return _measure_steps(penalty_step, (real, torch.randn_like(real), *labels), case, args)


def _measure_steps(
    make: Callable[..., Callable[..., None]],
    inputs: tuple[Tensor, ...],
    case: Case,
    args: argparse.Namespace,
) -> dict[str, Any]:
    calls = {}
    for variant in _among(VARIANTS, args):
        # All modes train one model, so that memory holds it once; each has its turn.
        model = build(case, variant, args.device)
        # The optimizer computes each step and then goes none of it: no variant drifts to numbers of its own.
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.0, 0.9))
        for mode in args.modes:
            if variant in variants_in(mode):
                step = make(model, variant, mode, optimizer)
                calls[mode, variant] = lambda step=step: step(*inputs)
    series = interleave(calls, args.device, args.repetitions, args.seconds)

    def entry(mode: str, variant: str) -> dict[str, Any]:
        mine, none, theirs, ours = (series[mode, v] for v in (variant, "none", "torch", "ours"))
        eager = series.get(("eager", variant), mine)
        summary = mine.summary(over_none=none, over_torch=theirs, over_ours=ours, over_eager=eager)
        return summary | _kernels(mine, calls[mode, variant], args.device)

    return {mode: {v: entry(mode, v) for v in _among(variants_in(mode), args)} for mode in args.modes}


def measure_sn(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The spectral norm alone: by mode, variant and direction; and a copy of the weights."""
    calls = {}
    for variant in _among(VARIANTS[1:], args):
        module, weights = normalization(build(case, variant, args.device), variant)
        gradients = [torch.randn_like(weight) for weight in weights]
        for mode in args.modes:
            if variant not in variants_in(mode):
                continue
            run = in_mode(module, variant, mode)
            calls[mode, variant, "forward"] = run
            calls[mode, variant, "forward + backward"] = functools.partial(
                _forward_backward, run, weights, gradients
            )
    stored = [weight.detach() for weight in weights]  # those of the last variant; the others have the same
    calls["copy"] = lambda: [weight.clone() for weight in stored]
    series = interleave(calls, args.device, args.repetitions, args.seconds)

    def entry(mode: str, variant: str, direction: str) -> dict[str, Any]:
        mine, theirs, ours = (series[mode, v, direction] for v in (variant, "torch", "ours"))
        summary = mine.summary(over_torch=theirs, over_ours=ours, over_copy=series["copy"])
        return summary | _kernels(mine, calls[mode, variant, direction], args.device)

    by_mode = {
        mode: {
            v: {direction: entry(mode, v, direction) for direction in DIRECTIONS}
            for v in _among(variants_in(mode)[1:], args)
        }
        for mode in args.modes
    }
    copied = series["copy"].summary() | _kernels(series["copy"], calls["copy"], args.device)
    return {"copy": copied, **by_mode}


def _among(variants: Sequence[str], args: argparse.Namespace) -> list[str]:
    return [variant for variant in variants if variant not in args.without]


def _forward_backward(
    run: Callable[[], list[Tensor]], weights: list[Tensor], gradients: list[Tensor]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(), weights, gradients)


def _kernels(series: Series, call: Callable[[], object], device: str) -> dict[str, Any]:
    """An entry's part that only a GPU has; on the CPU there are no launches to count."""
    if device == "cpu" or series.fails is not None:
        return {}
    try:
        return {"launches": count_kernels(call)}
    except Exception as error:  # a profiler without permission, say; the times hold all the same
        return {"launches": {"fails": failure(error)}}


def measure_compile(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The first compile, cold, each in a process of its own: by variant."""
    variants = _among(VARIANTS, args)
    series = {variant: Series() for variant in variants}
    transform = Series()
    order = random.Random(0)
    for _ in range(args.processes):
        for variant in order.sample(variants, len(variants)):
            if series[variant].fails is not None:
                continue
            measured = in_fresh_process("compile", case, variant, "compiled", args.device)
            if "fails" in measured:
                series[variant].fails = measured["fails"]
                continue
            series[variant].values.append(measured["seconds"])
            if variant == "ours":
                transform.values.append(measured["transform"])
    transform.fails = series["ours"].fails
    result = {variant: series[variant].summary(over_none=series["none"]) for variant in variants}
    return result | {"transform": transform.summary()}


def measure_memory(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The peak of memory in a step, each in a process of its own: by mode and variant."""
    return {
        mode: {
            v: in_fresh_process("memory", case, v, mode, args.device) for v in _among(variants_in(mode), args)
        }
        for mode in args.modes
    }


def measure_onnx(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The exported model in ONNX Runtime, and its file: by variant."""
    return measure_files(case, args.repetitions, args.seconds)


MEASUREMENTS: dict[str, Callable[[Case, argparse.Namespace], dict[str, Any]]] = {
    "step": measure_step,
    "sn": measure_sn,
    "penalty": measure_penalty,
    "compile": measure_compile,
    "memory": measure_memory,
    "onnx": measure_onnx,
}
WITHOUT_MODES = ("compile", "onnx")

# A GPU is often lent for ten minutes, and what outlasts them is killed. So there a run ends by itself, and
# begins with what is wanted most. Three seconds are twenty rounds of the spectral norm alone.
MINUTES = {"cpu": math.inf, "cuda": 9.0}
SECONDS = {"cpu": 30.0, "cuda": 3.0}
WANTED = ("sn", "step")


class Part(NamedTuple):
    """What is measured, and written, at once."""

    what: str
    model: str
    modes: tuple[str, ...]

    def __str__(self) -> str:
        modes = "" if self.what in WITHOUT_MODES else f" {', '.join(self.modes)}"
        return f"{self.model}: {self.what}{modes}"

    def is_in(self, models: dict[str, Any]) -> bool:
        """Whether results have it."""
        found = models.get(self.model, {}).get(self.what)
        return found is not None and (self.what in WITHOUT_MODES or set(self.modes) <= found.keys())


def parts(args: argparse.Namespace) -> list[Part]:
    """All that the command line asks for, in the order in which it is measured.

    Model by model on the CPU. On CUDA each mode is a part, and the spectral norm alone and the step come
    first, of these eager mode, where nothing is compiled; then the other modes, the small models first, which
    wait for the host most.
    """
    if args.device == "cpu":
        return [Part(what, name, tuple(args.modes)) for name in args.models for what in args.only]
    found = []
    for what in args.only:
        # Of a gradient penalty, each mode is held against eager: they share the rounds.
        whole = what == "penalty" or what in WITHOUT_MODES
        for modes in [tuple(args.modes)] if whole else [(mode,) for mode in args.modes]:
            found += [Part(what, name, modes) for name in args.models]

    def rank(part: Part) -> tuple[object, ...]:
        mode, model = args.modes.index(part.modes[0]), CASES[part.model].parameters
        if part.what in WANTED:
            return 0, mode > 0, model, mode, WANTED.index(part.what)
        return 1, args.only.index(part.what), mode, model

    return sorted(found, key=rank)


def size(case: Case, device: str) -> dict[str, Any]:
    """What the numbers of a model are to be seen against."""
    sites = build(case, "ours", "cpu").sites()
    return {
        "batch": case.batch(device),
        "input": list(case.shape),
        "parameters": case.parameters,
        "normalized_layers": len(sites),
        "normalized_weights": sum(site.weight.numel() for site in sites),
    }


def environment(device: str) -> dict[str, Any]:
    """What the numbers hold for."""
    found = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        **versions(),
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, what is missing filled in."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=MODES, default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL")
    training = [what for what in MEASUREMENTS if what != "onnx"]
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=training)
    parser.add_argument("--modes", nargs="+", choices=MODES["cuda"], help="default: all that fit the device")
    parser.add_argument(
        "--without", nargs="+", choices=("legacy", "backend"), default=[], help="to save time"
    )
    parser.add_argument("--repetitions", type=int, default=200, help="rounds of a measurement, at most")
    parser.add_argument("--seconds", type=float, help="budget of the rounds of a measurement; 30, on CUDA 3")
    parser.add_argument("--minutes", type=float, help="of the whole run; no limit, on CUDA 9")
    parser.add_argument("--again", action="store_true", help="measure also what the results have")
    parser.add_argument("--processes", type=int, default=3, help="cold compiles of each variant")
    parser.add_argument("--quick", action="store_true", help="three rounds, one process: a smoke test")
    args = parser.parse_args(argv)
    if args.quick:
        args.repetitions, args.processes, args.again = 3, 1, True
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    args.minutes = MINUTES[args.device] if args.minutes is None else args.minutes
    args.modes = args.modes or list(MODES[args.device])
    if not set(args.modes) <= set(MODES[args.device]):
        parser.error(f"on {args.device} the modes are {', '.join(MODES[args.device])}")
    return args


def begin(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The results to fill, with those that an earlier run of the day has left.

    Args:
        path: Of the results.
        args: The command line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = {"environment": environment(args.device), "runs": [], "models": {}}
    results = json.loads(path.read_text()) if path.exists() else fresh
    if results["environment"] != fresh["environment"]:
        raise SystemExit(f"{path} holds results of another environment: choose another --out.")
    kept = {name: value for name, value in vars(args).items() if name != "out" and value != math.inf}
    results["runs"].append(kept)
    return results


def pin_allocator() -> None:
    """Start this program anew, in place of itself, with the allocator pinned; it reads these only then."""
    if not PINNED_ALLOCATOR.items() <= os.environ.items():
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **PINNED_ALLOCATOR})


def main(argv: list[str] | None = None) -> None:
    """Measure part by part, and write after each: a run that is cut short leaves what it has."""
    args = parse(argv)
    if args.device == "cpu":
        pin_allocator()
    start = time.perf_counter()
    # What a smoke test measures must not come among what is kept.
    path = args.out / f"{args.device}-{datetime.date.today()}{'-quick' if args.quick else ''}.json"
    results = begin(path, args)
    due = [part for part in parts(args) if args.again or not part.is_in(results["models"])]
    longest = 0.0
    while due:
        elapsed = time.perf_counter() - start
        # A part takes about as long as the longest before it, at most.
        if elapsed + longest > 60 * args.minutes:
            break
        part = due.pop(0)
        print(f"{elapsed:5.0f} s  {part}", file=sys.stderr, flush=True)
        measured = results["models"].setdefault(part.model, {})
        measured.update({} if "parameters" in measured else size(CASES[part.model], args.device))
        found = MEASUREMENTS[part.what](
            CASES[part.model], argparse.Namespace(**{**vars(args), "modes": part.modes})
        )
        measured.setdefault(part.what, {}).update(found)
        results["runs"][-1]["left_out"] = [str(other) for other in due]
        write(results, path)
        # What this took goes back, and the compiled code.
        torch.compiler.reset()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        longest = max(longest, time.perf_counter() - start - elapsed)
    results["runs"][-1]["left_out"] = [str(part) for part in due]
    write(results, path)
    report.write(path)
    if due:
        print(_left_out(due, args), file=sys.stderr)


def write(results: dict[str, Any], path: Path) -> None:
    """Leave the results, whole or not at all.

    Args:
        results: From `begin`, with what was measured.
        path: Of the file.
    """
    with replaced(path) as written:
        written.write_text(json.dumps(results, indent=1) + "\n")


def _left_out(due: list[Part], args: argparse.Namespace) -> str:
    """What the minutes were not enough for, and the command that goes on."""
    names = "\n".join(f"  {part}" for part in due)
    wanted = {
        "models": [name for name in args.models if any(name == part.model for part in due)],
        "only": [what for what in args.only if any(what == part.what for part in due)],
        "modes": [mode for mode in args.modes if any(mode in part.modes for part in due)],
        "without": args.without,
    }
    options = " ".join(f"--{name} {' '.join(values)}" for name, values in wanted.items() if values)
    return (
        f"Not measured in {args.minutes:g} minutes:\n{names}\nGo on, with the same --out:\n"
        f"  python benchmarks/run.py --device {args.device} {options} --out DIR"
    )


if __name__ == "__main__":
    main()

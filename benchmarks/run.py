"""Measure what spectral norm costs, torch's, its old one and specnorm_fx's: in training, and in an ONNX file.

    python benchmarks/run.py [--device cuda] [--models mlp sngan-32] [--only step sn] [--out DIR]

Prints tables; leaves <device>-<date>.json, .md and .png. See benchmarks/README.md.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    for variant in VARIANTS:
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

    return {mode: {variant: entry(mode, variant) for variant in variants_in(mode)} for mode in args.modes}


def measure_sn(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The spectral norm alone: by mode, variant and direction; and a copy of the weights."""
    calls = {}
    for variant in VARIANTS[1:]:
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
            for v in variants_in(mode)[1:]
        }
        for mode in args.modes
    }
    copied = series["copy"].summary() | _kernels(series["copy"], calls["copy"], args.device)
    return {"copy": copied, **by_mode}


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
    series = {variant: Series() for variant in VARIANTS}
    transform = Series()
    order = random.Random(0)
    for _ in range(args.processes):
        for variant in order.sample(VARIANTS, len(VARIANTS)):
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
    result = {variant: series[variant].summary(over_none=series["none"]) for variant in VARIANTS}
    return result | {"transform": transform.summary()}


def measure_memory(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The peak of memory in a step, each in a process of its own: by mode and variant."""
    return {
        mode: {v: in_fresh_process("memory", case, v, mode, args.device) for v in variants_in(mode)}
        for mode in args.modes
    }


def measure_onnx(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The exported model in ONNX Runtime, and its file: by variant."""
    return measure_files(case, args.repetitions, args.seconds)


MEASUREMENTS = {
    "step": measure_step,
    "sn": measure_sn,
    "penalty": measure_penalty,
    "compile": measure_compile,
    "memory": measure_memory,
    "onnx": measure_onnx,
}


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
    parser.add_argument("--repetitions", type=int, default=200, help="rounds of a measurement, at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="budget of the rounds of a measurement")
    parser.add_argument("--processes", type=int, default=3, help="cold compiles of each variant")
    parser.add_argument("--quick", action="store_true", help="three rounds, one process: a smoke test")
    args = parser.parse_args(argv)
    if args.quick:
        args.repetitions, args.processes = 3, 1
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
    results["runs"].append({name: value for name, value in vars(args).items() if name != "out"})
    return results


def pin_allocator() -> None:
    """Start this program anew, in place of itself, with the allocator pinned; it reads these only then."""
    if not PINNED_ALLOCATOR.items() <= os.environ.items():
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **PINNED_ALLOCATOR})


def main(argv: list[str] | None = None) -> None:
    """Measure model by model, and write after each: a run that is cut short leaves what it has."""
    args = parse(argv)
    if args.device == "cpu":
        pin_allocator()
    start = time.perf_counter()
    # What a smoke test measures must not come among what is kept.
    path = args.out / f"{args.device}-{datetime.date.today()}{'-quick' if args.quick else ''}.json"
    results = begin(path, args)
    for name in args.models:
        case = CASES[name]
        measured = results["models"].setdefault(name, {})
        measured |= size(case, args.device)
        for what in args.only:
            print(f"{time.perf_counter() - start:5.0f} s  {name}: {what}", file=sys.stderr, flush=True)
            measured[what] = MEASUREMENTS[what](case, args)
            with replaced(path) as written:
                written.write_text(json.dumps(results, indent=1) + "\n")
            # What this took goes back, and the compiled code.
            torch.compiler.reset()
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    report.write(path)


if __name__ == "__main__":
    main()

"""One measurement in a process of its own: the first compile, or the peak of memory. Prints JSON."""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import WARM_UP, failure, peak_memory, synchronize
from models import CASES, Case
from variants import MODES, VARIANTS, build, in_mode, loss, training_step

import specnorm_fx

__all__ = ["in_fresh_process"]

# Every larger tensor on pages of its own, which go back when it is freed: what is resident is then in use.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_fresh_process(what: str, case: Case, variant: str, mode: str, device: str) -> dict[str, Any]:
    """Run a measurement of this file.

    Args:
        what: ``"compile"`` or ``"memory"``.
        case: The model.
        variant: One of `VARIANTS`.
        mode: One of `MODES`.
        device: Where it runs.

    Returns:
        What it measured, or ``{"fails": why}``.
    """
    environment = dict(os.environ)
    if what == "memory":
        environment = {k: v for k, v in environment.items() if not k.startswith("MALLOC_")} | EXACT_MEMORY
    with tempfile.TemporaryDirectory() as cache:
        # Nothing compiled before may be found.
        environment |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
        command = [sys.executable, __file__, what, case.name, variant, mode, device]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        sys.stderr.write(run.stderr)
        return {"fails": f"exit code {run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def first_compile(case: Case, variant: str, mode: str, device: str) -> dict[str, Any]:
    """Seconds until the first forward and backward are through, from before ``torch.compile``.

    Args:
        case: The model.
        variant: One of `VARIANTS`.
        mode: One of `MODES`.
        device: Where it runs.

    Returns:
        ``seconds``; for ours ``transform`` as well, those of `specnorm_fx.transform`, not among them.
    """
    measured = {}
    if variant == "ours":
        plain = case.make().to(device)  # not by `build`, which gives it a forward that no trace follows
        measured["transform"] = _seconds(lambda: specnorm_fx.transform(plain, case.select), device)
    model = build(case, variant, device)
    inputs = case.inputs(case.batch(device), device)
    # Imports, the search for a C++ compiler and the start of the compiler's own processes come before the
    # clock starts: they belong to no model.
    x = torch.ones(64, device=device, requires_grad=True)
    torch.compile(lambda x: (x.sin() + 1).sum())(x).backward()
    measured["seconds"] = _seconds(lambda: loss(in_mode(model, variant, mode)(*inputs)).backward(), device)
    return measured


def _seconds(call: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def memory(case: Case, variant: str, mode: str, device: str) -> dict[str, Any]:
    """Bytes in use at the peak of a training step.

    Args:
        case: The model.
        variant: One of `VARIANTS`.
        mode: One of `MODES`.
        device: Where it runs.
    """
    model = build(case, variant, device)
    inputs = case.inputs(case.batch(device), device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.0, 0.9))
    step = training_step(model, variant, mode, optimizer)
    for _ in range(WARM_UP):
        step(*inputs)
    gc.collect()
    return {"bytes": peak_memory(lambda: step(*inputs), device)}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["compile", "memory"])
    parser.add_argument("model", choices=CASES)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("mode", choices=MODES["cuda"])
    parser.add_argument("device", choices=MODES)
    args = parser.parse_args()
    measurement = {"compile": first_compile, "memory": memory}[args.what]
    try:
        measured = measurement(CASES[args.model], args.variant, args.mode, args.device)
    except Exception as error:  # torch's compiler raises of many kinds
        measured = {"fails": failure(error)}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()

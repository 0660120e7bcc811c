"""Time of many calls interleaved, and what else there is to count: kernels, memory."""

import gc
import json
import math
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["Series", "count_kernels", "failure", "interleave", "peak_memory", "synchronize"]

Key = TypeVar("Key", bound=Hashable)

# A sample lasts at least this long, of several calls if need be. On a GPU its end waits for the device, which
# must be small against it.
SAMPLE_SECONDS = {"cpu": 0.001, "cuda": 0.02}
# And of so many calls. In training the host is ahead of the device; were each step waited for, what the host
# does before the first kernel of the next would count as if the device had done it.
SAMPLE_CALLS = {"cpu": 1, "cuda": 8}
# The first compiles, with CUDA graphs the second warms up and the third records.
WARM_UP = 4


@dataclass
class Series:
    """The samples of one contender, a sample for each round.

    Attributes:
        values: In the order of the rounds.
        fails: Why there are none.
    """

    values: list[float] = field(default_factory=list)
    fails: str | None = None

    def summary(self, **baselines: "Series") -> dict[str, Any]:
        """Median, 20/80 percentiles and ratios, or why it fails.

        Args:
            **baselines: Others of the same rounds. For each that does not fail: how many times as long as it
                this one took. ``median``, ``p20`` and ``p80`` are those of the ratios within a round, which
                the machine's good and bad moments leave alone; ``of_medians`` is the other ratio.
        """
        if self.fails is not None:
            return {"fails": self.fails}
        found: dict[str, Any] = {**_spread(self.values), "samples": len(self.values)}
        for name, baseline in baselines.items():
            if baseline.fails is None and baseline is not self:
                ratios = [mine / other for mine, other in zip(self.values, baseline.values, strict=True)]
                of_medians = statistics.median(self.values) / statistics.median(baseline.values)
                found[name] = {**_spread(ratios), "of_medians": of_medians}
        return found


def _spread(values: list[float]) -> dict[str, float]:
    # One value has no quantiles, and is all three.
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": p20, "p80": p80}


def failure(error: BaseException) -> str:
    """An exception in one line without paths.

    Args:
        error: The exception.
    """
    line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return re.sub(r"(/[\w.+-]+){2,}", "<path>", line)[:200]


def synchronize(device: str) -> None:
    """Wait for what the device has been given.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    contenders: Mapping[Key, Callable[[], object]],
    device: str,
    repetitions: int,
    seconds: float,
) -> dict[Key, Series]:
    """Time calls in turn, round after round, so that all share the machine's good and bad moments.

    Each round takes them in another order: none always finds the cache that the same other one left.

    Args:
        contenders: What to call. One that raises is out, and its series says why.
        device: Where they run.
        repetitions: Rounds at most.
        seconds: No round begins later than this, but for the first three.

    Returns:
        Seconds a call.
    """
    series = {key: Series() for key in contenders}
    counts = {key: _warm_up(call, device, series[key]) for key, call in contenders.items()}
    order = random.Random(0)
    # What is alive now stays alive: collections during the rounds need not look through it.
    gc.collect()
    gc.freeze()
    start = time.perf_counter()
    for done in range(repetitions):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for key in order.sample(list(contenders), len(contenders)):
            if series[key].fails is None:
                _sample(contenders[key], device, counts[key], series[key])
    gc.unfreeze()
    return series


def _warm_up(call: Callable[[], object], device: str, series: Series) -> int:
    """Calls that one sample takes."""
    probe = Series()
    for _ in range(WARM_UP):
        if probe.fails is None:
            _sample(call, device, 1, probe)
    series.fails = probe.fails
    if probe.fails:
        return 1
    return max(SAMPLE_CALLS[device], math.ceil(SAMPLE_SECONDS[device] / probe.values[-1]))


def _sample(call: Callable[[], object], device: str, count: int, series: Series) -> None:
    try:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(device)
        series.values.append((time.perf_counter() - start) / count)
    except Exception as error:  # torch's compiler raises of many kinds; the others are measured all the same
        series.fails = failure(error)


def count_kernels(call: Callable[[], object]) -> dict[str, int]:
    """What one call gives a CUDA device to do, as the profiler sees it.

    Args:
        call: Warmed up.

    Returns:
        ``kernels`` that run; ``copies``, which are memcpy and memset; and ``launches`` by the host, fewer
        where a CUDA graph holds many kernels.
    """
    for _ in range(2):  # of the first, the profiler may miss the beginning
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return _count_events(json.loads(path.read_text())["traceEvents"])


def _count_events(events: list[dict[str, Any]]) -> dict[str, int]:
    kinds = [(event.get("cat"), event.get("name", "")) for event in events]
    return {
        "kernels": sum(kind == "kernel" for kind, _ in kinds),
        "copies": sum(kind in ("gpu_memcpy", "gpu_memset") for kind, _ in kinds),
        "launches": sum(kind in ("cuda_runtime", "cuda_driver") and "Launch" in name for kind, name in kinds),
    }


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes in use at the peak of one call, all that was there before included.

    On the CPU these are the process's resident pages. ``ru_maxrss`` would not do: it counts from before
    ``exec``, when the new process was still a copy of the one that started it.

    Args:
        call: Warmed up.
        device: Where it runs.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

"""Side by side: every contender's time in one process, taking turns, so that ratios are fair."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender, and the first one's time over its own within each turn.

    A ratio above 1 means: faster than the first.
    """

    median: float
    p20: float
    p80: float
    ratio: float
    samples: int


def clock(run: Run) -> list[float]:
    """One call by the wall clock, for a CPU."""
    start = time.perf_counter()
    run()
    return [1e3 * (time.perf_counter() - start)]


def cuda_events(run: Run) -> list[float]:
    """Some calls by CUDA events, after a warm-up, the L2 cache flushed before each."""
    from triton.testing import do_bench

    times: list[float] = do_bench(run, warmup=10, rep=50, return_mode="all")
    return times


def timer(device: torch.device) -> tuple[str, Callable[[Run], list[float]]]:
    """The name of the timer of a device, and the timer."""
    if device.type == "cuda":
        return "triton.testing.do_bench", cuda_events
    return "time.perf_counter", clock


def interleaved(
    runs: Mapping[str, Run],
    seconds: float,
    once: Callable[[Run], list[float]] = clock,
    turns: int = 6,
) -> dict[str, Times]:
    """Times of all contenders, in turns of about ``seconds`` in all, and at least ``turns``.

    The ratio is taken within each turn, so that a machine that slows down for a while (a laptop, a
    shared host) slows all of them. Who goes first changes from turn to turn.
    """
    names = list(runs)
    for _ in range(2):  # the first calls compile, allocate and warm up
        for name in names:
            runs[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    medians: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(medians[names[0]]) < turns:
        for name in names:
            times = once(runs[name])
            samples[name] += times
            medians[name].append(statistics.median(times))
        names.append(names.pop(0))
    first = medians[next(iter(runs))]
    return {name: _summary(samples[name], first, medians[name]) for name in runs}


def _summary(samples: list[float], first: list[float], own: list[float]) -> Times:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    ratio = statistics.median(a / b for a, b in zip(first, own, strict=True))
    return Times(statistics.median(samples), fifths[0], fifths[3], ratio, len(samples))


def geometric_mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))

"""The barrier among the programs of a group, alone: what one costs, and whether it counts right."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
import statistics
from typing import Any

import torch
import triton
import triton.language as tl

from fused_rnn.kernels.group import LINE, arrive, compile_target, needs_block_barriers, wait
from fused_rnn.tools.check.measure import cuda_seconds

ROUNDS = 1000
PROGRAMS = (2, 8, 32, 64, 128)  # as many of them as the chip has multiprocessors
QUICK_PROGRAMS = (2, 32)
LAUNCHES = 10


@triton.jit(do_not_specialize=["rounds", "programs"])
def barrier_kernel(counters, rounds, programs, BLOCK_BARRIER: tl.constexpr):
    """Every program announces a round and waits for all, ``rounds`` times."""
    step = 0
    while step < rounds:
        arrive(counters, step, BLOCK_BARRIER)
        wait(counters, step, programs, BLOCK_BARRIER)
        step += 1


def measure(programs: int, device: torch.device) -> dict[str, Any]:
    """Whether a barrier among ``programs`` counts right, and its microseconds.

    The launch costs what one without a round does. On a CPU, in an emulator, times mean nothing.
    """
    if device.type == "cpu":
        _launch(programs, 3, device)
        return {"state": "green"}
    empty, full = ([_launch(programs, n, device) for _ in range(LAUNCHES)] for n in (0, ROUNDS))
    spent = statistics.median(full[2:]) - statistics.median(empty[2:])  # the first ones warm up
    return {"state": "green", "us": spent / ROUNDS}


def _launch(programs: int, rounds: int, device: torch.device) -> float:
    """Microseconds of a launch on a GPU."""
    counters = torch.zeros(2 * LINE.value, dtype=torch.int32, device=device)
    own = needs_block_barriers(compile_target(device))
    options = {"num_warps": 4, "num_stages": 1, "launch_cooperative_grid": True}

    def launch() -> None:
        barrier_kernel[(programs,)](counters, rounds, programs, own, **options)

    if device.type == "cuda":
        us = 1e6 * cuda_seconds(launch)
    else:
        us = 0.0
        launch()
    expected = [(rounds + 1) // 2 * programs, rounds // 2 * programs]
    if counters[:: LINE.value].tolist() != expected:
        raise RuntimeError(f"counted {counters[:: LINE.value].tolist()}, not {expected}")
    return us

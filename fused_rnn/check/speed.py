"""The time of a layer beside torch.nn's: both take turns in one process."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from fused_rnn.check.rows import DTYPES, Row

TURNS = 7  # at least
SECONDS = 0.4  # for all times of a row


def times(row: Row, plain: nn.Module, fused: nn.Module, device: torch.device) -> dict[str, float]:
    """Microseconds of a time step, ours and torch.nn's, which take turns."""
    shape, dtype = (row.timed_steps, row.B), DTYPES[row.dtype]
    x = torch.randn(*shape, row.I, device=device).to(dtype)
    dout = torch.randn(*shape, row.H, device=device).to(dtype)
    leaf = x.clone().requires_grad_()

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def train(layer: nn.Module) -> None:
        torch.autograd.grad(layer(leaf)[0], [leaf, *layer.parameters()], dout)

    found: dict[str, float] = {}
    for mode, call in (("forward", forward), ("train", train)):
        ours, theirs = in_turns(lambda: call(fused), lambda: call(plain), device)  # noqa: B023
        found[f"{mode}_us"] = 1e6 * ours / row.timed_steps
        found[f"torch_{mode}_us"] = 1e6 * theirs / row.timed_steps
        found[f"{mode}_ratio"] = theirs / ours
    return found


def in_turns(
    first: Callable[[], None], second: Callable[[], None], device: torch.device
) -> tuple[float, float]:
    """Median seconds of two calls that take turns, so that a slow moment is one of both."""
    clock = cuda_seconds if device.type == "cuda" else seconds
    for _ in range(2):  # to compile, to allocate
        first()
        second()
    found: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS / 2
    while len(found) < TURNS or time.perf_counter() < end:
        found.append((clock(first), clock(second)))
    ours, theirs = zip(*found, strict=True)
    return statistics.median(ours), statistics.median(theirs)


def seconds(call: Callable[[], None]) -> float:
    """Of a call, by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Callable[[], None]) -> float:
    """Of a call, until the GPU is done."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return 1e-3 * milliseconds

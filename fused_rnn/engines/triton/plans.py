"""Measured plans: time the best guesses of the planner on this GPU, and remember the winner.

What is remembered (see :mod:`fused_rnn.engines.measured`) holds for a cell, H, dtype and precision,
directions, a class of batch sizes, the GPU and the versions of Triton and this package: not for a
length, nor for one batch size.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_rnn.engines import measured
from fused_rnn.kernels.chips import Limits
from fused_rnn.kernels.plan import Plan, PlanRequest
from fused_rnn.kernels.planner import plans

CANDIDATES = 6  # plans that are timed, the best guesses
STEPS = 64  # of a timed sequence: enough that the launch does not count


def key(request: PlanRequest, device: torch.device) -> str:
    """The entry of a request among the remembered plans."""
    batch = 1 << (request.B - 1).bit_length()
    dtype = str(request.dtype).removeprefix("torch.")
    return (
        f"{request.cell.name} H={request.H} {dtype} {request.precision} D={request.D} B<={batch} "
        f"{measured.place(device)}"
    )


@lru_cache(maxsize=4096)
def planned(request: PlanRequest, limits: Limits) -> tuple[Plan, ...]:
    """:func:`fused_rnn.kernels.planner.plans`, kept: it is asked in every call of a layer."""
    return tuple(plans(request, limits))


Chooser = Callable[[PlanRequest, Limits], Plan]
Timer = Callable[[Plan, PlanRequest, torch.device], float]  # milliseconds of both sweeps
_forced: list[Chooser] = []


@contextmanager
def forced(chooser: Chooser) -> Iterator[None]:
    """Let ``chooser(request, limits)`` plan all layers of this process, as benchmarks need it."""
    _forced.append(chooser)
    try:
        yield
    finally:
        _forced.pop()


def choose_plan(request: PlanRequest, limits: Limits, device: torch.device) -> Plan:
    """The remembered plan, else the best guess; with FUSED_RNN_TUNE=1 guesses are timed first.

    Raises:
        DoesNotFit: there is no plan.
    """
    if _forced:
        return _forced[-1](request, limits)
    if device.type != "cuda":
        return planned(request, limits)[0]
    version = measured.plans.refresh()
    chosen = _chosen.get((request, device))
    if chosen is None or chosen[:2] != (version, limits):
        plan, settled = _choose(request, limits, device)
        if not settled:
            return plan
        chosen = _chosen[request, device] = (measured.plans.version, limits, plan)
    return chosen[2]


# What was chosen, for which version of the measured plans and what limits.
_chosen: dict[tuple[PlanRequest, torch.device], tuple[int, Limits, Plan]] = {}


def _choose(request: PlanRequest, limits: Limits, device: torch.device) -> tuple[Plan, bool]:
    """The plan, and whether it is to be kept."""
    candidates = planned(request, limits)
    remembered = measured.plans.get(key(request, device))
    for plan in candidates:
        if _marks(plan) == remembered:
            return plan, True
    if os.environ.get("FUSED_RNN_TUNE") != "1":
        return candidates[0], True
    # A tracer's tensors hold nothing to be timed.
    if type(torch.empty(0)) is not Tensor or torch.cuda.is_current_stream_capturing():
        return candidates[0], False
    best = _fastest(request, limits, device, time_sweeps)
    try:
        measured.plans.remember(key(request, device), _marks(best))
    except OSError as error:  # a call of a layer is not to fail for that
        warnings.warn(f"A plan was timed, but cannot be remembered: {error}", stacklevel=2)
    return best, True


def measure(
    request: PlanRequest,
    limits: Limits,
    device: torch.device,
    timer: Timer | None = None,
) -> Plan:
    """Time the best guesses for a request and remember the fastest.

    Args:
        request: what to plan.
        limits: the chip.
        device: where to run.
        timer: milliseconds of both sweeps under a plan; by default they are run. A plan for which
            it raises RuntimeError is out, with a warning.

    Raises:
        OSError: the winner cannot be written; this process uses it nevertheless.
        RuntimeError: all of them failed.
    """
    best = _fastest(request, limits, device, timer or time_sweeps)
    measured.plans.remember(key(request, device), _marks(best))
    return best


def _fastest(request: PlanRequest, limits: Limits, device: torch.device, timer: Timer) -> Plan:
    times: dict[Plan, float] = {}
    failures: list[str] = []
    for plan in planned(request, limits)[:CANDIDATES]:
        try:
            times[plan] = timer(plan, request, device)
        except RuntimeError as error:  # noqa: PERF203
            failures.append(str(error))
    if not times:
        raise RuntimeError("no plan could be timed: " + "; ".join(failures))
    if failures:
        warnings.warn(f"Some plans could not be timed: {'; '.join(failures)}", stacklevel=2)
    return min(times, key=lambda plan: times[plan])


def time_sweeps(plan: Plan, request: PlanRequest, device: torch.device) -> float:
    """Median milliseconds of a forward and a reverse sweep over STEPS steps of random numbers."""
    from triton.testing import do_bench

    from fused_rnn.kernels.sweep import DeviceLayout, Sweep
    from fused_rnn.kernels.sweeps import forward_sweep, reverse_sweep

    cell, H, dtype, B, D, precision, *_ = request
    layout = DeviceLayout(STEPS, B, STEPS * B)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    gates, w = random(D, layout.N, H, cell.slots), random(D, cell.gates * H, H) * H**-0.5
    bias = random(D, H) if cell.splits_last_gate else None
    h0, c0 = random(D, B, H), random(D, B, (cell.states - 1) * H) if cell.states > 1 else None
    vectors = random(D, cell.parameters, H) if cell.parameters else None
    out, dout = random(layout.N, D * H), random(layout.N, D * H)
    reverse = tuple(d == 1 for d in range(D))
    sweep = Sweep(cell, layout, reverse, precision, plan)

    def sweeps() -> None:
        c_seq = forward_sweep(sweep, gates, w, bias, h0, c0, out, save=True, vectors=vectors).c_seq
        saved = gates if cell.keeps_gates else None
        reverse_sweep(sweep, saved, c_seq, out, w, h0, c0, dout, None, None, None, vectors)

    with torch.cuda.device(device):
        return float(do_bench(sweeps, return_mode="median"))


def _marks(plan: Plan) -> list[Any]:
    """What tells a plan from the other ones for the same request."""
    joined = ["joined"] if plan.joined else []  # else as they were before there was such a plan
    return [plan.regime, plan.block_h, plan.block_k, plan.block_b, plan.warps, *joined]

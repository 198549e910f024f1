"""Measured plans: time the best guesses of the planner on this GPU, and remember the winner.

What is remembered (see :mod:`fused_rnn.measured`) holds for a cell, H, dtype and precision,
directions, a class of batch sizes, the GPU and the versions of Triton and this package: not for a
length, nor for one batch size.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import contest, measured
from fused_rnn.problem import Layer

if TYPE_CHECKING:
    from fused_rnn.base import FusedRNNBase
    from fused_rnn.kernels.plan import Limits, Plan

CANDIDATES = 6  # plans that are timed, the best guesses
STEPS = 64  # of a timed sequence: enough that the launch does not count


class Request(NamedTuple):
    """What a plan is asked for; see :func:`fused_rnn.kernels.plan.plans`."""

    cell: str
    H: int
    dtype: torch.dtype
    B: int
    D: int
    precision: Literal["ieee", "tf32"]

    @classmethod
    def of(
        cls, layer: Layer, H: int, dtype: torch.dtype, precision: Literal["ieee", "tf32"]
    ) -> "Request":
        """That of a layer with ``H`` hidden units in ``dtype``."""
        return cls(layer.cell.name, H, dtype, layer.rows.B, layer.directions, precision)

    def key(self, device: torch.device) -> str:
        """Its entry among the remembered plans."""
        batch = 1 << (self.B - 1).bit_length()
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.cell} H={self.H} {dtype} {self.precision} D={self.D} B<={batch} "
            f"{measured.place(device)}"
        )


@lru_cache(maxsize=4096)
def planned(request: Request, limits: "Limits") -> "tuple[Plan, ...]":
    """:func:`fused_rnn.kernels.plan.plans`, kept: it is asked in every call of a layer."""
    from fused_rnn.kernels.plan import plans

    return tuple(
        plans(
            request.cell,
            request.H,
            request.dtype.itemsize,
            request.B,
            request.D,
            limits,
            precision=request.precision,
        )
    )


Chooser = Callable[[Request, "Limits"], "Plan"]
Timer = Callable[["Plan", Request, torch.device], float]  # milliseconds of both sweeps
_forced: list[Chooser] = []


@contextmanager
def forced(chooser: Chooser) -> Iterator[None]:
    """Let ``chooser(request, limits)`` plan all layers of this process, as benchmarks need it."""
    _forced.append(chooser)
    try:
        yield
    finally:
        _forced.pop()


def choose_plan(request: Request, limits: "Limits", device: torch.device) -> "Plan":
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
_chosen: "dict[tuple[Request, torch.device], tuple[int, Limits, Plan]]" = {}


def _choose(request: Request, limits: "Limits", device: torch.device) -> "tuple[Plan, bool]":
    """The plan, and whether it is to be kept."""
    found = planned(request, limits)
    remembered = measured.plans.get(request.key(device))
    for plan in found:
        if _marks(plan) == remembered:
            return plan, True
    if os.environ.get("FUSED_RNN_TUNE") != "1":
        return found[0], True
    # A tracer's tensors hold nothing to be timed.
    if type(torch.empty(0)) is not Tensor or torch.cuda.is_current_stream_capturing():
        return found[0], False
    best = _fastest(request, limits, device, time_sweeps)
    try:
        measured.plans.remember(request.key(device), _marks(best))
    except OSError as error:  # a call of a layer is not to fail for that
        warnings.warn(f"A plan was timed, but cannot be remembered: {error}", stacklevel=2)
    return best, True


def measure(
    request: Request,
    limits: "Limits",
    device: torch.device,
    timer: "Timer | None" = None,
) -> "Plan":
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
    measured.plans.remember(request.key(device), _marks(best))
    return best


def _fastest(request: Request, limits: "Limits", device: torch.device, timer: "Timer") -> "Plan":
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


def time_sweeps(plan: "Plan", request: Request, device: torch.device) -> float:
    """Median milliseconds of a forward and a reverse sweep over STEPS steps of random numbers."""
    from triton.testing import do_bench

    from fused_rnn.kernels.backward import reverse_sweep
    from fused_rnn.kernels.forward import Rows, forward_sweep
    from fused_rnn.kernels.plan import SPECS

    spec, H, B, D = SPECS[request.cell], request.H, request.B, request.D
    rows = Rows(STEPS, B, STEPS * B)

    def random(*shape: int, dtype: torch.dtype = request.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    gates, w = random(D, rows.N, H, spec.slots), random(D, spec.gates * H, H) * H**-0.5
    bias = random(D, H) if spec.gates == 3 else None
    h0, c0 = random(D, B, H), random(D, B, H) if spec.states == 2 else None
    out, dout = random(rows.N, D * H), random(rows.N, D * H)
    how: dict[str, Any] = {"rows": rows, "reverse": tuple(d == 1 for d in range(D))}
    how |= {"precision": request.precision, "plan": plan}

    def sweeps() -> None:
        c_seq = forward_sweep(request.cell, gates, w, bias, h0, c0, out, save=True, **how).c_seq
        saved = gates if spec.slots == 4 else None
        reverse_sweep(request.cell, saved, c_seq, out, w, h0, c0, dout, None, None, **how)

    with torch.cuda.device(device):
        return float(do_bench(sweeps, return_mode="median"))


def tune(layer: "FusedRNNBase", x: Tensor | PackedSequence) -> "tuple[Plan, ...]":
    """Time the best plans for ``layer`` on inputs like ``x``, and use the winner from now on.

    The winner then meets torch.nn's own kernels, in inference and in training; where those are
    faster, ``backend="auto"`` takes them for inputs of this kind from now on.

    Args:
        layer: a fused layer on a GPU.
        x: an input that it accepts; its batch size counts, and for the last of this its length.

    Returns:
        the plan of each layer of the stack

    Raises:
        OSError: the winner cannot be written; this process uses it nevertheless.
        RuntimeError: the layer would not run on Triton kernels, with the reason.
        TypeError: ``layer`` is not a fused layer.
        ValueError: ``x`` does not fit the layer, as in a call.
    """
    from fused_rnn import native
    from fused_rnn.devices import device_limits
    from fused_rnn.explain import problem_of
    from fused_rnn.triton_backend import make_engine
    from fused_rnn.triton_engine import TritonEngine

    problem, device, dtype = problem_of(layer, x)
    engine = make_engine(problem, device, dtype, layer.hidden_size, layer.proj_size > 0)
    if not isinstance(engine, TritonEngine):
        raise RuntimeError(f"there is nothing to tune: {engine}")
    if device.type != "cuda":
        raise RuntimeError("there is nothing to tune: Triton's interpreter runs these kernels")
    request = Request.of(problem, layer.hidden_size, dtype, engine.precision)
    plan = measure(request, device_limits(device), device)
    if native.why_not(problem, device) is None:
        contest.hold(layer, x, request, problem.rows, device)
    return (plan,) * layer.num_layers


def _marks(plan: "Plan") -> list[Any]:
    """What tells a plan from the other ones for the same request."""
    return [plan.regime, plan.block_h, plan.block_k, plan.block_b, plan.warps]

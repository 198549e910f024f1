"""Who can run a case: torch.nn, a compiled loop, ours in each regime, and the peers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_rnn
from bench import sweeps
from bench.adapter import Forward, Provider, first
from bench.cases import Case
from bench.peers import FlashRNN, Haste, TorchRL
from bench.roofline import kernel_cell
from bench.timing import Run
from fused_rnn.cells.builtin import CELLS
from fused_rnn.engines.triton import devices, plans, support
from fused_rnn.kernels.plan import DoesNotFit, Plan, PlanRequest, Precision


class TorchNN(Provider):
    """torch.nn's own layer: cuDNN, MIOpen, oneDNN or ATen's loop."""

    name = "torch.nn"

    def layer(self, plain: nn.RNNBase, case: Case) -> tuple[nn.Module, Forward]:
        return plain, first(plain)


class CompiledLoop(Provider):
    """The eager loop, its step through torch.compile.

    Not the loop as a whole: that is unrolled, and takes minutes to compile for some hundred steps.
    """

    name = "torch.compile, step by step"
    exact = False

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    def layer(self, plain: nn.RNNBase, case: Case) -> tuple[nn.Module, Forward]:
        cell = CELLS[case.cell]

        def step(gx: Tensor, h: Tensor, c: Tensor | None, w: Tensor, b: Tensor) -> Any:
            return cell.one_step(gx, F.linear(h, w, b), (h,) if c is None else (h, c))

        compiled = torch.compile(step, backend=self.backend, dynamic=False)

        def run(x: Tensor) -> Tensor:
            w_ih, w_hh, b_ih, b_hh = plain.parameters()
            h: Any = x.new_zeros(case.B, case.H)
            c: Any = h
            out = []
            for gx in F.linear(x, w_ih, b_ih):
                h, *others = compiled(gx, h, c if cell.has_c else None, w_hh, b_hh)
                c = others[0] if others else None
                out.append(h)
            return torch.stack(out)

        return plain, run


class Fused(Provider):
    """fused_rnn: as it chooses, by the best plan of one regime, or on torch.nn's kernels."""

    loops = True

    def __init__(
        self, regime: str | None = None, recompute: bool = False, native: bool = False
    ) -> None:
        self.regime, self.recompute, self.native = regime, recompute, native
        self.name = "fused_rnn" + (f" {regime}" if regime else "") + " recompute" * recompute
        self.name += " native" * native

    def plan(self, case: Case, device: torch.device) -> Plan | None:
        """Of the regime, or the one that is taken by itself; None if there is none."""
        if devices.kernel_device(device) is None:
            return None
        if support.refusal_of_dtype(case.torch_dtype):
            return None
        D = case.directions * case.heads
        precision: Precision = "ieee" if case.dtype == "fp32" else "tf32"
        request = PlanRequest(kernel_cell(case), case.H, case.torch_dtype, case.B, D, precision)
        try:
            limits = devices.device_limits(device)
            if self.regime is None:
                return plans.choose_plan(request, limits, device)
            candidates = plans.planned(request, limits)
        except (DoesNotFit, devices.UnknownDevice):
            return None
        return next((plan for plan in candidates if plan.regime == self.regime), None)

    def why_not(self, case: Case, mode: str, device: torch.device) -> str | None:
        sweep = mode.startswith("sweep")
        if sweep and self.native:
            return "torch.nn's kernels are timed with the products around them"
        if sweep and (case.packed or case.bidirectional or case.layers > 1 or self.recompute):
            return "sweeps alone are timed for one direction, one length, one layer, saved gates"
        if (sweep or self.regime) and devices.kernel_device(device) is None:
            return "the kernels need a GPU"
        if (sweep or self.regime) and self.plan(case, device) is None:
            return f"the planner has no {self.regime or 'plan'} here"
        return super().why_not(case, mode, device)

    def detail(self, case: Case, device: torch.device) -> str:
        plan = self.plan(case, device)
        if plan is not None and (self.regime or case.heads > 1):
            return str(plan) + "; in Triton's interpreter" * (device.type == "cpu")
        backend: Any = "native" if self.native else "auto"
        layer: Any = fused_rnn.fuse(case.layer(device), backend=backend, recompute=self.recompute)
        reasons = (one.reason for one in fused_rnn.explain(layer, case.input(device)))
        return " and ".join(dict.fromkeys(reasons))  # of the layers of a stack

    def layer(self, plain: nn.RNNBase, case: Case) -> tuple[nn.Module, Forward]:
        backend: Any = "native" if self.native else "auto"
        fused = fused_rnn.fuse(plain, backend=backend, recompute=self.recompute)
        if self.regime is None:
            return fused, first(fused)
        fused.backend = "triton"  # type: ignore[assignment]
        plan = self.plan(case, next(plain.parameters()).device)
        assert plan is not None  # asked for by `why_not`
        run = first(fused)

        def planned(x: Any) -> Tensor:
            with plans.forced(lambda *_: plan):
                return run(x)

        return fused, planned

    def sweep(self, case: Case, device: torch.device, train: bool) -> Run:
        plan = self.plan(case, device)
        assert plan is not None
        return sweeps.ours(case, device, plan, train)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        TorchNN(),
        Fused(),
        Fused("persistent"),
        Fused("cooperative"),
        Fused("streamed"),
        Fused(recompute=True),
        Fused(native=True),
        CompiledLoop(),
        FlashRNN(),
        FlashRNN("cuda_fused"),
        Haste(),
        TorchRL(),
    )
}
ON_CPU = ("torch.nn", "fused_rnn")  # what is timed there unless more is asked for

"""Our time loops alone, without the layer's large matrix products."""

import torch
from torch import Tensor

from bench.cases import Case
from bench.roofline import kernel_cell
from bench.timing import Run
from fused_rnn.kernels.plan import Plan, Precision
from fused_rnn.kernels.sweep import DeviceLayout, Sweep
from fused_rnn.kernels.sweeps import forward_sweep, reverse_sweep


def ours(case: Case, device: torch.device, plan: Plan, train: bool) -> Run:
    """The forward sweep of random numbers, or with ``train`` both sweeps.

    Heads run as what the kernels call directions: recurrences that share a launch, and no weights.
    The sweep overwrites its input by activated gates, so that a second call reads those: numbers in
    [-1, 1], the same work.
    """
    cell, D = kernel_cell(case), case.heads
    layout = DeviceLayout(case.T, case.B, case.T * case.B)

    def random(*shape: int, dtype: torch.dtype = case.torch_dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    gates = random(D, layout.N, case.H, cell.slots)
    w = random(D, cell.gates * case.H, case.H) * case.H**-0.5
    bias = random(D, case.H) if cell.splits_last_gate else None
    h0 = random(D, case.B, case.H)
    c0 = random(D, case.B, case.H) if cell.states == 2 else None
    out, dout = random(layout.N, D * case.H), random(layout.N, D * case.H)
    precision: Precision = "ieee" if case.dtype == "fp32" else "tf32"
    if device.type == "cpu":
        precision = "ieee"  # all that the interpreter has
    sweep = Sweep(cell, layout, (False,) * D, precision, plan)

    def forward() -> Tensor | None:
        return forward_sweep(sweep, gates, w, bias, h0, c0, out, save=train).c_seq

    def both() -> object:
        saved = gates if cell.keeps_gates else None
        return reverse_sweep(sweep, saved, forward(), out, w, h0, c0, dout, None, None)

    return both if train else forward

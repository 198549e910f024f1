"""Our time loops alone, without the layer's large matrix products."""

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.timing import Run
from fused_rnn.kernels.backward import reverse_sweep
from fused_rnn.kernels.forward import Rows, forward_sweep
from fused_rnn.kernels.plan import SPECS, Plan


def ours(case: Case, device: torch.device, plan: Plan, train: bool) -> Run:
    """The forward sweep of random numbers, or with ``train`` both sweeps.

    Heads run as what the kernels call directions: recurrences that share a launch, and no weights.
    The sweep overwrites its input by activated gates, so that a second call reads those: numbers in
    [-1, 1], the same work.
    """
    spec, D = SPECS[case.cell], case.heads
    rows = Rows(case.T, case.B, case.T * case.B)

    def random(*shape: int, dtype: torch.dtype = case.torch_dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    gates = random(D, rows.N, case.H, spec.slots)
    w = random(D, spec.gates * case.H, case.H) * case.H**-0.5
    bias = random(D, case.H) if spec.gates == 3 else None
    h0 = random(D, case.B, case.H)
    c0 = random(D, case.B, case.H) if spec.states == 2 else None
    out, dout = random(rows.N, D * case.H), random(rows.N, D * case.H)
    precision = "ieee" if case.dtype == "fp32" else "tf32"
    if device.type == "cpu":
        precision = "ieee"  # all that the interpreter has
    how: dict[str, Any] = {"rows": rows, "reverse": (False,) * D, "precision": precision}
    how["plan"] = plan

    def forward() -> Tensor | None:
        return forward_sweep(case.cell, gates, w, bias, h0, c0, out, save=train, **how)[2]

    def both() -> object:
        saved = gates if spec.slots == 4 else None
        return reverse_sweep(case.cell, saved, forward(), out, w, h0, c0, dout, None, None, **how)

    return both if train else forward

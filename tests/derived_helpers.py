"""A cell of tests, and the CPU engine against the eager loop."""

import copy
from typing import Any

import torch
from torch import Tensor

from fused_rnn import FusedRecurrent, cell
from fused_rnn.spec.cells import Cell


@cell(gates="ifgo", states="hc", parameters=("p_i", "p_f", "p_o"))
def peephole(gates: Any, state: Any, p: Any) -> tuple[Tensor, Tensor]:
    """The LSTM whose gates see the cell state."""
    i = torch.sigmoid(gates.i + p.p_i * state.c)
    f = torch.sigmoid(gates.f + p.p_f * state.c)
    c = f * state.c + i * torch.tanh(gates.g)
    return torch.sigmoid(gates.o + p.p_o * c) * torch.tanh(c), c


def layer_pair(made: Cell, **options: Any) -> tuple[FusedRecurrent, FusedRecurrent]:
    """The layer on the CPU engine, and the same in the eager loop."""
    torch.manual_seed(0)
    ours = FusedRecurrent(made, 3, 6, dtype=torch.float64, backend="cpu", **options)
    eager = copy.deepcopy(ours)
    eager.backend = "eager"
    return ours, eager


def results(layer: FusedRecurrent, x: Tensor, **call: Any) -> list[Tensor]:
    """Outputs, final states and all gradients of a loss that weighs each number differently."""
    output, states = layer(x, **call)
    states = (states,) if isinstance(states, Tensor) else states
    loss = 0 * x.sum()  # a step may do without anything
    for i, t in enumerate((output, *states)):
        loss = loss + (t * torch.arange(t.numel()).view(t.shape).add(i).to(t.dtype).sin()).sum()
    grads = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
    inputs = [x, *layer.parameters()]
    full = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]
    return [output, *states, *full]


def assert_equal(made: Cell, call: dict[str, Any] | None = None, **options: Any) -> None:
    """The CPU engine's results equal those of the eager loop, in fp64."""
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    ours, eager = layer_pair(made, **options)
    for found, expected in zip(
        results(ours, x, **call or {}), results(eager, x, **call or {}), strict=True
    ):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale)

"""The eager backend: the naive loop, differentiable to any order, in any dtype, on any device.

It defines what every other backend must compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rnn.cells import Cell
from fused_rnn.problem import Layer, Outputs, Saved, Weights
from fused_rnn.rows import Rows


def forward(
    layer: Layer, x: Tensor, h0: Tensor, c0: Tensor | None, *flat: Tensor | None
) -> Outputs:
    """One layer, all its directions; shapes as in :func:`fused_rnn.functional.rnn_layer`."""
    outs, h_n, c_n = [], [], []
    for d, weights in enumerate(layer.unflatten(flat)):
        initial = (h0[d], None if c0 is None else c0[d])
        out, h, c = _direction(layer.cell, x, initial, weights, layer.rows, reverse=d == 1)
        outs.append(out)
        h_n.append(h)
        c_n.append(c)
    return Outputs(
        torch.cat(outs, dim=1),
        torch.stack(h_n),
        torch.stack([c for c in c_n if c is not None]) if layer.cell.has_c else None,
    )


def run(layer: Layer, inputs: Saved) -> Outputs:
    """The same for ``inputs`` as in :class:`fused_rnn.problem.Engine`."""
    x, h0, c0, *flat = inputs
    assert x is not None
    assert h0 is not None
    return forward(layer, x, h0, c0, *flat)


def _direction(
    cell: Cell,
    x: Tensor,
    initial: tuple[Tensor, Tensor | None],
    weights: Weights,
    rows: Rows,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    gx = rows.split(F.linear(x, weights.w_ih, weights.b_ih))
    out: list[Tensor] = [x] * rows.T  # every entry is replaced below
    states: list[Tensor | None] = list(initial)
    for t in range(rows.T - 1, -1, -1) if reverse else range(rows.T):
        n = gx[t].shape[0]
        # Sequences that have ended, or in the reverse direction not begun, keep their state.
        running = (_head(states[0], n), None if states[1] is None else _head(states[1], n))
        h, c = cell.step(gx[t], F.linear(running[0], weights.w_hh, weights.b_hh), running)
        if weights.w_hr is not None:
            h = F.linear(h, weights.w_hr)
        out[t] = h
        for i, new in enumerate((h, c)):
            old = states[i]
            if new is not None and old is not None:
                states[i] = new if n == old.shape[0] else torch.cat([new, old[n:]])
    h_n, c_n = states
    assert h_n is not None
    return torch.cat(out), h_n, c_n


def _head(state: Tensor | None, n: int) -> Tensor:
    assert state is not None
    return state if n == state.shape[0] else state[:n]

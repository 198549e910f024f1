"""The eager backend: the naive loop, differentiable to any order, in any dtype, on any device.

It defines what every other backend must compute.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rnn import extras
from fused_rnn.problem import Layer, Masks, Outputs, Saved, Weights


def forward(
    layer: Layer, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Tensor | None
) -> Outputs:
    """One layer, all its directions; shapes as in :func:`fused_rnn.functional.rnn_layer`."""
    masks = layer.masks((x, h0, c0, *rest))
    resets = extras.resets(layer, masks)
    found = []
    for d, weights in enumerate(layer.unflatten(rest)):
        direction = _Direction(layer, masks, None if resets is None else resets[d], weights, d)
        found.append(direction.run(x, h0[d], None if c0 is None else c0[d]))
    outs, h_n, c_n, c_seq = zip(*found, strict=True)
    return Outputs(
        torch.cat(outs, dim=1),
        torch.stack(h_n),
        torch.stack(c_n) if layer.cell.has_c else None,
        torch.cat(c_seq, dim=1) if layer.extras is not None and layer.extras.cells else None,
    )


def run(layer: Layer, inputs: Saved) -> Outputs:
    """The same for ``inputs`` as in :class:`fused_rnn.problem.Engine`."""
    x, h0, c0, *rest = inputs
    assert x is not None
    assert h0 is not None
    return forward(layer, x, h0, c0, *rest)


class _Direction:
    """One direction ``d`` of a layer."""

    def __init__(
        self, layer: Layer, masks: Masks, reset: Tensor | None, weights: Weights, d: int
    ) -> None:
        self.layer, self.weights, self.d, self.lengths = layer, weights, d, masks.lengths
        self.zoneout = 0.0 if layer.extras is None else layer.extras.zoneout
        self.clip = None if layer.extras is None else layer.extras.clip
        self.restart = [None if r is None else r[d] for r in (masks.restart_h, masks.restart_c)]
        self.drop = None if masks.drop is None else masks.drop[d]
        split = layer.rows.split
        self.reset = None if reset is None else split(reset)
        zones = [None if z is None else z.chunk(layer.directions, 1)[d] for z in masks[4:6]]
        self.zones = [None if z is None else split(z) for z in zones]

    def run(
        self, x: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``out`` [N, R], the final states [B, .], and c of all steps [N, H]."""
        layer, w, rows = self.layer, self.weights, self.layer.rows
        gx = rows.split(F.linear(x, w.w_ih, w.b_ih))
        sequences: list[list[Tensor]] = [[x] * rows.T for _ in "hc"]  # every entry is replaced
        states = [h] if c is None else [h, c]
        for t in range(rows.T - 1, -1, -1) if self.d == 1 else range(rows.T):
            n = gx[t].shape[0]
            # Sequences that have ended, or in the reverse direction not begun, keep their state.
            running = [s if n == s.shape[0] else s[:n] for s in states]
            new = running if layer.extras is None else self._enter(t, running)
            fed = new[0] if self.drop is None else new[0] * self.drop[:n]
            before = new[0], new[1] if len(new) == 2 else None
            h, c = layer.cell.step(gx[t], F.linear(fed, w.w_hh, w.b_hh), before)
            if w.w_hr is not None:
                h = F.linear(h, w.w_hr)
            new = outputs = [h] if c is None else [h, c]
            if layer.extras is not None:
                new, outputs = self._leave(t, new, running, before)
            for i, (state, output) in enumerate(zip(new, outputs, strict=True)):
                sequences[i][t] = output
                old = states[i]
                states[i] = state if n == old.shape[0] else torch.cat([state, old[n:]])
        wanted = layer.extras is not None and layer.extras.cells
        c_seq = torch.cat(sequences[1]) if wanted else None
        return torch.cat(sequences[0]), states[0], states[1] if len(states) == 2 else None, c_seq

    def _enter(self, t: int, states: list[Tensor]) -> list[Tensor]:
        """The states that step ``t`` works on."""
        if self.reset is not None:
            again = self.reset[t][:, None]
            states = [
                torch.where(again, s.new_zeros(()) if r is None else r, s)
                for s, r in zip(states, self.restart, strict=False)
            ]
        return [extras.clip_gradient(s, self.clip) for s in states]

    def _leave(
        self, t: int, new: list[Tensor], running: list[Tensor], before: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states after step ``t``, and what it puts out."""
        for i, (state, old, zone) in enumerate(zip(new, before, self.zones, strict=False)):
            assert old is not None
            if zone is not None:
                new[i] = torch.where(zone[t], old, state)
            elif self.zoneout:
                new[i] = self.zoneout * old + (1 - self.zoneout) * state
        if self.lengths is None:
            return new, new
        on = (t < self.lengths)[:, None]
        outputs = [torch.where(on, s, s.new_zeros(())) for s in new]
        return [torch.where(on, s, r) for s, r in zip(new, running, strict=True)], outputs

"""The eager loop: naive, differentiable to any order, in any dtype, on any device.

It defines what every engine must compute. It is an engine itself, too, for callers who cannot leave
differentiation to autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rnn.spec.layer import (
    InputGrads,
    LayerInputs,
    LayerSpec,
    Needs,
    OutputGrads,
    Outputs,
    Saved,
    Specs,
    Weights,
)
from fused_rnn.spec.options import resets


def run(spec: LayerSpec, inputs: LayerInputs) -> Outputs:
    """One layer, all its directions."""
    x, h0, c0, weights, options = inputs
    reset = resets(spec, options)
    directions = []
    for d, w in enumerate(weights):
        direction = _Direction(spec, inputs, None if reset is None else reset[d], w, d)
        directions.append(direction.run(x, h0[d], None if c0 is None else c0[d]))
    outs, h_n, c_n, c_seq = zip(*directions, strict=True)
    return Outputs(
        torch.cat(outs, dim=1),
        torch.stack(h_n),
        torch.stack(c_n) if spec.cell.has_c else None,
        torch.cat(c_seq, dim=1) if spec.options is not None and spec.options.cells else None,
    )


class _Direction:
    """One direction ``d`` of a layer; ``reset`` [N] is in its own order."""

    def __init__(
        self,
        spec: LayerSpec,
        inputs: LayerInputs,
        reset: Tensor | None,
        weights: Weights,
        d: int,
    ) -> None:
        self.spec, self.weights, self.d = spec, weights, d
        lengths, _, *restart, zone_h, zone_c, drop = inputs.options
        self.lengths = lengths
        self.zoneout = 0.0 if spec.options is None else spec.options.zoneout
        self.clip = None if spec.options is None else spec.options.clip
        self.restart = [None if r is None else r[d] for r in restart]
        self.drop = None if drop is None else drop[d]
        split = spec.layout.split
        self.reset = None if reset is None else split(reset)
        zones = [None if z is None else z.chunk(spec.directions, 1)[d] for z in (zone_h, zone_c)]
        self.zones = [None if z is None else split(z) for z in zones]

    def run(
        self, x: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``out`` [N, R], the final states [B, .], and c of all steps [N, K*H]."""
        spec, w, layout = self.spec, self.weights, self.spec.layout
        gx = layout.split(F.linear(x, w.w_ih, w.b_ih))
        sequences: list[list[Tensor]] = [[x] * layout.T for _ in "hc"]  # every entry is replaced
        one_step, K = spec.cell.one_step, len(spec.cell.states) - 1
        states = [h] if c is None else [h, c]
        for t in range(layout.T - 1, -1, -1) if self.d == 1 else range(layout.T):
            n = gx[t].shape[0]
            # Sequences that have ended, or in the reverse direction not begun, keep their state.
            running = [s if n == s.shape[0] else s[:n] for s in states]
            new = running if spec.options is None else self._enter(t, running)
            operand = new[0] if self.drop is None else new[0] * self.drop[:n]
            before = new
            others = [] if K == 0 else [before[1]] if K == 1 else before[1].chunk(K, 1)
            gh = recurrent_product(operand, w)
            h, *others = one_step(gx[t], gh, (before[0], *others), w.vectors, spec.heads)
            if w.w_hr is not None:
                h = F.linear(h, w.w_hr)
            new = outputs = [h, *others] if K < 2 else [h, torch.cat(others, 1)]
            if spec.options is not None:
                new, outputs = self._leave(t, new, running, before)
            for i, (state, output) in enumerate(zip(new, outputs, strict=True)):
                sequences[i][t] = output
                old = states[i]
                states[i] = state if n == old.shape[0] else torch.cat([state, old[n:]])
        wanted = spec.options is not None and spec.options.cells
        c_seq = torch.cat(sequences[1]) if wanted else None
        return torch.cat(sequences[0]), states[0], states[1] if len(states) == 2 else None, c_seq

    def _enter(self, t: int, states: list[Tensor]) -> list[Tensor]:
        """The states that step ``t`` works on."""
        if self.reset is not None:
            reset = self.reset[t][:, None]
            states = [
                torch.where(reset, s.new_zeros(()) if r is None else r, s)
                for s, r in zip(states, self.restart, strict=False)
            ]
        return states if self.clip is None else [_clipped(s, self.clip) for s in states]

    def _leave(
        self, t: int, new: list[Tensor], running: list[Tensor], before: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states after step ``t``, and what it puts out."""
        for i, (state, old, zone) in enumerate(zip(new, before, self.zones, strict=False)):
            if zone is not None:
                new[i] = torch.where(zone[t], old, state)
            elif self.zoneout:
                new[i] = self.zoneout * old + (1 - self.zoneout) * state
        if self.lengths is None:
            return new, new
        on = (t < self.lengths)[:, None]
        outputs = [torch.where(on, s, s.new_zeros(())) for s in new]
        return [torch.where(on, s, r) for s, r in zip(new, running, strict=True)], outputs


def recurrent_product(operand: Tensor, w: Weights) -> Tensor:
    """The recurrent part of the gates [B, G*H] from h [B, R]; a head's from its own part of h."""
    if w.w_hh.dim() == 2:
        return F.linear(operand, w.w_hh, w.b_hh)
    heads, rows, width = w.w_hh.shape
    parts = operand.unflatten(-1, (heads, width)).transpose(0, 1) @ w.w_hh.transpose(1, 2)
    product: Tensor = parts.unflatten(-1, (rows // width, width)).permute(1, 2, 0, 3).flatten(1)
    return product if w.b_hh is None else product + w.b_hh


def gradients(
    outputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    **how: bool,
) -> tuple[Tensor | None, ...]:
    """Autograd's, of the ``wanted`` inputs; None for the others, and for what reaches no output.

    Outputs that are not there, or have no gradient in ``grads``, have no part in it. ``how`` goes
    to :func:`torch.autograd.grad`.
    """
    both = zip(outputs, grads, strict=False)
    pairs = [(o, g) for o, g in both if o is not None and g is not None]
    marks = [want and t is not None for t, want in zip(inputs, wanted, strict=True)]
    asked = [t for t, mark in zip(inputs, marks, strict=True) if mark and t is not None]
    outs, given = [o for o, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outs, asked, given, allow_unused=True, **how))
    return tuple([next(found) if mark else None for mark in marks])


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is cut to [-bound, bound], element by element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.bound, ctx.bound), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def _clipped(x: Tensor, bound: float) -> Tensor:
    """Return ``x``; its gradient is cut to [-bound, bound]."""
    same: Tensor = _ClipGradient.apply(x, bound)
    return same


# ---- as an engine -------------------------------------------------------------------------------


def forward(spec: LayerSpec, inputs: LayerInputs, save: bool) -> tuple[Outputs, Saved]:
    """Run the layer; nothing is saved, see :class:`fused_rnn.spec.layer.Engine`."""
    with torch.no_grad():
        return run(spec, inputs), ()


def saved_specs(spec: LayerSpec, inputs: LayerInputs) -> Specs:
    """Nothing is saved, see :class:`fused_rnn.spec.layer.Engine`."""
    return ()


def backward(
    spec: LayerSpec,
    inputs: LayerInputs,
    out: Tensor,
    saved: Saved,
    grads: OutputGrads,
    needs: Needs,
) -> InputGrads:
    """Run forward once more and pull the gradients back; see the Engine protocol."""
    return pull_back(spec, inputs, grads, needs)


def pull_back(spec: LayerSpec, inputs: LayerInputs, grads: OutputGrads, needs: Needs) -> InputGrads:
    """The gradients of the inputs that ``needs`` marks, also under transforms of torch.func."""
    given = [i for i, grad in enumerate(grads) if grad is not None]
    flat, marks = inputs.flatten(), needs.flatten()

    def call(*wanted: Tensor) -> tuple[Tensor | None, ...]:
        outputs = run(spec, LayerInputs.restore(replace_marked(flat, marks, wanted)))
        return tuple([outputs[i] for i in given])

    wanted = [t for t, mark in zip(flat, marks, strict=True) if mark]
    pulled = iter(torch.func.vjp(call, *wanted)[1](tuple([grads[i] for i in given])))
    return InputGrads.restore(tuple([next(pulled) if mark else None for mark in marks]))


def replace_marked(
    tensors: Sequence[Any], marks: Sequence[bool], others: Sequence[Any]
) -> list[Any]:
    """``tensors``, of which those that are marked are replaced by ``others``, in their order.

    So a function of all becomes one of some, as variables of their own: one tensor may stand in two
    places (tied weights), and the gradient of the one must not hold the other's, too.
    """
    left = iter(others)
    return [next(left) if mark else t for t, mark in zip(tensors, marks, strict=True)]

"""Both sweeps of one direction on a CPU, in rows [sequences, units], span by span of time.

Rows, since MKL multiplies by a few columns 2 to 7 times slower than it multiplies a few rows.

Time is cut into spans of steps, whose buffers are used again; the products with the input are made
for a span at once, while their operands are in the cache. Back-propagation is a *linear* recurrence
in the gradients of the states, whose coefficients the forward sweep determines: they, too, are
formed for a span at once, and only their product with the gradients is left to the step. What a
step computes is derived from the cell, see :mod:`fused_rnn.engines.cpu.code`.

Where the sequences differ in length, a step owns fewer rows than its neighbour. Both sweeps notice
it at these steps alone.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.engines.cpu.code import code_of
from fused_rnn.engines.cpu.weights import SlotWeights
from fused_rnn.spec.layer import LayerSpec, Saved, WeightGrads, WeightNeeds, Weights

SPAN = 2**21  # gates of a span, 8 MiB of fp32, but
LEAST = 1024  # rows at least, for an efficient product


class Span(NamedTuple):
    """Steps ``t0`` to ``t1``, which own the rows ``a`` to ``b``."""

    t0: int
    t1: int
    a: int
    b: int


Parts = list[tuple[slice, Tensor]]
Views = Sequence[Tensor]


class Sweep:
    """One direction of one layer; its states are [B, R] and K times [B, H].

    Attributes:
        x: input rows [N, I].
        h0: initial state [B, R].
        c0: the others [B, K*H], or None.
        w: the parameters.
        out: output rows [N, R], written by ``forward``, read by ``backward``.
    """

    def __init__(
        self,
        spec: LayerSpec,
        reverse: bool,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        w: Weights,
        out: Tensor,
    ) -> None:
        self.spec, self.layout, self.reverse = spec, spec.layout, reverse
        self.x, self.h0, self.c0, self.w, self.out = x, h0, c0, w, out
        self.H, self.code = spec.hidden_size, code_of(spec.cell, spec.heads)
        self.weights = SlotWeights(spec, self.code, w)
        self.own = [] if w.vectors is None else list(w.vectors.unbind())
        self.one = x.new_ones(())
        self.sizes = list(self.layout.batch_sizes or (self.layout.B,) * self.layout.T)

    # ---- the forward sweep ----------------------------------------------------------------------

    @staticmethod
    def saved_shapes(spec: LayerSpec, N: int) -> tuple[tuple[int, int] | None, ...]:
        """Of what ``forward`` saves of ``N`` rows, the gates and c; None for what it does not."""
        code, H, K = code_of(spec.cell, spec.heads), spec.hidden_size, len(spec.cell.states) - 1
        gates = (N, code.slots * H) if code.keeps_slots and not spec.recompute else None
        return gates, (N, K * H) if K else None

    def forward(self, h_n: Tensor, c_n: Tensor | None, save: bool) -> Saved:
        """Write ``out`` and the final states; with ``save`` return what ``backward`` takes."""
        code, N = self.code, self.layout.N
        keep_gates = save and self.saved_shapes(self.spec, 1)[0] is not None
        spans = list(self.spans())
        longest = N if keep_gates else max(c.b - c.a for c in spans)
        buffer = self.x.new_empty(longest, code.slots * self.H) if code.keeps_slots else None
        c_seq = None if self.c0 is None else self.x.new_empty(N, self.c0.shape[1])
        states: Views = (self.h0, *self.apart(self.c0))
        initial = states
        for span in reversed(spans) if self.reverse else spans:
            _, _, a, b = span
            # The only slot of a cell that is its h lies where h is put out.
            gates = self.out[a:b]
            if buffer is not None:
                gates = buffer[a:b] if keep_gates else buffer[: b - a]
            self.weights.project(self.x[a:b], gates)
            outs = (self.out[a:b], *self.apart(None if c_seq is None else c_seq[a:b]))
            states = self.steps_forward(span, gates, outs, states, initial)
        h_n.copy_(self.layout.last(self.out, self.reverse))
        if c_n is not None and c_seq is not None:
            c_n.copy_(self.layout.last(c_seq, self.reverse))
        return (buffer if keep_gates else None, c_seq) if save else ()

    def steps_forward(
        self, span: Span, gates: Tensor, outs: Views, states: Views, initial: Views
    ) -> Views:
        """The steps of a span: fill the ``gates`` and ``outs`` of its rows; returns its states."""
        step, own, one = self.code.step, self.own, self.one
        w_hr = None if self.w.w_hr is None else self.w.w_hr.t()
        w_t, multiply = self.weights.w_t, None if self.spec.heads == 1 else self.weights.multiply
        slots = self.slots(gates)
        recurrent = (self.columns(gates, slots, self.code.slots - len(self.code.h_gates)),)
        groups = [self.columns(gates, slots, a, b) for a, b, _ in self.code.activations]
        rows = self.rows(span, recurrent, slots, groups, outs, backwards=self.reverse)
        for n, (product,), slots, mine, new in rows:
            if n != states[0].shape[0]:
                states = [_resized(s, i, n) for s, i in zip(states, initial, strict=True)]
            if multiply is None:
                product.addmm_(states[0], w_t)
            else:
                multiply(product, states[0])
            if w_hr is None:
                step(slots, mine, states, new, own, one)
            else:
                h = step(slots, mine, states, (None, *new[1:]), own, one)
                torch.mm(h, w_hr, out=new[0])
            states = new
        return states

    def spans(self) -> Iterator[Span]:
        """In order of time."""
        limit = max(LEAST, SPAN // (self.code.slots * self.H))
        t0 = a = b = 0
        for t, size in enumerate(self.sizes):
            b += size
            if b - a >= limit or t == self.layout.T - 1:
                yield Span(t0, t + 1, a, b)
                t0, a = t + 1, b

    def rows(self, span: Span, *tensors: Views, backwards: bool) -> Sequence[Any]:
        """For each step of a span the number of its rows, and those of each tuple of tensors."""
        sizes = self.sizes[span.t0 : span.t1]
        known: dict[int, Sequence[Tensor]] = {}  # one tensor may stand in several places
        for tensor in chain.from_iterable(tensors):
            if tensor.dim() == 1:  # a factor made of parameters alone
                known[id(tensor)] = [tensor] * len(sizes)
            elif id(tensor) not in known:
                known[id(tensor)] = tensor.split_with_sizes(sizes)
        cut = [
            list(zip(*[known[id(t)] for t in some], strict=True)) if some else repeat(())
            for some in tensors
        ]
        by_step = list(zip(sizes, *cut, strict=False))
        return by_step[::-1] if backwards else by_step

    def slots(self, gates: Tensor) -> Views:
        """The slots [n, H] of a buffer [n, S*H]."""
        return (
            gates.view(-1, self.code.slots, self.H).unbind(1) if self.code.slots > 1 else (gates,)
        )

    def columns(self, gates: Tensor, slots: Views, first: int, end: int | None = None) -> Tensor:
        """Some ``slots`` of a buffer, side by side [n, .]: the same tensors where they are one."""
        end = self.code.slots if end is None else end
        if end - first == 1:
            return slots[first]
        return gates if end - first == len(slots) else gates[:, first * self.H : end * self.H]

    def apart(self, c: Tensor | None) -> Views:
        """The states beside h [n, H], of all of them [n, K*H]."""
        K = len(self.spec.cell.states) - 1
        return () if c is None else (c,) if K == 1 else c.unflatten(1, (K, self.H)).unbind(1)

    # ---- the reverse sweep ----------------------------------------------------------------------

    def backward(
        self,
        saved: Saved,
        dout: Tensor | None,
        dh: Tensor,
        dc: Tensor | None,
        dx: Tensor | None,
        needs: WeightNeeds,
    ) -> WeightGrads:
        """Back-propagation through time; returns the gradients of the weights.

        ``dh`` and ``dc`` come as the gradients of the final states and leave as those of the
        initial ones: a sequence that ends early (in the reverse direction: begins late) keeps its
        row untouched until the sweep reaches it. ``dx`` is written, or added to in reverse.
        """
        code, weights, (gates, c_seq) = self.code, self.weights, saved
        grads = weights.zero_gradients(needs)
        own_grads = [self.x.new_zeros(self.layout.B, self.H) for _ in self.own]
        spans = list(self.spans())
        longest = max(c.b - c.a for c in spans)
        totals = self.x.new_empty(longest, self.h0.shape[1])
        buffer = self.x.new_empty(longest, code.slots * self.H)
        h_prev, c_prev = self.ragged(self.out, self.h0), self.ragged(c_seq, self.c0)
        for span in spans if self.reverse else reversed(spans):
            _, _, a, b = span
            h_parts = self.before(span, self.out, self.h0, h_prev)
            c_parts = self.before(span, c_seq, self.c0, c_prev)
            h_before = _joined(h_parts) if self.needs_h(gates) else self.h0  # which nobody reads
            before = (h_before, *self.apart(_joined(c_parts) if c_parts else None))
            now = self.apart(None if c_seq is None else c_seq[a:b])
            if not code.keeps_slots:
                mine = self.out[a:b]
            elif gates is None:
                mine = self.rebuilt(span, h_parts, before)
            else:
                mine = gates[a:b]
            d, total = buffer[: b - a], totals[: b - a]
            how = self.slots(mine), before, now, self.own, self.one
            factors = code.coefficients(self.slots(d), *how)
            if dout is None:
                total.zero_()
            else:
                total.copy_(dout[a:b])
            self.steps_back(span, total, d, factors, dh, self.apart(dc), own_grads)
            self.add_gradients(span, grads, d, dx, h_parts)
            if grads.w_hr is not None:
                grads.w_hr.addmm_(total.t(), code.hidden(*how))
        if needs.vectors:
            grads = grads._replace(vectors=torch.stack([g.sum(0) for g in own_grads]))
        return weights.by_gate(grads)

    def needs_h(self, gates: Tensor | None) -> bool:
        """Whether h before the steps is read: by the factors, or to rebuild ``gates``."""
        return self.code.needs_h or (gates is None and self.code.keeps_slots)

    def rebuilt(self, span: Span, h_parts: Parts, before: Views) -> Tensor:
        """What a step saved once more, by a product for all steps: every state is known."""
        gates = self.x.new_empty(span.b - span.a, self.code.slots * self.H)
        self.weights.project(self.x[span.a : span.b], gates)
        for rows, h in h_parts:
            self.weights.multiply(gates[rows, self.weights.first_h :], h)
        slots = self.slots(gates)
        groups = [self.columns(gates, slots, a, b) for a, b, _ in self.code.activations]
        self.code.rebuild(slots, groups, before, self.own, self.one)
        return gates

    def add_gradients(
        self, span: Span, grads: WeightGrads, d: Tensor, dx: Tensor | None, h_parts: Parts
    ) -> None:
        """Add to the gradients of input and weights what those of a span's gates ``d`` give."""
        _, _, a, b = span
        weights = self.weights
        dgx, dgh = d[:, : weights.last_x], d[:, weights.first_h :]
        if dx is not None:
            torch.addmm(dx[a:b], dgx, weights.w_x, beta=int(self.reverse), out=dx[a:b])
        if grads.w_ih is not None:
            grads.w_ih.addmm_(dgx.t(), self.x[a:b])
        if grads.w_hh is not None:
            for rows, h in h_parts:
                if not (h is self.h0 and self.spec.from_zero):
                    weights.add_recurrent(grads.w_hh, dgh[rows], h)
        alike = weights.first_h == 0 and weights.last_x == d.shape[1]
        both = grads.b_ih is not None and grads.b_hh is not None
        shared = dgx.sum(0) if alike and both else None
        if grads.b_ih is not None:
            grads.b_ih.add_(dgx.sum(0) if shared is None else shared)
        if grads.b_hh is not None:
            grads.b_hh.add_(dgh.sum(0) if shared is None else shared)

    def ragged(self, state: Tensor | None, initial: Tensor | None) -> Tensor | None:
        """The state [N, .] that each row's step started from, if the sequences differ in length."""
        if state is None or initial is None or self.layout.batch_sizes is None:
            return None
        return self.layout.previous(state, initial, self.reverse)

    def before(
        self, span: Span, state: Tensor | None, initial: Tensor | None, ragged: Tensor | None
    ) -> Parts:
        """The states that the steps of a span started from, and for which of its rows.

        Where all sequences are of one length they lie side by side, and nothing is copied.
        """
        _, _, a, b = span
        layout, B = self.layout, self.layout.B
        if state is None or initial is None:
            return []
        if ragged is not None:
            return [(slice(None), ragged[a:b])]
        if self.reverse and b == layout.N:
            return [(slice(0, b - a - B), state[a + B : b]), (slice(b - a - B, None), initial)]
        if a == 0 and not self.reverse:
            return [(slice(0, B), initial), (slice(B, None), state[: b - B])]
        shift = B if self.reverse else -B
        return [(slice(None), state[a + shift : b + shift])]

    def steps_back(
        self,
        span: Span,
        total: Tensor,
        d: Tensor,
        factors: Views,
        dh: Tensor,
        dc: Views,
        own_grads: Views,
    ) -> None:
        """The steps of a span.

        ``total`` [n, R] comes as the gradients of the outputs and leaves as those of h, of all that
        depends on it. So a step adds what it hands on to the ``total`` of its neighbour; where that
        one owns another number of rows, or is in another span, by way of ``dh``. ``d`` leaves as
        the gradients of the gates.
        """
        adjoint, w_h, w_hr = self.code.adjoint, self.weights.w_h, self.w.w_hr
        hand_on = None if self.spec.heads == 1 else self.weights.hand_on
        slots, by_slot = self.slots(d), d.view(-1, self.code.slots, self.H)
        groups = [slots[a] if b - a == 1 else by_slot[:, a:b] for a, b in self.code.products]
        recurrent = self.columns(d, slots, self.code.slots - len(self.code.h_gates))
        apart = [slots[i] for i in self.code.apart]
        views = (total, recurrent), apart, groups, factors
        steps = self.rows(span, *views, backwards=not self.reverse)
        n, (mine, _), *_ = steps[0]
        mine += dh[:n]
        others, own, rows = dc, own_grads, self.layout.B
        for (n, (mine, recurrent), slots, grouped, k), following in zip(
            steps, [*steps[1:], None], strict=True
        ):
            if n != rows:
                others, own, rows = [c[:n] for c in dc], [g[:n] for g in own_grads], n
            inside = following is not None and following[0] == n
            target = following[1][0] if inside else dh[:n].zero_()
            dh_mine = mine if w_hr is None else torch.mm(mine, w_hr)
            adjoint((dh_mine, *others), slots, grouped, k, target, own)
            if hand_on is None:
                target.addmm_(recurrent, w_h)
            else:
                hand_on(target, recurrent)
            if following is not None and not inside:
                following[1][0].add_(dh[: following[0]])


def _joined(parts: Parts) -> Tensor:
    """The states of all rows of a span, in one tensor."""
    return parts[0][1] if len(parts) == 1 else torch.cat([state for _, state in parts])


def _resized(state: Tensor, initial: Tensor, n: int) -> Tensor:
    """The state of ``n`` sequences: some have ended, or in the reverse direction others begin."""
    m = state.shape[0]
    return state[:n] if n < m else torch.cat([state, initial[m:n]])

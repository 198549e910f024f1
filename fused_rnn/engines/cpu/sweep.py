"""Both sweeps of one direction on a CPU, in rows [sequences, units], span by span of time.

Rows, since MKL multiplies by a few columns 2 to 7 times slower than it multiplies a few rows.

Time is cut into spans of steps, whose buffers are used again; the products with the input are made
for a span at once, while their operands are in the cache. Back-propagation is a *linear* recurrence
in (dh, dc) whose coefficients the forward sweep determines: they, too, are formed for a span at
once, and only their product with the gradient is left to the step. What a step computes is told by
the cells, :mod:`fused_rnn.engines.cpu.cells`.

Where the sequences differ in length, a step owns fewer rows than its neighbour. Both sweeps notice
it at these steps alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

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


class Sweep:
    """One direction of one layer; its states are [B, R] and [B, H].

    Attributes:
        slots: gates of a unit in the gate buffer [N, slots * H].
        x: input rows [N, I].
        h0: initial state [B, R].
        c0: initial cell state [B, H], or None.
        w: the parameters.
        out: output rows [N, R], written by ``forward``, read by ``backward``.
    """

    slots: ClassVar[int]

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
        self.H = spec.hidden_size
        self.sizes = list(self.layout.batch_sizes or (self.layout.B,) * self.layout.T)

    # ---- what a cell says -----------------------------------------------------------------------

    def fold(self) -> None:
        """Bring the parameters into the forms that ``project`` and ``step`` use."""
        raise NotImplementedError

    def project(self, span: Span, gates: Tensor) -> None:
        """Fill the ``gates`` [n, slots * H] of a span with all but the recurrent product."""
        raise NotImplementedError

    def views(self, gates: Tensor, out: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        """What ``step`` wants of a span's rows. The gates of an RNN lie in ``out``."""
        raise NotImplementedError

    def step(self, h: Tensor, c: Tensor | None, *views: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step: fill its rows of the ``views``; returns the new states."""
        raise NotImplementedError

    def activated(self, gates: Tensor) -> None:
        """Turn what the steps leave in the ``gates`` into what ``coefficients`` takes."""

    def rebuilt(self, span: Span, before: Parts) -> Tensor:
        """The same once more, by a product for all steps: every h is known."""
        raise NotImplementedError

    def coefficients(
        self, gates: Tensor, c: Tensor | None, h_before: Parts, c_before: Parts
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """All of the adjoint that the gradient does not change.

        Returns:
            gradients of the gates, still to be multiplied by that of the state, as they enter the
            products with the input's and with the recurrent weights; what ``adjoint`` wants
        """
        raise NotImplementedError

    def adjoint(self, total: Tensor, dc: Tensor | None, recurrent: Tensor, *views: Tensor) -> None:
        """One step back: multiply by ``total``, the gradient of its h, and bring ``dc`` on."""
        raise NotImplementedError

    def hand_on(self, target: Tensor, total: Tensor, recurrent: Tensor, *views: Tensor) -> None:
        """Add the gradient of the state before a step to ``target``."""
        target.addmm_(recurrent, self.w.w_hh)

    def input_weights(self) -> Tensor:
        """w_ih, its rows in the order of the gates in the buffer."""
        return self.w.w_ih

    def weight_gradients(self, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Those of w_ih, w_hh, b_ih and b_hh, in the order of torch.nn's gates."""
        return grads

    def unprojected(self, gates: Tensor, c: Tensor) -> Tensor:
        """The state h [n, H] before the projection."""
        raise NotImplementedError

    # ---- the forward sweep ----------------------------------------------------------------------

    @classmethod
    def saved_shapes(cls, spec: LayerSpec, N: int) -> tuple[tuple[int, int] | None, ...]:
        """Of what ``forward`` saves of ``N`` rows, the gates and c; None for what it does not."""
        gates = None if spec.recompute or cls.slots == 1 else (N, cls.slots * spec.hidden_size)
        return gates, (N, spec.hidden_size) if spec.cell.has_c else None

    def forward(self, h_n: Tensor, c_n: Tensor | None, save: bool) -> Saved:
        """Write ``out`` and the final states; with ``save`` return what ``backward`` takes."""
        keep_gates = save and self.saved_shapes(self.spec, 1)[0] is not None
        spans, N = list(self.spans()), self.layout.N
        longest = N if keep_gates else max(c.b - c.a for c in spans)
        buffer = None if self.slots == 1 else self.x.new_empty(longest, self.slots * self.H)
        c_seq = None if self.c0 is None else self.x.new_empty(N, self.H)
        self.fold()
        h, c = self.h0, self.c0
        for span in reversed(spans) if self.reverse else spans:
            _, _, a, b = span
            out, c_out = self.out[a:b], None if c_seq is None else c_seq[a:b]
            gates = out if buffer is None else buffer[a:b] if keep_gates else buffer[: b - a]
            self.project(span, gates)
            for n, *views in self.steps(span, self.views(gates, out, c_out), self.reverse):
                if n != h.shape[0]:
                    h = _resized(h, self.h0, n)
                    c = None if c is None or self.c0 is None else _resized(c, self.c0, n)
                h, c = self.step(h, c, *views)
            if keep_gates:
                self.activated(gates)
        h_n.copy_(self.layout.last(self.out, self.reverse))
        if c_n is not None and c_seq is not None:
            c_n.copy_(self.layout.last(c_seq, self.reverse))
        return (buffer if keep_gates else None, c_seq) if save else ()

    def spans(self) -> Iterator[Span]:
        """In order of time."""
        limit = max(LEAST, SPAN // (self.slots * self.H))
        t0 = a = b = 0
        for t, size in enumerate(self.sizes):
            b += size
            if b - a >= limit or t == self.layout.T - 1:
                yield Span(t0, t + 1, a, b)
                t0, a = t + 1, b

    def steps(
        self, span: Span, views: Iterable[Tensor], backwards: bool
    ) -> Sequence[tuple[Any, ...]]:
        """The rows of each step, a tuple of their number and of those of the ``views``."""
        sizes = self.sizes[span.t0 : span.t1]
        by_step = list(zip(sizes, *(v.split(sizes) for v in views), strict=True))
        return by_step[::-1] if backwards else by_step

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
        w, (gates, c_seq) = self.w, saved
        dw: list[Tensor | None] = [
            torch.zeros_like(p) if need and p is not None else None
            for p, need in zip(w, needs, strict=True)
        ]
        dw_ih, dw_hh, db_ih, db_hh, dw_hr, _ = dw
        if self.spec.recompute:
            self.fold()
        spans, w_x = list(self.spans()), self.input_weights()
        buffer = self.x.new_empty(max(c.b - c.a for c in spans), self.h0.shape[1])
        h_prev, c_prev = self.ragged(self.out, self.h0), self.ragged(c_seq, self.c0)
        for span in spans if self.reverse else reversed(spans):
            _, _, a, b = span
            h_before = self.before(span, self.out, self.h0, h_prev)
            c_mine = None if c_seq is None else c_seq[a:b]
            c_before = self.before(span, c_seq, self.c0, c_prev)
            if self.slots == 1:
                mine = self.out[a:b]
            else:
                mine = self.rebuilt(span, h_before) if gates is None else gates[a:b]
            dgx, dgh, views = self.coefficients(mine, c_mine, h_before, c_before)
            total = buffer[: b - a]
            if dout is None:
                total.zero_()
            else:
                total.copy_(dout[a:b])
            self.sweep_back(span, total, dgh, views, dh, dc)
            if dx is not None:
                torch.addmm(dx[a:b], dgx, w_x, beta=int(self.reverse), out=dx[a:b])
            if dw_ih is not None:
                dw_ih.addmm_(dgx.t(), self.x[a:b])
            if dw_hh is not None:
                for rows, h in h_before:
                    if not (h is self.h0 and self.spec.from_zero):
                        dw_hh.addmm_(dgh[rows].t(), h)
            shared = dgx.sum(0) if dgx is dgh and needs.b_ih and needs.b_hh else None
            if db_ih is not None:
                db_ih += dgx.sum(0) if shared is None else shared
            if db_hh is not None:
                db_hh += dgh.sum(0) if shared is None else shared
            if dw_hr is not None and c_mine is not None:
                dw_hr.addmm_(total.t(), self.unprojected(mine, c_mine))
        dw_ih, dw_hh, db_ih, db_hh = self.weight_gradients(dw_ih, dw_hh, db_ih, db_hh)
        return WeightGrads(dw_ih, dw_hh, db_ih, db_hh, dw_hr)

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

    def sweep_back(
        self,
        span: Span,
        total: Tensor,
        recurrent: Tensor,
        views: tuple[Tensor, ...],
        dh: Tensor,
        dc: Tensor | None,
    ) -> None:
        """The steps of a span.

        ``total`` [n, R] comes as the gradients of the outputs and leaves as those of h, of all that
        depends on it. So a step adds what it hands on to the ``total`` of its neighbour; where that
        one owns another number of rows, or is in another span, by way of ``dh``.
        """
        steps = self.steps(span, (total, recurrent, *views), not self.reverse)
        n, mine, rec, *rest = steps[0]
        mine += dh[:n]
        for following in [*steps[1:], None]:
            self.adjoint(mine, None if dc is None else dc[:n], rec, *rest)
            if following is not None and following[0] == n:
                self.hand_on(following[1], mine, rec, *rest)
            else:
                self.hand_on(dh[:n].zero_(), mine, rec, *rest)
                if following is None:
                    return
                following[1].add_(dh[: following[0]])
            n, mine, rec, *rest = following


def _resized(state: Tensor, initial: Tensor, n: int) -> Tensor:
    """The state of ``n`` sequences: some have ended, or in the reverse direction others begin."""
    m = state.shape[0]
    return state[:n] if n < m else torch.cat([state, initial[m:n]])

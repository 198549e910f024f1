"""The Elman RNNs on the CPU: two PyTorch calls per step forward, three back.

With a single gate there is nothing to lay out: the output is the gate buffer, rows stay rows, and
no tensor but the output is saved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.problem import Layer, Saved, Weights


@dataclass(frozen=True)
class ElmanSweep:
    """The two sweeps of one direction; the interface of :class:`fused_rnn.cpu_gated.GatedSweep`."""

    layer: Layer
    reverse: bool
    x: Tensor
    h0: Tensor
    c0: None
    w: Weights
    out: Tensor

    def forward(self, h_n: Tensor, c_n: None, save: bool) -> Saved:
        """Write ``out`` and ``h_n``; nothing else need be saved."""
        w, rows = self.w, self.layer.rows
        # Columns of a bidirectional output are strided, on which tanh is three times slower.
        out = self.out if self.out.is_contiguous() else self.x.new_empty(self.out.shape)
        if w.b_ih is None or w.b_hh is None:
            torch.mm(self.x, w.w_ih.t(), out=out)
        else:
            torch.addmm(w.b_ih + w.b_hh, self.x, w.w_ih.t(), out=out)
        w_t = w.w_hh.t()
        if rows.T > 4:  # MKL multiplies by a contiguous transpose up to a third faster
            w_t = w_t.contiguous()
        activate = torch.tanh_ if self.layer.cell.name == "rnn_tanh" else torch.relu_
        steps = rows.split(out)
        h = self.h0
        for out_t in reversed(steps) if self.reverse else steps:
            n, m = out_t.shape[0], h.shape[0]
            if n != m:  # sequences have ended, or in the reverse direction others begin
                h = h[:n] if n < m else torch.cat([h, self.h0[m:n]])
            activate(out_t.addmm_(h, w_t))
            h = out_t
        if out is not self.out:
            self.out.copy_(out)
        h_n.copy_(rows.last(self.out, self.reverse))
        return ()

    @staticmethod
    def saved_sizes(layer: Layer, N: int, H: int) -> tuple[int | None, ...]:
        """See :meth:`fused_rnn.cpu_gated.GatedSweep.saved_sizes`."""
        return ()

    def backward(
        self,
        saved: Saved,
        dout: Tensor | None,
        dh0: Tensor,
        dc0: None,
        dx: Tensor | None,
        needs: tuple[bool, ...],
    ) -> Saved:
        """See :meth:`fused_rnn.cpu_gated.GatedSweep.backward`."""
        w, rows, B = self.w, self.layer.rows, self.layer.rows.B
        if self.layer.cell.name == "rnn_tanh":
            dgates = torch.addcmul(self.out.new_ones(()), self.out, self.out, value=-1)
        else:
            dgates = (self.out > 0).to(self.out.dtype)
        steps = rows.split(dgates)
        douts = None if dout is None else rows.split(dout)
        for t in range(rows.T) if self.reverse else range(rows.T - 1, -1, -1):
            step = steps[t]
            dh = dh0 if step.shape[0] == B else dh0[: step.shape[0]]
            step.mul_(dh if douts is None else torch.add(dh, douts[t]))
            torch.mm(step, w.w_hh, out=dh)
        if dx is not None:
            torch.addmm(dx, dgates, w.w_ih, beta=int(self.reverse), out=dx)
        bias = dgates.sum(0) if needs[2] or needs[3] else None
        dw_hh = None
        if needs[1]:
            dw_hh = rows.recurrent_product(
                dgates, self.out, self.h0, self.reverse, self.layer.from_zero
            )
        return (
            dgates.t() @ self.x if needs[0] else None,
            dw_hh,
            bias if needs[2] else None,
            bias if needs[3] else None,
            None,
        )

"""The weights of a sweep in the order of its gate buffer, and the products with them."""

from functools import cached_property

import torch
from torch import Tensor

from fused_rnn.engines.cpu.code import Code
from fused_rnn.spec.layer import LayerSpec, WeightGrads, WeightNeeds, Weights


class SlotWeights:
    """The weights of one direction.

    Attributes:
        first_h: the first column of the gate buffer that the recurrent product enters.
        last_x: the end of those that the input enters.
    """

    def __init__(self, spec: LayerSpec, code: Code, w: Weights) -> None:
        self.H, self.heads, self.code, self.w = spec.hidden_size, spec.heads, code, w
        self.last_x = len(code.x_gates) * self.H
        self.first_h = (code.slots - len(code.h_gates)) * self.H

    @cached_property
    def w_x(self) -> Tensor:
        """[x slots * H, I]."""
        return self._rows(self.w.w_ih, self.code.x_gates)

    @cached_property
    def w_h(self) -> Tensor:
        """[h slots * H, R], or of each head."""
        return self._rows(self.w.w_hh, self.code.h_gates)

    @cached_property
    def w_t(self) -> Tensor:
        """The transpose of ``w_h``."""
        return self.w_h.transpose(-1, -2).contiguous()

    def _rows(self, rows: Tensor, gates: tuple[int, ...]) -> Tensor:
        """Those of the gates [.., G*H, .] in this order; of each head if there are several."""
        if gates == tuple(range(len(gates))):
            return rows
        axis, size = (1, self.H // self.heads) if rows.dim() == 3 else (0, self.H)
        by_gate = rows.split(size, axis)
        return torch.cat([by_gate[gate] for gate in gates], axis)

    # ---- forward --------------------------------------------------------------------------------

    def project(self, x: Tensor, gates: Tensor) -> None:
        """Fill the ``gates`` [n, S*H] of rows ``x`` with all but the recurrent product."""
        bias, end = self._bias, self.last_x
        rest = end < gates.shape[1]
        mine = gates[:, :end] if rest else gates
        if bias is None:
            torch.mm(x, self.w_x.t(), out=mine)
        else:
            torch.addmm(bias[:end] if rest else bias, x, self.w_x.t(), out=mine)
        if rest:
            gates[:, end:] = 0 if bias is None else bias[end:]

    @cached_property
    def _bias(self) -> Tensor | None:
        """Both biases by slot [S*H]."""
        b_ih, b_hh = self.w.b_ih, self.w.b_hh
        if b_ih is None or b_hh is None:
            return None
        code = self.code
        if self.first_h == 0 and self.last_x == code.slots * self.H:
            return self._rows(b_ih + b_hh, code.x_gates)
        bias = b_ih.new_zeros(code.slots * self.H)
        bias[: self.last_x] = self._rows(b_ih, code.x_gates)
        bias[self.first_h :] += self._rows(b_hh, code.h_gates)
        return bias

    def multiply(self, recurrent: Tensor, h: Tensor) -> None:
        """Add the recurrent product with ``h`` [n, R] to its columns [n, .] of the gates."""
        if self.heads == 1:
            recurrent.addmm_(h, self.w_t)
            return
        product = torch.bmm(self._by_head(h), self.w_t)
        mine = recurrent.unflatten(1, (-1, self.heads, self.H // self.heads))
        mine += product.unflatten(2, (mine.shape[1], -1)).permute(1, 2, 0, 3)

    def _by_head(self, h: Tensor) -> Tensor:
        """[n, H] as [k, n, H/k]."""
        by_head: Tensor = h.unflatten(1, (self.heads, -1)).transpose(0, 1)
        return by_head

    # ---- reverse --------------------------------------------------------------------------------

    def hand_on(self, target: Tensor, recurrent: Tensor) -> None:
        """Add what gradients of the gates' columns hand on to that of h, ``target`` [n, R]."""
        if self.heads == 1:
            target.addmm_(recurrent, self.w_h)
            return
        product = torch.bmm(self._gates_by_head(recurrent), self.w_h)
        target += product.transpose(0, 1).flatten(1)

    def _gates_by_head(self, recurrent: Tensor) -> Tensor:
        """[n, slots * H] as [k, n, slots * H/k]."""
        mine = recurrent.unflatten(1, (-1, self.heads, self.H // self.heads))
        by_head: Tensor = mine.permute(2, 0, 1, 3).flatten(2)
        return by_head

    def zero_gradients(self, needs: WeightNeeds) -> WeightGrads:
        """Zeros for each that is needed, in the order of the buffer."""
        pairs = zip(self.w, needs, strict=True)
        return WeightGrads(
            *[torch.zeros_like(t) if need and t is not None else None for t, need in pairs]
        )

    def add_recurrent(self, dw_hh: Tensor, recurrent: Tensor, h: Tensor) -> None:
        """Add to the gradient of the recurrent weights what steps that began with ``h`` give."""
        if self.heads == 1:
            dw_hh.addmm_(recurrent.t(), h)
        else:
            dw_hh.baddbmm_(self._gates_by_head(recurrent).transpose(1, 2), self._by_head(h))

    def by_gate(self, grads: WeightGrads) -> WeightGrads:
        """Gradients by slot to those of the parameters, in the order of the gates."""
        code = self.code
        return grads._replace(
            w_ih=self._unsorted(grads.w_ih, code.x_gates),
            w_hh=self._unsorted(grads.w_hh, code.h_gates),
            b_ih=self._unsorted(grads.b_ih, code.x_gates),
            b_hh=self._unsorted(grads.b_hh, code.h_gates),
        )

    def _unsorted(self, rows: Tensor | None, gates: tuple[int, ...]) -> Tensor | None:
        back = tuple([gates.index(g) for g in range(len(gates))])
        return None if rows is None else self._rows(rows, back)

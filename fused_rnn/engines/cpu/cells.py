"""The cells' steps and adjoints on a CPU: in place, with few PyTorch calls.

A call takes some microseconds, which is what counts at these sizes. So what enters a product or an
activation together lies side by side in the gate buffer.
"""

import torch
from torch import Tensor

from fused_rnn.engines.cpu.sweep import Parts, Span, Sweep


def _one_minus_square(y: Tensor, out: Tensor) -> Tensor:
    return torch.addcmul(y.new_ones(()), y, y, value=-1, out=out)


def _affine(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias, x, w.t(), out=out)


class ReluSweep(Sweep):
    """The RNN with ReLU: nothing but the output is saved."""

    slots = 1

    def fold(self) -> None:
        w = self.w
        self.w_in, self.w_t = w.w_ih, w.w_hh.t().contiguous()
        self.bias = None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh

    def project(self, span: Span, gates: Tensor) -> None:
        _affine(self.x[span.a : span.b], self.w_in, self.bias, gates)

    def views(self, gates: Tensor, out: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        return (gates,)

    def step(self, h: Tensor, c: Tensor | None, *views: Tensor) -> tuple[Tensor, Tensor | None]:
        (gate,) = views
        return gate.addmm_(h, self.w_t).relu_(), None

    def slope(self, h: Tensor) -> Tensor:
        """The derivative of the activation."""
        return (h > 0).to(h.dtype)

    def coefficients(
        self, gates: Tensor, c: Tensor | None, h_before: Parts, c_before: Parts
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        d = self.slope(gates)
        return d, d, ()

    def adjoint(self, total: Tensor, dc: Tensor | None, recurrent: Tensor, *views: Tensor) -> None:
        recurrent.mul_(total)


class TanhSweep(ReluSweep):
    """The RNN with tanh."""

    def step(self, h: Tensor, c: Tensor | None, *views: Tensor) -> tuple[Tensor, Tensor | None]:
        (gate,) = views
        return gate.addmm_(h, self.w_t).tanh_(), None

    def slope(self, h: Tensor) -> Tensor:
        return _one_minus_square(h, out=torch.empty_like(h))


class GruSweep(Sweep):
    """Slots n, r, z, m with n = tanh(n' + r m): the input enters the first three of them.

    m is W_hn h + b_hn; so the recurrent product enters the last three, each product by one call.
    """

    slots = 4

    def fold(self) -> None:
        w, H = self.w, self.H
        self.w_in, self.w_t = self.input_weights(), w.w_hh.t().contiguous()
        self.bias = w.w_hh.new_zeros(4 * H)
        if w.b_ih is not None and w.b_hh is not None:
            self.bias[: 3 * H] = w.b_ih.roll(H)
            self.bias[H:] += w.b_hh

    def project(self, span: Span, gates: Tensor) -> None:
        k = 3 * self.H
        _affine(self.x[span.a : span.b], self.w_in, self.bias[:k], gates[:, :k])
        gates[:, k:] = self.bias[k:]

    def views(self, gates: Tensor, out: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        H = self.H
        return (gates[:, H:], gates[:, H : 3 * H], *gates.view(-1, 4, H).unbind(1), out)

    def step(self, h: Tensor, c: Tensor | None, *views: Tensor) -> tuple[Tensor, Tensor | None]:
        rzm, rz, n, r, z, m, out = views
        rzm.addmm_(h, self.w_t)
        rz.sigmoid_()
        n.addcmul_(r, m).tanh_()
        return torch.lerp(n, h, z, out=out), None

    def rebuilt(self, span: Span, before: Parts) -> Tensor:
        H = self.H
        gates = self.x.new_empty(span.b - span.a, 4 * H)
        self.project(span, gates)
        for rows, h in before:
            gates[rows, H:].addmm_(h, self.w_t)
        gates[:, H : 3 * H].sigmoid_()
        n, r, _, m = gates.view(-1, 4, H).unbind(1)
        n.addcmul_(r, m).tanh_()
        return gates

    def coefficients(
        self, gates: Tensor, c: Tensor | None, h_before: Parts, c_before: Parts
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        H = self.H
        n, r, z, m = gates.view(-1, 4, H).unbind(1)
        d = torch.empty_like(gates)
        dn, dr, dz, dm = d.view(-1, 4, H).unbind(1)
        torch.sub(1, z, out=dr)  # 1 - z, until dr itself is due
        _one_minus_square(n, out=dn).mul_(dr)
        for rows, h in h_before:
            torch.sub(h, n[rows], out=dz[rows])
        dz.mul_(z).mul_(dr)
        torch.mul(dn, r, out=dm)
        torch.addcmul(dm, dm, r, value=-1, out=dr).mul_(m)
        return d[:, : 3 * H], d[:, H:], (d.view(-1, 4, H), z)

    def adjoint(self, total: Tensor, dc: Tensor | None, recurrent: Tensor, *views: Tensor) -> None:
        views[0].mul_(total.unsqueeze(1))

    def hand_on(self, target: Tensor, total: Tensor, recurrent: Tensor, *views: Tensor) -> None:
        target.addcmul_(total, views[1]).addmm_(recurrent, self.w.w_hh)

    def input_weights(self) -> Tensor:
        return self.w.w_ih.roll(self.H, 0)

    def weight_gradients(self, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dw_ih, dw_hh, db_ih, db_hh = grads
        dw_ih, db_ih = (None if g is None else g.roll(-self.H, 0) for g in (dw_ih, db_ih))
        return dw_ih, dw_hh, db_ih, db_hh


class LstmSweep(Sweep):
    """Slots i, f, s, o with s = sigmoid(2 u) for the candidate tanh(u): one sigmoid serves all."""

    slots = 4

    def fold(self) -> None:
        w = self.w
        self.w_in, self.w_t = self._double(w.w_ih), self._double(w.w_hh).t().contiguous()
        self.bias = None
        if w.b_ih is not None and w.b_hh is not None:
            self.bias = self._double(w.b_ih + w.b_hh)

    def _double(self, rows: Tensor) -> Tensor:
        doubled = rows.clone()
        doubled[2 * self.H : 3 * self.H] *= 2
        return doubled

    def project(self, span: Span, gates: Tensor) -> None:
        _affine(self.x[span.a : span.b], self.w_in, self.bias, gates)

    def views(self, gates: Tensor, out: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        assert c is not None
        return (gates, *gates.view(-1, 4, self.H).unbind(1), out, c)

    def step(self, h: Tensor, c: Tensor | None, *views: Tensor) -> tuple[Tensor, Tensor | None]:
        ifso, i, f, s, o, out, c_out = views
        assert c is not None
        ifso.addmm_(h, self.w_t).sigmoid_()
        torch.mul(f, c, out=c_out).addcmul_(i, s, value=2).sub_(i)
        if self.w.w_hr is None:
            torch.tanh(c_out, out=out).mul_(o)
        else:
            torch.mm(torch.tanh(c_out).mul_(o), self.w.w_hr.t(), out=out)
        return out, c_out

    def activated(self, gates: Tensor) -> None:
        gates.view(-1, 4, self.H)[:, 2].mul_(2).sub_(1)

    def rebuilt(self, span: Span, before: Parts) -> Tensor:
        gates = self.x.new_empty(span.b - span.a, 4 * self.H)
        self.project(span, gates)
        for rows, h in before:
            gates[rows].addmm_(h, self.w_t)
        gates.sigmoid_()
        self.activated(gates)
        return gates

    def coefficients(
        self, gates: Tensor, c: Tensor | None, h_before: Parts, c_before: Parts
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        assert c is not None
        i, f, g, o = gates.view(-1, 4, self.H).unbind(1)
        d = torch.empty_like(gates)
        difg, do = d.view(-1, 4, self.H).split((3, 1), 1)
        di, df, dg = difg.unbind(1)
        do, tanh_c = do[:, 0], torch.tanh(c)
        torch.addcmul(i, i, i, value=-1, out=di).mul_(g)
        torch.addcmul(f, f, f, value=-1, out=df)
        for rows, before in c_before:
            df[rows].mul_(before)
        _one_minus_square(g, out=dg).mul_(i)
        torch.addcmul(o, o, o, value=-1, out=do).mul_(tanh_c)
        dc_dh = _one_minus_square(tanh_c, out=tanh_c).mul_(o)
        return d, d, (difg, do, dc_dh, f)

    def adjoint(self, total: Tensor, dc: Tensor | None, recurrent: Tensor, *views: Tensor) -> None:
        difg, do, dc_dh, f = views
        assert dc is not None
        dh = total if self.w.w_hr is None else torch.mm(total, self.w.w_hr)
        dc.addcmul_(dh, dc_dh)
        difg.mul_(dc.unsqueeze(1))
        do.mul_(dh)
        dc.mul_(f)

    def unprojected(self, gates: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(c).mul_(gates.view(-1, 4, self.H)[:, 3])

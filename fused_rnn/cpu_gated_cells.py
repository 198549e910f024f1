"""The gated cells' step and adjoint for the CPU, in place, with few PyTorch calls.

All blocks are [units, batch]: with the weights as the left operand MKL's small products run up to
1.5 times faster than the other way round, and a range of gates is one contiguous block, on which
PyTorch's activations are two to three times faster than on strided columns. Gates of a step:

    gru   m, r, z, n, with m = W_hn h + b_hn: the recurrent product adds to the first three, the
          input's to the last three, so that each is one product
    lstm  i, f, s, o, with s = sigmoid(2 u) for the candidate tanh(u) = 2 s - 1: its weights are
          doubled, and one sigmoid serves all four

Gate gradients have the same shape; the GRU's are dm, dr, dz, dn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.problem import Weights

Range = tuple[int, int]  # of gates


@dataclass(frozen=True)
class GatedCell:
    """One cell on the CPU. H units, n sequences.

    Attributes:
        slots: gates in the buffer.
        x: those that the input product adds to, in torch.nn's order.
        h: those that the recurrent product adds to: torch.nn's, rolled by ``roll`` places.
        roll: see ``h``.
        views: ranges of gates that ``step`` is handed.
        scale: prepares rows of weights or biases [G*H, ...] for the forward products.
        bias: what the gates start from, ``weights -> [slots*H]``, or None for zero.
        activate: gates from what the products added up to, in place, ``(*views)``; of one step or
            of many.
        step: one step, ``(w, w_hr, h, c, h_out, c_out, *views)`` with w [.., R]; writes the last.
        state: which state's sequence ``coefficients`` needs, 0 for h and 1 for c.
        coefficients: what the adjoint needs and the gradient does not change, for a whole chunk:
            ``(state, previous state, gates [steps, slots, H, n], dgates)``; written to ``dgates``
            or returned.
        adjoint: one step back, ``(total, dh, dc, w_t, dgates [slots, H, n], dgates of the recurrent
            product [.., n], *coefficients)``: scale ``dgates`` by the gradient ``total`` of h and
            set dh and dc to those of the previous state.
    """

    slots: int
    x: Range
    h: Range
    roll: int
    views: tuple[Range, ...]
    scale: Callable[[Tensor], Tensor]
    bias: Callable[[Weights], Tensor | None]
    activate: Callable[..., None]
    step: Callable[..., None]
    state: int
    coefficients: Callable[..., tuple[Tensor, ...]]
    adjoint: Callable[..., None]


def _both_biases(w: Weights) -> Tensor | None:
    return None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh


def _one_minus_square(y: Tensor, out: Tensor) -> Tensor:
    return torch.addcmul(y.new_ones(()), y, y, value=-1, out=out)


# ---- gru ----------------------------------------------------------------------------------------


def _gru_bias(w: Weights) -> Tensor | None:
    if w.b_ih is None or w.b_hh is None:
        return None
    H = w.b_ih.shape[0] // 3
    return torch.cat([w.b_hh[2 * H :], w.b_ih[: 2 * H] + w.b_hh[: 2 * H], w.b_ih[2 * H :]])


def _gru_activate(mrz: Tensor, rz: Tensor, m: Tensor, r: Tensor, z: Tensor, n: Tensor) -> None:
    rz.sigmoid_()
    n.addcmul_(r, m).tanh_()


def _gru_step(
    w: Tensor,
    w_hr: None,
    h: Tensor,
    c: None,
    h_out: Tensor,
    c_out: None,
    mrz: Tensor,
    rz: Tensor,
    m: Tensor,
    r: Tensor,
    z: Tensor,
    n: Tensor,
) -> None:
    mrz.addmm_(w, h)
    _gru_activate(mrz, rz, m, r, z, n)
    torch.lerp(n, h, z, out=h_out)


def _gru_coefficients(
    h: Tensor, h_prev: Tensor, gates: Tensor, dgates: Tensor
) -> tuple[Tensor, ...]:
    m, r, z, n = gates.unbind(1)
    dm, dr, dz, dn = dgates.unbind(1)
    torch.sub(1, z, out=dr)  # 1 - z, until dr itself is due
    _one_minus_square(n, out=dn).mul_(dr)
    torch.sub(h_prev, n, out=dz).mul_(z).mul_(dr)
    torch.mul(dn, r, out=dm)
    torch.addcmul(dm, dm, r, value=-1, out=dr).mul_(m)
    return (z,)


def _gru_adjoint(
    total: Tensor, dh: Tensor, dc: None, w_t: Tensor, dgates: Tensor, dmrz: Tensor, z: Tensor
) -> None:
    dgates.mul_(total)
    torch.mul(total, z, out=dh).addmm_(w_t, dmrz)


# ---- lstm ---------------------------------------------------------------------------------------


def _double_candidate(rows: Tensor) -> Tensor:
    H = rows.shape[0] // 4
    doubled = rows.clone()
    doubled[2 * H : 3 * H] *= 2
    return doubled


def _lstm_bias(w: Weights) -> Tensor | None:
    bias = _both_biases(w)
    return None if bias is None else _double_candidate(bias)


def _lstm_activate(ifso: Tensor, i: Tensor, f: Tensor, s: Tensor, o: Tensor) -> None:
    ifso.sigmoid_()


def _lstm_step(
    w: Tensor,
    w_hr: Tensor | None,
    h: Tensor,
    c: Tensor,
    h_out: Tensor,
    c_out: Tensor,
    ifso: Tensor,
    i: Tensor,
    f: Tensor,
    s: Tensor,
    o: Tensor,
) -> None:
    ifso.addmm_(w, h).sigmoid_()
    torch.mul(f, c, out=c_out).addcmul_(i, s, value=2).sub_(i)
    if w_hr is None:
        torch.tanh(c_out, out=h_out).mul_(o)
    else:
        torch.mm(w_hr, torch.tanh(c_out).mul_(o), out=h_out)


def _lstm_coefficients(
    c: Tensor, c_prev: Tensor, gates: Tensor, dgates: Tensor
) -> tuple[Tensor, ...]:
    i, f, s, o = gates.unbind(1)
    di, df, dg, do = dgates.unbind(1)
    tanh_c = torch.tanh(c)
    torch.mul(s, 2, out=dg).sub_(1)  # tanh(u), until dg itself is due
    torch.addcmul(i, i, i, value=-1, out=di).mul_(dg)
    torch.addcmul(f, f, f, value=-1, out=df).mul_(c_prev)
    torch.addcmul(s, s, s, value=-1, out=dg).mul_(i).mul_(4)  # 1 - tanh(u)^2 = 4 s (1 - s)
    torch.addcmul(o, o, o, value=-1, out=do).mul_(tanh_c)
    return _one_minus_square(tanh_c, out=torch.empty_like(c)).mul_(o), f


def _lstm_adjoint(
    total: Tensor,
    dh: Tensor,
    dc: Tensor,
    w_t: Tensor,
    dgates: Tensor,
    difgo: Tensor,
    dc_dh: Tensor,
    f: Tensor,
) -> None:
    dc.addcmul_(total, dc_dh)
    dgates[:3].mul_(dc)
    dgates[3].mul_(total)
    dc.mul_(f)
    torch.mm(w_t, difgo, out=dh)


GATED_CELLS = {
    "gru": GatedCell(
        slots=4,
        x=(1, 4),
        h=(0, 3),
        roll=1,
        views=((0, 3), (1, 3), (0, 1), (1, 2), (2, 3), (3, 4)),
        scale=lambda w: w,
        bias=_gru_bias,
        activate=_gru_activate,
        step=_gru_step,
        state=0,
        coefficients=_gru_coefficients,
        adjoint=_gru_adjoint,
    ),
    "lstm": GatedCell(
        slots=4,
        x=(0, 4),
        h=(0, 4),
        roll=0,
        views=((0, 4), (0, 1), (1, 2), (2, 3), (3, 4)),
        scale=_double_candidate,
        bias=_lstm_bias,
        activate=_lstm_activate,
        step=_lstm_step,
        state=1,
        coefficients=_lstm_coefficients,
        adjoint=_lstm_adjoint,
    ),
}

"""The matrix products around the sweeps: gates before the forward one, gradients after the other.

A gate buffer holds the S gate slots of a unit side by side (S is 1 for one gate, else 4), so the
rows of the weights are brought into the order (unit, slot) first, see `kernels/pack.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_rnn.problem import Layer, Weights

# Slots that the input product fills, and those of the recurrent product, in torch.nn's gate order.
# The GRU's last slot is W_hn h + b_hn: the reset gate acts before the input's part is added.
X_SLOTS = {"rnn_tanh": (0,), "rnn_relu": (0,), "gru": (0, 1, 2), "lstm": (0, 1, 2, 3)}
H_SLOTS = X_SLOTS | {"gru": (0, 1, 3)}
# The slots of the recurrent products that the kernels know, by the number of gates.
PRODUCTS = {1: (0,), 3: (0, 1, 3), 4: (0, 1, 2, 3)}


def recurrent_weights(layer: Layer, weights: list[Weights]) -> Tensor:
    """[D, G * H, H] with as many gates as the kernels multiply: those that a cell lacks are 0."""
    from fused_rnn.kernels.plan import SPECS

    name = layer.cell.name
    product = PRODUCTS[SPECS[name].gates]
    if H_SLOTS[name] == product:
        if len(weights) == 1:
            return weights[0].w_hh.unsqueeze(0)
        return torch.stack([w.w_hh for w in weights])
    G, H = len(H_SLOTS[name]), weights[0].w_hh.shape[1]
    none = weights[0].w_hh.new_zeros(H, H)
    parts = []
    for w in weights:
        gates = dict(zip(H_SLOTS[name], w.w_hh.view(G, H, H), strict=True))
        parts += [gates.get(slot, none) for slot in product]
    return torch.stack(parts).view(len(weights), -1, H)


def splits_last_gate(cell: str) -> bool:
    """Whether the last gate's recurrent part has a slot of its own, as in a GRU."""
    return X_SLOTS[cell][-1] != H_SLOTS[cell][-1]


def recurrent_bias(layer: Layer, weights: list[Weights]) -> Tensor | None:
    """That of a part with a slot of its own, b_hn of a GRU: [D, H], zeros without biases."""
    name = layer.cell.name
    if X_SLOTS[name][-1] == H_SLOTS[name][-1]:
        return None
    H = weights[0].w_hh.shape[1]
    found = [w.w_hh.new_zeros(H) if w.b_hh is None else w.b_hh[-H:] for w in weights]
    return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)


def project(layer: Layer, x: Tensor, weights: list[Weights]) -> Tensor:
    """The input part of the pre-activations with the biases, [D, N, H, S]."""
    H, slots = weights[0].w_hh.shape[1], X_SLOTS[layer.cell.name]
    S = 1 if len(slots) == 1 else 4
    shape = (len(weights), x.shape[0], H, S)
    if len(weights) == 1:
        return _project(layer, x, weights[0], None).view(shape)
    gates = x.new_empty(shape)
    for d, w in enumerate(weights):
        _project(layer, x, w, gates[d].view(x.shape[0], H * S))
    return gates


def _project(layer: Layer, x: Tensor, w: Weights, out: Tensor | None) -> Tensor:
    w_ih, bias = _by_unit(layer, w)
    if bias is None:
        return torch.mm(x, w_ih.t(), out=out)
    return torch.addmm(bias, x, w_ih.t(), out=out)


def _by_unit(layer: Layer, w: Weights, biases: bool = True) -> tuple[Tensor, Tensor | None]:
    """The input weights and the biases, which share them, in the order of the gate buffer."""
    from fused_rnn.kernels.pack import pack

    name = layer.cell.name
    b_ih, b_hh = (w.b_ih, w.b_hh) if biases else (None, None)
    if len(X_SLOTS[name]) == 1:
        return w.w_ih, None if b_ih is None or b_hh is None else b_ih + b_hh
    return pack(w.w_ih, b_ih, b_hh, X_SLOTS[name], H_SLOTS[name])


def rebuild_gates(
    layer: Layer, x: Tensor, h0: Tensor, out: Tensor, fed: Tensor | None, weights: list[Weights]
) -> Tensor:
    """What the forward sweep would have saved: h of every step is known, so one product does."""
    from fused_rnn.kernels.pack import pack

    H, name = h0.shape[-1], layer.cell.name
    h_slots = H_SLOTS[name]
    gates = project(layer, x, weights)
    for d, (buffer, w) in enumerate(zip(gates, weights, strict=True)):
        columns = slice(d * H, (d + 1) * H)
        if fed is None:
            before = layer.rows.previous(out[:, columns], h0[d], d == 1)
        else:
            before = fed[:, columns]
        flat = buffer.view(x.shape[0], -1)
        w_hh = w.w_hh
        if len(h_slots) > 1:
            w_hh, _ = pack(w_hh, None, None, h_slots, h_slots)
        flat.addmm_(before, w_hh.t())
        SAVED[name](buffer)
    return gates


def _gru_saved(gates: Tensor) -> None:
    gates[..., :2].sigmoid_()
    gates[..., 2].addcmul_(gates[..., 0], gates[..., 3]).tanh_()


def _lstm_saved(gates: Tensor) -> None:
    candidate = torch.tanh(gates[..., 2])
    gates.sigmoid_()
    gates[..., 2] = candidate


# What the step saves, formed in place from the pre-activations [N, H, S].
SAVED: dict[str, Callable[[Tensor], Any]] = {
    "rnn_tanh": torch.tanh_,
    "rnn_relu": torch.relu_,
    "gru": _gru_saved,
    "lstm": _lstm_saved,
}


def gradients(
    layer: Layer,
    x: Tensor,
    h0: Tensor,
    out: Tensor,
    fed: Tensor | None,
    weights: list[Weights],
    dgates: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and the gradients of the parameters of all directions."""
    from fused_rnn.kernels.pack import unpack

    H, name = h0.shape[-1], layer.cell.name
    x_slots, h_slots = X_SLOTS[name], H_SLOTS[name]
    dx: Tensor | None = None
    dflat: list[Tensor | None] = []
    for d, w in enumerate(weights):
        flat = dgates[d].view(x.shape[0], -1)
        need_w_ih, need_w_hh, *rest = needs[3 + d * len(w) : 3 + (d + 1) * len(w)]
        need_biases = rest[0], rest[1]
        if needs[0]:
            w_ih, _ = _by_unit(layer, w, biases=False)
            dx = flat @ w_ih if dx is None else dx.addmm_(flat, w_ih)
        dw_ih = flat.t() @ x if need_w_ih else None
        dw_hh = None
        if need_w_hh and fed is not None:
            dw_hh = flat.t() @ fed[:, d * H : (d + 1) * H]
        elif need_w_hh:
            state = out if len(weights) == 1 else out[:, d * H : (d + 1) * H]
            dw_hh = layer.rows.recurrent_product(flat, state, h0[d], d == 1, layer.from_zero)
        db = flat.sum(0) if any(need_biases) else None
        if len(x_slots) == 1:
            dbs = [db if need else None for need in need_biases]  # the two have one gradient
        elif dw_ih is None and dw_hh is None and db is None:
            dbs = [None, None]
        else:
            dw_ih, dw_hh, *dbs = unpack(dw_ih, dw_hh, db, need_biases, x_slots, h_slots)
        dflat += [dw_ih, dw_hh, *dbs, None]
    return dx, dflat

"""The matrix products around the sweeps: gates before the forward one, gradients after the other.

A gate buffer holds the S gate slots of a unit side by side (S is 1 for one gate, else 4), so the
rows of the weights are brought into the order (unit, slot) first.
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


def to_slots(rows: Tensor, slots: tuple[int, ...]) -> Tensor:
    """Rows [G*H, ...] in torch.nn's order to [H * S, ...], (unit, slot); other slots are zero."""
    S = 1 if len(slots) == 1 else 4
    gates = rows.view(len(slots), -1, *rows.shape[1:])
    if S == 1:
        return rows
    if slots == (0, 1, 2, 3):
        return gates.transpose(0, 1).reshape(rows.shape)
    result = rows.new_zeros(gates.shape[1], S, *rows.shape[1:])
    result[:, list(slots)] = gates.transpose(0, 1)
    return result.flatten(0, 1)


def from_slots(rows: Tensor, slots: tuple[int, ...]) -> Tensor:
    """The inverse: rows [H * S, ...] to [G*H, ...]."""
    if len(slots) == 1:
        return rows
    units = rows.view(-1, 4, *rows.shape[1:])
    return units[:, list(slots)].transpose(0, 1).flatten(0, 1)


def recurrent_weights(layer: Layer, weights: list[Weights]) -> Tensor:
    """[D, G * H, H] with as many gates as the kernels multiply: those that a cell lacks are 0."""
    from fused_rnn.kernels.plan import SPECS

    name, w_hh = layer.cell.name, torch.stack([w.w_hh for w in weights])
    product = PRODUCTS[SPECS[name].gates]
    if H_SLOTS[name] == product:
        return w_hh
    D, _, H = w_hh.shape
    padded = w_hh.new_zeros(D, len(product), H, H)
    padded[:, [product.index(slot) for slot in H_SLOTS[name]]] = w_hh.view(D, -1, H, H)
    return padded.flatten(1, 2)


def splits_last_gate(cell: str) -> bool:
    """Whether the last gate's recurrent part has a slot of its own, as in a GRU."""
    return X_SLOTS[cell][-1] != H_SLOTS[cell][-1]


def _input_bias(layer: Layer, w: Weights) -> Tensor | None:
    """All biases but that of a recurrent part with a slot of its own, by (unit, slot)."""
    if w.b_ih is None or w.b_hh is None:
        return None
    bias = w.b_ih + w.b_hh
    if splits_last_gate(layer.cell.name):
        last = bias.shape[0] - w.w_hh.shape[1]
        bias = torch.cat([bias[:last], w.b_ih[last:]])
    return to_slots(bias, X_SLOTS[layer.cell.name])


def recurrent_bias(layer: Layer, weights: list[Weights]) -> Tensor | None:
    """The one that `_input_bias` leaves out, b_hn of a GRU: [D, H], zeros without biases."""
    if not splits_last_gate(layer.cell.name):
        return None
    H = weights[0].w_hh.shape[1]
    return torch.stack([w.w_hh.new_zeros(H) if w.b_hh is None else w.b_hh[-H:] for w in weights])


def project(layer: Layer, x: Tensor, weights: list[Weights]) -> Tensor:
    """The input part of the pre-activations with the biases, [D, N, H, S]."""
    H, slots = weights[0].w_hh.shape[1], X_SLOTS[layer.cell.name]
    S = 1 if len(slots) == 1 else 4
    gates = x.new_empty(len(weights), x.shape[0], H * S)
    for buffer, w in zip(gates, weights, strict=True):
        w_ih, bias = to_slots(w.w_ih, slots), _input_bias(layer, w)
        if bias is None:
            torch.mm(x, w_ih.t(), out=buffer)
        else:
            torch.addmm(bias, x, w_ih.t(), out=buffer)
    return gates.view(len(weights), x.shape[0], H, S)


def rebuild_gates(
    layer: Layer, x: Tensor, h0: Tensor, out: Tensor, fed: Tensor | None, weights: list[Weights]
) -> Tensor:
    """What the forward sweep would have saved: h of every step is known, so one product does."""
    H, name = h0.shape[-1], layer.cell.name
    gates = project(layer, x, weights)
    for d, (buffer, w) in enumerate(zip(gates, weights, strict=True)):
        columns = slice(d * H, (d + 1) * H)
        if fed is None:
            before = layer.rows.previous(out[:, columns], h0[d], d == 1)
        else:
            before = fed[:, columns]
        flat = buffer.view(x.shape[0], -1)
        flat.addmm_(before, to_slots(w.w_hh, H_SLOTS[name]).t())
        bias = recurrent_bias(layer, [w])
        if bias is not None:
            buffer[..., 3] += bias[0]
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
    H, name = h0.shape[-1], layer.cell.name
    x_slots, h_slots = X_SLOTS[name], H_SLOTS[name]
    dx: Tensor | None = None
    dflat: list[Tensor | None] = []
    for d, w in enumerate(weights):
        flat = dgates[d].flatten(1)
        need = needs[3 + d * len(w) : 3 + (d + 1) * len(w)]
        if needs[0]:
            w_ih = to_slots(w.w_ih, x_slots)
            dx = flat @ w_ih if dx is None else dx.addmm_(flat, w_ih)
        dw_hh = None
        if need[1]:
            columns = slice(d * H, (d + 1) * H)
            if fed is None:
                dw = layer.rows.recurrent_product(flat, out[:, columns], h0[d], d == 1)
            else:
                dw = flat.t() @ fed[:, columns]
            dw_hh = from_slots(dw, h_slots)
        bias = flat.sum(0) if need[2] or need[3] else None
        dflat += [
            from_slots(flat.t() @ x, x_slots) if need[0] else None,
            dw_hh,
            from_slots(bias, x_slots) if need[2] and bias is not None else None,
            from_slots(bias, h_slots) if need[3] and bias is not None else None,
            None,
        ]
    return dx, dflat

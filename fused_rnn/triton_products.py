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
    G = len(slots)
    if G == 1:
        return rows
    units = rows.view(G, -1, *rows.shape[1:]).transpose(0, 1)
    if slots != (0, 1, 2, 3):
        # No list of slots as an index: it would be copied to the device, and the host would wait.
        rest = (0, 0) * (rows.dim() - 1)
        if slots == tuple(range(G)):
            units = torch.constant_pad_nd(units, (*rest, 0, 4 - G))
        else:
            gates = dict(zip(slots, units.unbind(1), strict=True))
            none = units.new_zeros(units.shape[0], *rows.shape[1:])
            units = torch.stack([gates.get(slot, none) for slot in range(4)], 1)
    return units.reshape(-1, *rows.shape[1:])


def from_slots(rows: Tensor, slots: tuple[int, ...]) -> Tensor:
    """The inverse: rows [H * S, ...] to [G*H, ...]."""
    G = len(slots)
    if G == 1:
        return rows
    gates = rows.view(-1, 4, *rows.shape[1:]).transpose(0, 1)
    if slots == tuple(range(G)):
        return gates[:G].reshape(-1, *rows.shape[1:])
    return torch.cat([gates[slot] for slot in slots])


def recurrent_weights(layer: Layer, weights: list[Weights]) -> Tensor:
    """[D, G * H, H] with as many gates as the kernels multiply: those that a cell lacks are 0."""
    from fused_rnn.kernels.plan import SPECS

    name = layer.cell.name
    product = PRODUCTS[SPECS[name].gates]
    if H_SLOTS[name] == product:
        if len(weights) == 1:
            return weights[0].w_hh.contiguous().unsqueeze(0)
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


def _input_bias(layer: Layer, w: Weights) -> Tensor | None:
    """All biases but that of a recurrent part with a slot of its own, by (unit, slot)."""
    if w.b_ih is None or w.b_hh is None:
        return None
    slots, bias = X_SLOTS[layer.cell.name], w.b_ih + w.b_hh
    if splits_last_gate(layer.cell.name):
        last = -w.w_hh.shape[1]
        bias = torch.cat([bias[:last], w.b_ih[last:]])
    return to_slots(bias, slots)


def recurrent_bias(layer: Layer, weights: list[Weights]) -> Tensor | None:
    """The one that `_input_bias` leaves out, b_hn of a GRU: [D, H], zeros without biases."""
    if not splits_last_gate(layer.cell.name):
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
    w_ih, bias = to_slots(w.w_ih, X_SLOTS[layer.cell.name]).t(), _input_bias(layer, w)
    if bias is None:
        return torch.mm(x, w_ih, out=out)
    return torch.addmm(bias, x, w_ih, out=out)


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
        flat = dgates[d].view(x.shape[0], -1)
        need = needs[3 + d * len(w) : 3 + (d + 1) * len(w)]
        if needs[0]:
            w_ih = to_slots(w.w_ih, x_slots)
            dx = flat @ w_ih if dx is None else dx.addmm_(flat, w_ih)
        dw_ih = from_slots(flat.t() @ x, x_slots) if need[0] else None
        dw_hh = db_ih = db_hh = None
        if need[1]:
            columns = slice(d * H, (d + 1) * H)
            if fed is None:
                state = out if len(weights) == 1 else out[:, columns]
                dw = layer.rows.recurrent_product(flat, state, h0[d], d == 1)
            else:
                dw = flat.t() @ fed[:, columns]
            dw_hh = from_slots(dw, h_slots)
        if need[2] or need[3]:
            bias = flat.sum(0)
            db_ih = from_slots(bias, x_slots) if need[2] or x_slots == h_slots else None
            # The two biases of most cells have one gradient.
            db_hh = db_ih if x_slots == h_slots else from_slots(bias, h_slots)
        dflat += [dw_ih, dw_hh, db_ih if need[2] else None, db_hh if need[3] else None, None]
    return dx, dflat

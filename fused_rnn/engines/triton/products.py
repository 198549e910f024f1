"""The matrix products around the sweeps: gates before the forward one, gradients after the other.

A gate buffer holds the S gate slots of a unit side by side (S is 1 for one gate, else 4), so the
rows of the weights are brought into the order (unit, slot) first, see `kernels/pack.py`.
"""

import torch
from torch import Tensor

from fused_rnn.kernels.cell import KernelCell
from fused_rnn.kernels.plan import PlanRequest, Precision
from fused_rnn.spec.layer import (
    NO_TENSORS,
    LayerInputs,
    LayerSpec,
    Needs,
    OptionTensors,
    WeightGrads,
    Weights,
)


def kernel_cell(spec: LayerSpec) -> KernelCell:
    """The layer's cell as the kernels know it; the choice of an engine has seen that they do."""
    cell = spec.cell.kernels
    assert cell is not None
    return cell


def plan_request(spec: LayerSpec, dtype: torch.dtype, precision: Precision) -> PlanRequest:
    """What the plan of a layer in ``dtype`` is asked for."""
    H, B, D = spec.hidden_size, spec.layout.B, spec.directions
    return PlanRequest(kernel_cell(spec), H, dtype, B, D, precision)


def contiguous(inputs: LayerInputs) -> LayerInputs:
    """The same with elements one behind the other, all but x: kernels know no strides."""
    x, h0, c0, weights, options = inputs
    c0 = None if c0 is None else c0.contiguous()
    weights = tuple(
        [Weights._make([t if t is None else t.contiguous() for t in w]) for w in weights]
    )
    if options is not NO_TENSORS:
        options = OptionTensors(*[t if t is None else t.contiguous() for t in options])
    return LayerInputs(x, h0.contiguous(), c0, weights, options)


def recurrent_weights(spec: LayerSpec, weights: tuple[Weights, ...]) -> Tensor:
    """[D, G * H, H] with as many gates as the kernels multiply: those that a cell lacks are 0."""
    cell = kernel_cell(spec)
    if cell.h_slots == cell.product:
        if len(weights) == 1:
            return weights[0].w_hh.unsqueeze(0)
        return torch.stack([w.w_hh for w in weights])
    H = spec.hidden_size
    none = weights[0].w_hh.new_zeros(H, H)
    parts = []
    for w in weights:
        gates = dict(zip(cell.h_slots, w.w_hh.view(-1, H, H), strict=True))
        parts += [gates.get(slot, none) for slot in cell.product]
    return torch.stack(parts).view(len(weights), -1, H)


def recurrent_bias(spec: LayerSpec, weights: tuple[Weights, ...]) -> Tensor | None:
    """That of a part with a slot of its own, b_hn of a GRU: [D, H], zeros without biases."""
    if not kernel_cell(spec).splits_last_gate:
        return None
    H = spec.hidden_size
    biases = [w.w_hh.new_zeros(H) if w.b_hh is None else w.b_hh[-H:] for w in weights]
    return biases[0].unsqueeze(0) if len(biases) == 1 else torch.stack(biases)


def project(spec: LayerSpec, x: Tensor, weights: tuple[Weights, ...]) -> Tensor:
    """The input part of the pre-activations with the biases, [D, N, H, S]."""
    H, S = spec.hidden_size, kernel_cell(spec).slots
    shape = (len(weights), x.shape[0], H, S)
    if len(weights) == 1:
        return _project(spec, x, weights[0], None).view(shape)
    gates = x.new_empty(shape)
    for d, w in enumerate(weights):
        _project(spec, x, w, gates[d].view(x.shape[0], H * S))
    return gates


def _project(spec: LayerSpec, x: Tensor, w: Weights, out: Tensor | None) -> Tensor:
    w_ih, bias = _by_unit(spec, w)
    if bias is None:
        return torch.mm(x, w_ih.t(), out=out)
    return torch.addmm(bias, x, w_ih.t(), out=out)


def _by_unit(spec: LayerSpec, w: Weights, biases: bool = True) -> tuple[Tensor, Tensor | None]:
    """The input weights and the biases, which share them, in the order of the gate buffer."""
    from fused_rnn.kernels.pack import pack

    cell = kernel_cell(spec)
    b_ih, b_hh = (w.b_ih, w.b_hh) if biases else (None, None)
    if cell.slots == 1:
        return w.w_ih, None if b_ih is None or b_hh is None else b_ih + b_hh
    return pack(w.w_ih, b_ih, b_hh, cell.x_slots, cell.h_slots)


def rebuild_gates(
    spec: LayerSpec, inputs: LayerInputs, out: Tensor, operand: Tensor | None
) -> Tensor:
    """What the forward sweep would have saved: h of every step is known, so one product does.

    ``operand`` [N, D*H] is what the recurrent product took, where that is not h0 and ``out``.
    """
    from fused_rnn.kernels.pack import pack

    x, h0, _, weights, _ = inputs
    H, cell = spec.hidden_size, kernel_cell(spec)
    gates = project(spec, x, weights)
    for d, (buffer, w) in enumerate(zip(gates, weights, strict=True)):
        columns = slice(d * H, (d + 1) * H)
        if operand is None:
            before = spec.layout.previous(out[:, columns], h0[d], d == 1)
        else:
            before = operand[:, columns]
        w_hh = w.w_hh
        if cell.slots > 1:
            w_hh, _ = pack(w_hh, None, None, cell.h_slots, cell.h_slots)
        buffer.view(x.shape[0], -1).addmm_(before, w_hh.t())
        cell.activate(buffer)
    return gates


def gradients(
    spec: LayerSpec,
    inputs: LayerInputs,
    out: Tensor,
    operand: Tensor | None,
    dgates: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, tuple[WeightGrads, ...]]:
    """Those of x, and of the parameters of all directions, from those of the gates [D, N, H, S]."""
    from fused_rnn.kernels.pack import unpack

    x, h0, _, weights, _ = inputs
    H, cell = spec.hidden_size, kernel_cell(spec)
    dx: Tensor | None = None
    dweights = []
    for d, (w, need) in enumerate(zip(weights, needs.weights, strict=True)):
        flat, columns = dgates[d].view(x.shape[0], -1), slice(d * H, (d + 1) * H)
        if needs.x:
            w_ih, _ = _by_unit(spec, w, biases=False)
            dx = flat @ w_ih if dx is None else dx.addmm_(flat, w_ih)
        dw_ih = flat.t() @ x if need.w_ih else None
        dw_hh = None
        if need.w_hh and operand is not None:
            dw_hh = flat.t() @ operand[:, columns]
        elif need.w_hh:
            state = out if len(weights) == 1 else out[:, columns]
            dw_hh = spec.layout.recurrent_product(flat, state, h0[d], d == 1, spec.from_zero)
        db = flat.sum(0) if need.b_ih or need.b_hh else None
        if cell.slots == 1:  # the two biases have one gradient
            grads = WeightGrads(dw_ih, dw_hh, db if need.b_ih else None, db if need.b_hh else None)
        elif dw_ih is None and dw_hh is None and db is None:
            grads = WeightGrads()
        else:
            biases = need.b_ih, need.b_hh
            grads = WeightGrads(*unpack(dw_ih, dw_hh, db, biases, cell.x_slots, cell.h_slots))
        dweights.append(grads)
    return dx, tuple(dweights)

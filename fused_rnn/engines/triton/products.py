"""The matrix products around the sweeps: gates before the forward one, gradients after the other.

A gate buffer holds the S gate slots of a unit side by side (S is 1 for one gate, else 4), so the
rows of the weights are brought into the order (unit, slot) first, see `kernels/pack.py`.

To the kernels a head is a direction of its own. In the order (unit, slot) the rows of a head lie
together, so that the products of all k heads of a direction, H / k units each, are one batched one.
"""

import torch
from torch import Tensor

from fused_rnn.kernels.cell import KernelCell
from fused_rnn.kernels.plan import PlanRequest, Precision
from fused_rnn.kernels.sweep import Gradients
from fused_rnn.spec.layer import (
    NO_TENSORS,
    LayerInputs,
    LayerSpec,
    Needs,
    OptionTensors,
    WeightGrads,
    WeightNeeds,
    Weights,
)


def kernel_cell(spec: LayerSpec) -> KernelCell:
    """The layer's cell as the kernels know it; the choice of an engine has seen that they do."""
    cell = spec.cell.kernels
    assert cell is not None
    return cell


def plan_request(spec: LayerSpec, dtype: torch.dtype, precision: Precision) -> PlanRequest:
    """What the plan of a layer in ``dtype`` is asked for."""
    H, B, D, heads = spec.hidden_size, spec.layout.B, spec.directions, spec.heads
    cell = kernel_cell(spec)
    return PlanRequest(cell, H // heads, dtype, B, D * heads, precision, heads=heads)


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
    """[D * k, G * H/k, H/k], of as many gates as the kernels multiply: those a cell lacks are 0."""
    cell, heads = kernel_cell(spec), spec.heads
    H = spec.hidden_size // heads
    parts = [w.w_hh.view(heads, -1, H) for w in weights]
    if cell.h_slots != cell.product:
        parts = [_all_gates(cell, w) for w in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _all_gates(cell: KernelCell, w: Tensor) -> Tensor:
    """The weights of each head, with those of the gates that a cell lacks."""
    heads, _, H = w.shape
    gates = dict(zip(cell.h_slots, w.view(heads, -1, H, H).unbind(1), strict=True))
    none = w.new_zeros(heads, H, H)
    return torch.stack([gates.get(slot, none) for slot in cell.product], 1).view(heads, -1, H)


def recurrent_bias(spec: LayerSpec, weights: tuple[Weights, ...]) -> Tensor | None:
    """That of a part with a slot of its own, b_hn of a GRU: [D * k, H/k], zeros without biases."""
    if not kernel_cell(spec).splits_last_gate:
        return None
    H = spec.hidden_size
    biases = [w.w_hh.new_zeros(H) if w.b_hh is None else w.b_hh[-H:] for w in weights]
    bias = biases[0] if len(biases) == 1 else torch.cat(biases)
    return bias.view(-1, H // spec.heads)


def own_vectors(weights: tuple[Weights, ...]) -> Tensor | None:
    """The cell's own parameters [D, P, H], or None."""
    vectors = [w.vectors for w in weights if w.vectors is not None]
    if len(vectors) == 1:
        return vectors[0].unsqueeze(0)
    return torch.stack(vectors) if vectors else None


def project(spec: LayerSpec, x: Tensor, weights: tuple[Weights, ...]) -> Tensor:
    """The input part of the pre-activations with the biases, [D * k, N, H/k, S]."""
    N, k, S = x.shape[0], spec.heads, kernel_cell(spec).slots
    H = spec.hidden_size // k
    shape = (len(weights) * k, N, H, S)
    if len(weights) == 1:
        return _project(spec, x, weights[0], None).view(shape)
    gates = x.new_empty(shape)
    for d, w in enumerate(weights):
        one = gates[d * k : (d + 1) * k].view(k, N, H * S)
        _project(spec, x, w, one if k > 1 else one[0])
    return gates


def _project(spec: LayerSpec, x: Tensor, w: Weights, out: Tensor | None) -> Tensor:
    """Of one direction: [N, H * S], or with heads [k, N, H/k * S]."""
    w_ih, bias = by_unit(spec, w)
    if spec.heads > 1:
        w_ih = w_ih.view(spec.heads, -1, x.shape[1]).transpose(1, 2)
        rows = x.expand(spec.heads, *x.shape)
        if bias is None:
            return torch.bmm(rows, w_ih, out=out)
        return torch.baddbmm(bias.view(spec.heads, 1, -1), rows, w_ih, out=out)
    if bias is None:
        return torch.mm(x, w_ih.t(), out=out)
    return torch.addmm(bias, x, w_ih.t(), out=out)


def by_unit(spec: LayerSpec, w: Weights, biases: bool = True) -> tuple[Tensor, Tensor | None]:
    """The input weights and the biases, which share them, in the order of the gate buffer."""
    from fused_rnn.kernels.pack import pack

    cell = kernel_cell(spec)
    b_ih, b_hh = (w.b_ih, w.b_hh) if biases else (None, None)
    if cell.slots == 1:
        return w.w_ih, None if b_ih is None or b_hh is None else b_ih + b_hh
    return pack(w.w_ih, b_ih, b_hh, cell.x_slots, cell.h_slots)


def gradients(
    spec: LayerSpec,
    inputs: LayerInputs,
    out: Tensor,
    operand: Tensor | None,
    result: Gradients,
    needs: Needs,
) -> tuple[Tensor | None, tuple[WeightGrads, ...]]:
    """Those of x, and of the parameters of all directions, from what the reverse sweep found."""
    N, k = inputs.x.shape[0], spec.heads
    dvectors = None if result.dvectors is None else result.dvectors.sum(1).to(inputs.x.dtype)
    dx: Tensor | None = None
    dweights = []
    for d, (w, need) in enumerate(zip(inputs.weights, needs.weights, strict=True)):
        slots = result.dgates[d * k : (d + 1) * k].view(k, N, -1)
        if needs.x:
            flat = slots[0] if k == 1 else slots.transpose(0, 1).reshape(N, -1)
            w_ih, _ = by_unit(spec, w, biases=False)
            dx = flat @ w_ih if dx is None else dx.addmm_(flat, w_ih)
        grads = _weight_gradients(spec, inputs, out, operand, slots, need, d)
        if dvectors is not None and need.vectors:
            grads = grads._replace(vectors=dvectors[d])
        dweights.append(grads)
    return dx, tuple(dweights)


def _weight_gradients(
    spec: LayerSpec,
    inputs: LayerInputs,
    out: Tensor,
    operand: Tensor | None,
    slots: Tensor,
    need: WeightNeeds,
    d: int,
) -> WeightGrads:
    """Those of one direction's weights and biases, from those of its slots [k, N, H/k * S]."""
    x = inputs.x
    dw_ih = dw_hh = None
    if need.w_ih and spec.heads > 1:
        dw_ih = torch.bmm(slots.transpose(1, 2), x.expand(spec.heads, *x.shape)).flatten(0, 1)
    elif need.w_ih:
        dw_ih = slots[0].t() @ x
    if need.w_hh:
        dw_hh = _recurrent_gradient(spec, inputs, out, operand, slots, d)
    db = slots.sum(1).flatten() if need.b_ih or need.b_hh else None
    return parameter_gradients(spec, dw_ih, dw_hh, db, need)


def parameter_gradients(
    spec: LayerSpec,
    dw_ih: Tensor | None,
    dw_hh: Tensor | None,
    db: Tensor | None,
    need: WeightNeeds,
) -> WeightGrads:
    """Those of one direction in torch's order, from those whose rows are in that of the buffer."""
    from fused_rnn.kernels.pack import unpack

    cell = kernel_cell(spec)
    if cell.slots == 1:  # the two biases have one gradient
        return WeightGrads(dw_ih, dw_hh, db if need.b_ih else None, db if need.b_hh else None)
    biases = need.b_ih, need.b_hh
    rows = dw_hh if spec.heads == 1 else None
    grads = WeightGrads()
    if not (dw_ih is None and rows is None and db is None):
        grads = WeightGrads(*unpack(dw_ih, rows, db, biases, cell.x_slots, cell.h_slots))
    return grads if spec.heads == 1 else grads._replace(w_hh=dw_hh)


def _recurrent_gradient(
    spec: LayerSpec,
    inputs: LayerInputs,
    out: Tensor,
    operand: Tensor | None,
    slots: Tensor,
    d: int,
) -> Tensor:
    """That of w_hh: [H * S, H] in the order (unit, slot); of heads in the order of the weights."""
    k, H, h0, cell = spec.heads, spec.hidden_size, inputs.h0[d], kernel_cell(spec)
    columns = slice(d * H, (d + 1) * H)
    if k == 1 and operand is not None:
        return slots[0].t() @ operand[:, columns]
    if k == 1:
        state = out if spec.directions == 1 else out[:, columns]
        return spec.layout.recurrent_product(slots[0], state, h0, d == 1, spec.from_zero)
    before = by_head(spec, operand_of(spec, inputs, out, operand, d))
    rows = torch.bmm(slots.transpose(1, 2), before).unflatten(1, (-1, cell.slots))
    return torch.stack([rows[:, :, slot] for slot in cell.h_slots], 1).flatten(1, 2)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a^T b`` to a total, which may be in fp32 where they are not."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


def operand_of(
    spec: LayerSpec, inputs: LayerInputs, out: Tensor, operand: Tensor | None, d: int
) -> Tensor:
    """What the recurrent product of each row's step took, [N, H] of a direction."""
    columns = slice(d * spec.hidden_size, (d + 1) * spec.hidden_size)
    if operand is not None:
        return operand[:, columns]
    return spec.layout.previous(out[:, columns], inputs.h0[d], d == 1)


def by_head(spec: LayerSpec, rows: Tensor) -> Tensor:
    """[N, H] as [k, N, H/k]."""
    return rows.view(rows.shape[0], spec.heads, -1).transpose(0, 1)

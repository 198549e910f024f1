"""The Triton engine: one matrix product before the forward sweep, one per gradient after the other.

    x ── x @ W_ih^T + b ──► gates [D, N, H, S] ── forward sweep ──► out, c, gates (overwritten)
    dout ── reverse sweep ──► dgates [D, N, H, S] ── dgates^T h_prev, dgates^T x, dgates W_ih

A gate buffer holds the S gate slots of a unit side by side (S is 1 for RNN, else 4), so the rows of
the input weights are brought into the order (unit, slot) first.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fused_rnn.cells import BY_NAME, Cell
from fused_rnn.extras import resets
from fused_rnn.precision import matmul_precision, rnn_precision
from fused_rnn.problem import Grads, Layer, OutputGrads, Outputs, Saved, Specs, Weights

if TYPE_CHECKING:
    from fused_rnn.kernels.extras import Extras
    from fused_rnn.kernels.plan import Limits, Plan

# Slots that the input product fills, and those of the recurrent product, in torch.nn's gate order.
# The GRU's last slot is W_hn h + b_hn: the reset gate acts before the input's part is added.
_X_SLOTS = {"rnn_tanh": (0,), "rnn_relu": (0,), "gru": (0, 1, 2), "lstm": (0, 1, 2, 3)}
_H_SLOTS = _X_SLOTS | {"gru": (0, 1, 3)}
# The slots of the recurrent products that the kernels know, by the number of gates.
_PRODUCTS = {1: (0,), 3: (0, 1, 3), 4: (0, 1, 2, 3)}
OLDEST_TRITON = (3, 6)  # the kernels are compiled by 3.6 and 3.9 in tests
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


class UnknownDevice(LookupError):
    """A GPU older than, or unlike, all that the table of limits knows."""


@lru_cache
def _refusal_of_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    import triton

    major, minor, *_ = triton.__version__.split(".")
    if (int(major), int(minor)) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"the kernels need Triton {oldest} or newer, not {triton.__version__}"
    return None


def refusal(dtype: torch.dtype, projected: bool) -> str | None:
    """Why no GPU could run a layer, or None."""
    if reason := _refusal_of_triton():
        return reason
    if dtype not in _DTYPES:
        return f"there are kernels for float32, float16 and bfloat16, not for {dtype}"
    if projected:
        return "there are no kernels for projections (proj_size)"
    return None


@lru_cache
def device_limits(device: torch.device) -> "Limits":
    """What the chip offers: the table's entry for its architecture, with its own counts."""
    from fused_rnn.kernels.plan import LIMITS

    if device.type == "cpu":  # the interpreter runs one program after the other: none can wait
        return replace(LIMITS[80], groups=False)
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        if name not in LIMITS:
            raise UnknownDevice(name)
        return replace(LIMITS[name], sms=properties.multi_processor_count)
    capability = 10 * properties.major + properties.minor
    known = [k for k in LIMITS if isinstance(k, int) and k <= capability]
    if not known:
        raise UnknownDevice(f"sm_{capability}")
    return replace(
        LIMITS[max(known)],
        sms=properties.multi_processor_count,
        shared=properties.shared_memory_per_block_optin,
        sm_shared=properties.shared_memory_per_multiprocessor,
    )


@dataclass(frozen=True)
class TritonEngine:
    """One layer on a GPU. See :class:`fused_rnn.problem.Engine`.

    Attributes:
        plan: tiles, warps, resources.
        precision: "ieee" or "tf32", of fp32 products; backward keeps that of forward.
    """

    plan: "Plan"
    precision: Literal["ieee", "tf32"]

    def forward(self, layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
        """Run the layer; saves the gates and c of all steps, with ``recompute`` c alone."""
        from fused_rnn.kernels.forward import forward_sweep

        x, h0, c0, flat = _split(inputs)
        weights = list(layer.unflatten(flat))
        H, name = h0.shape[-1], layer.cell.name
        with _on(x, self.precision):
            gates = _project(layer, x, weights)
            out = x.new_empty(x.shape[0], layer.directions * H)
            swept = forward_sweep(
                name,
                gates,
                _recurrent_weights(layer, weights),
                _recurrent_bias(layer, weights),
                h0.contiguous(),
                None if c0 is None else c0.contiguous(),
                out,
                rows=layer.rows.on(x.device),
                reverse=_reverse(layer),
                save=save,
                precision=self.precision,
                plan=self.plan,
                extras=_kernel_extras(layer, inputs),
                cells=_wants_cells(layer),
            )
        c_n, c_seq = swept.c_n, swept.c_seq
        outputs = Outputs(
            out,
            swept.h_n,
            None if c_n is None else c_n.to(x.dtype),
            # A copy, even in fp32: what is saved for backward is not to be the user's.
            c_seq.to(x.dtype, copy=True) if c_seq is not None and _wants_cells(layer) else None,
        )
        if not save:
            return outputs, ()
        keep_gates = _saves_gates(layer, inputs) and not layer.recompute
        return outputs, (gates if keep_gates else None, c_seq, swept.fed)

    def saved_specs(self, layer: Layer, inputs: Saved) -> Specs:
        """See :class:`fused_rnn.problem.Engine`."""
        x, h0, c0, _ = _split(inputs)
        D, _, H = h0.shape
        slots = 1 if len(_X_SLOTS[layer.cell.name]) == 1 else 4
        kept = _saves_gates(layer, inputs) and not layer.recompute
        masks = layer.masks(inputs)
        fed = any(t is not None for t in (masks.lengths, masks.reset, masks.drop))
        fed = fed or (layer.rows.batch_sizes is not None and self.plan.members > 1)
        return (
            ((D, x.shape[0], H, slots), x.dtype) if kept else None,
            None if c0 is None else ((x.shape[0], D * H), torch.float32),
            ((x.shape[0], D * H), x.dtype) if fed else None,
        )

    def backward(
        self,
        layer: Layer,
        inputs: Saved,
        outputs: Outputs,
        saved: Saved,
        grads: OutputGrads,
        needs: tuple[bool, ...],
    ) -> Grads:
        """The reverse sweep, then one matrix product for each gradient that is needed."""
        from fused_rnn.kernels.backward import reverse_sweep

        x, h0, c0, flat = _split(inputs)
        weights = list(layer.unflatten(flat))
        gates, c_seq, fed = saved
        with _on(x, self.precision):
            if gates is None and _saves_gates(layer, inputs):
                gates = _rebuild_gates(layer, x, h0, outputs.out, fed, weights)
            found = reverse_sweep(
                layer.cell.name,
                gates,
                c_seq,
                outputs.out,
                _recurrent_weights(layer, weights),
                h0.contiguous(),
                None if c0 is None else c0.contiguous(),
                *(None if g is None else g.contiguous() for g in grads),
                rows=layer.rows.on(x.device),
                reverse=_reverse(layer),
                precision=self.precision,
                plan=self.plan,
                extras=_kernel_extras(layer, inputs),
            )
            dx, dflat = _products(layer, x, h0, outputs.out, fed, weights, found.dgates, needs)
        states = [
            g.to(x.dtype) if need and g is not None else None
            for g, need in zip((found.dh0, found.dc0), needs[1:3], strict=True)
        ]
        dmasks = [
            g.sum(1).to(x.dtype) if g is not None else None
            for g in (found.drestart_h, found.drestart_c)
        ]
        more = () if layer.extras is None else (None, None, *dmasks, None, None, None)
        return dx, *states, *dflat, *more


def register(
    cell: Cell,
    *,
    step: Any,
    factors: Any,
    adjoint: Any,
    x_slots: tuple[int, ...],
    h_slots: tuple[int, ...],
    saved: Callable[[Tensor], Any],
    cell_state: Any = None,
) -> None:
    """Let the kernels run one more cell; docs/adding_a_cell.md has an example.

    Args:
        cell: the cell, known to :func:`fused_rnn.cells.register`.
        step: Triton functions as in ``fused_rnn/kernels/cells.py``; so the next two.
        factors: see there.
        adjoint: see there.
        x_slots: the slot of each gate's input part.
        h_slots: the slot of each gate's recurrent part. It is the same one, but if the last gate
            has its input part in slot 2, its recurrent part may have slot 3 (the GRU's way).
        saved: the slots [N, H, S] from pre-activations to what ``step`` saves, in place, in
            PyTorch: for ``recompute``.
        cell_state: Triton function ``(saved, c before) -> c after`` the step. Without one, a cell
            with c runs in the eager loop where there is zoneout.

    Raises:
        ValueError: the slots are none that the kernels have, or the cell is not known, or has
            kernels already.
    """
    from fused_rnn.kernels import cells as kernel_cells
    from fused_rnn.kernels.plan import SPECS, Spec

    if BY_NAME.get(cell.name) is not cell or cell.name in SPECS:
        raise ValueError(f"the cell {cell.name!r} is not registered, or has its kernels already")
    split = x_slots[:-1] == h_slots[:-1] and (x_slots[-1:], h_slots[-1:]) == ((2,), (3,))
    gates = 1 if h_slots == (0,) else 3 if split else 4
    fits = (split or x_slots == h_slots) and set(h_slots) <= set(_PRODUCTS[gates])
    fits = fits and len(set(h_slots)) == len(h_slots) == cell.gates
    if not fits or (gates == 1) != (cell.gates == 1):
        raise ValueError(
            f"the kernels cannot run {cell.gates} gates with x_slots={x_slots}, h_slots={h_slots}"
        )
    SPECS[cell.name] = Spec(gates, 1 if gates == 1 else 4, 2 if cell.has_c else 1)
    kernel_cells.STEPS[cell.name] = step
    kernel_cells.FACTORS[cell.name] = factors
    kernel_cells.ADJOINTS[cell.name] = adjoint
    _X_SLOTS[cell.name], _H_SLOTS[cell.name] = x_slots, h_slots
    _SAVED[cell.name] = saved
    if cell_state is not None:
        kernel_cells.CELL_STATES[cell.name] = cell_state


def make_engine(
    layer: Layer, device: torch.device, dtype: torch.dtype, H: int, projected: bool
) -> TritonEngine | str:
    """The engine for a layer, or why there is none."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"Triton runs on CUDA and ROCm devices, not on {device.type}"
    if reason := refusal(dtype, projected):
        return reason
    from fused_rnn.kernels.cells import CELL_STATES
    from fused_rnn.kernels.plan import DoesNotFit
    from fused_rnn.tuning import Request, choose_plan

    zoned = layer.extras is not None and layer.extras.zoned
    if zoned and layer.cell.has_c and layer.cell.name not in CELL_STATES:
        return f"there are no kernels for {layer.cell.name} with zoneout"
    gpu = device.type == "cuda"
    precision: Literal["ieee", "tf32"] = rnn_precision() if gpu else "ieee"
    request = Request(layer.cell.name, H, dtype, layer.rows.B, layer.directions, precision)
    try:
        plan = choose_plan(request, device_limits(device), device)
    except UnknownDevice as unknown:
        return f"no plan for {unknown}"
    except DoesNotFit as reason:
        return str(reason)
    return TritonEngine(plan, precision)


def _split(inputs: Saved) -> tuple[Tensor, Tensor, Tensor | None, Saved]:
    x, h0, c0, *flat = inputs
    assert x is not None
    assert h0 is not None
    return x, h0, c0, tuple(flat)


def _wants_cells(layer: Layer) -> bool:
    return layer.extras is not None and layer.extras.cells


def _saves_gates(layer: Layer, inputs: Saved) -> bool:
    """Whether backward needs the gates: one gate alone follows from the output, if all is put out.

    Zoneout keeps a part of it back.
    """
    zoned = layer.extras is not None and layer.extras.zoned
    return len(_X_SLOTS[layer.cell.name]) > 1 or zoned


def _kernel_extras(layer: Layer, inputs: Saved) -> "Extras":
    """The extras as the kernels take them."""
    from fused_rnn.kernels.extras import Extras

    if layer.extras is None:
        return Extras()
    masks, reset = layer.masks(inputs), resets(layer, layer.masks(inputs))

    def bytes_of(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.contiguous().view(torch.uint8)

    plain = [None if t is None else t.contiguous() for t in (*masks[2:4], masks.drop)]
    lengths = masks.lengths
    return Extras(
        lengths=None if lengths is None else lengths.clamp(0, layer.rows.T).to(torch.int32),
        reset=bytes_of(reset),
        restart_h=plain[0],
        restart_c=plain[1],
        zone_h=bytes_of(masks.zone_h),
        zone_c=bytes_of(masks.zone_c),
        zoneout=layer.extras.zoneout if layer.extras.zoned and masks.zone_h is None else None,
        drop=plain[2],
        clip=layer.extras.clip,
    )


def _reverse(layer: Layer) -> tuple[bool, ...]:
    return tuple(d == 1 for d in range(layer.directions))


class _on:
    """The device of a tensor, and the precision of fp32 products there."""

    def __init__(self, x: Tensor, precision: str) -> None:
        self.contexts: tuple[AbstractContextManager[Any], ...] = (nullcontext(),)
        if x.is_cuda:  # backward runs in a thread of its own, whose current device is another
            self.contexts = (torch.cuda.device(x.device), matmul_precision(precision))

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def _to_slots(rows: Tensor, slots: tuple[int, ...]) -> Tensor:
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


def _from_slots(rows: Tensor, slots: tuple[int, ...]) -> Tensor:
    """The inverse: rows [H * S, ...] to [G*H, ...]."""
    if len(slots) == 1:
        return rows
    units = rows.view(-1, 4, *rows.shape[1:])
    return units[:, list(slots)].transpose(0, 1).flatten(0, 1)


def _recurrent_weights(layer: Layer, weights: list[Weights]) -> Tensor:
    """[D, G * H, H] with as many gates as the kernels multiply: those that a cell lacks are 0."""
    from fused_rnn.kernels.plan import SPECS

    name, w_hh = layer.cell.name, torch.stack([w.w_hh for w in weights])
    product = _PRODUCTS[SPECS[name].gates]
    if _H_SLOTS[name] == product:
        return w_hh
    D, _, H = w_hh.shape
    padded = w_hh.new_zeros(D, len(product), H, H)
    padded[:, [product.index(slot) for slot in _H_SLOTS[name]]] = w_hh.view(D, -1, H, H)
    return padded.flatten(1, 2)


def _splits_last_gate(cell: str) -> bool:
    """Whether the last gate's recurrent part has a slot of its own, as in a GRU."""
    return _X_SLOTS[cell][-1] != _H_SLOTS[cell][-1]


def _input_bias(layer: Layer, w: Weights) -> Tensor | None:
    """All biases but that of a recurrent part with a slot of its own, by (unit, slot)."""
    if w.b_ih is None or w.b_hh is None:
        return None
    bias = w.b_ih + w.b_hh
    if _splits_last_gate(layer.cell.name):
        last = bias.shape[0] - w.w_hh.shape[1]
        bias = torch.cat([bias[:last], w.b_ih[last:]])
    return _to_slots(bias, _X_SLOTS[layer.cell.name])


def _recurrent_bias(layer: Layer, weights: list[Weights]) -> Tensor | None:
    """The one that `_input_bias` leaves out, b_hn of a GRU: [D, H], zeros without biases."""
    if not _splits_last_gate(layer.cell.name):
        return None
    H = weights[0].w_hh.shape[1]
    return torch.stack([w.w_hh.new_zeros(H) if w.b_hh is None else w.b_hh[-H:] for w in weights])


def _project(layer: Layer, x: Tensor, weights: list[Weights]) -> Tensor:
    """The input part of the pre-activations with the biases, [D, N, H, S]."""
    H, slots = weights[0].w_hh.shape[1], _X_SLOTS[layer.cell.name]
    S = 1 if len(slots) == 1 else 4
    gates = x.new_empty(len(weights), x.shape[0], H * S)
    for buffer, w in zip(gates, weights, strict=True):
        w_ih, bias = _to_slots(w.w_ih, slots), _input_bias(layer, w)
        if bias is None:
            torch.mm(x, w_ih.t(), out=buffer)
        else:
            torch.addmm(bias, x, w_ih.t(), out=buffer)
    return gates.view(len(weights), x.shape[0], H, S)


def _rebuild_gates(
    layer: Layer, x: Tensor, h0: Tensor, out: Tensor, fed: Tensor | None, weights: list[Weights]
) -> Tensor:
    """What the forward sweep would have saved: h of every step is known, so one product does."""
    H, name = h0.shape[-1], layer.cell.name
    gates = _project(layer, x, weights)
    for d, (buffer, w) in enumerate(zip(gates, weights, strict=True)):
        columns = slice(d * H, (d + 1) * H)
        if fed is None:
            before = layer.rows.previous(out[:, columns], h0[d], d == 1)
        else:
            before = fed[:, columns]
        flat = buffer.view(x.shape[0], -1)
        flat.addmm_(before, _to_slots(w.w_hh, _H_SLOTS[name]).t())
        bias = _recurrent_bias(layer, [w])
        if bias is not None:
            buffer[..., 3] += bias[0]
        _SAVED[name](buffer)
    return gates


def _gru_saved(gates: Tensor) -> None:
    gates[..., :2].sigmoid_()
    gates[..., 2].addcmul_(gates[..., 0], gates[..., 3]).tanh_()


def _lstm_saved(gates: Tensor) -> None:
    candidate = torch.tanh(gates[..., 2])
    gates.sigmoid_()
    gates[..., 2] = candidate


# What the step saves, formed in place from the pre-activations [N, H, S].
_SAVED: dict[str, Callable[[Tensor], Any]] = {
    "rnn_tanh": torch.tanh_,
    "rnn_relu": torch.relu_,
    "gru": _gru_saved,
    "lstm": _lstm_saved,
}


def _products(
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
    x_slots, h_slots = _X_SLOTS[name], _H_SLOTS[name]
    dx: Tensor | None = None
    dflat: list[Tensor | None] = []
    for d, w in enumerate(weights):
        flat = dgates[d].flatten(1)
        need = needs[3 + d * len(w) : 3 + (d + 1) * len(w)]
        if needs[0]:
            w_ih = _to_slots(w.w_ih, x_slots)
            dx = flat @ w_ih if dx is None else dx.addmm_(flat, w_ih)
        dw_hh = None
        if need[1]:
            columns = slice(d * H, (d + 1) * H)
            if fed is None:
                dw = layer.rows.recurrent_product(flat, out[:, columns], h0[d], d == 1)
            else:
                dw = flat.t() @ fed[:, columns]
            dw_hh = _from_slots(dw, h_slots)
        bias = flat.sum(0) if need[2] or need[3] else None
        dflat += [
            _from_slots(flat.t() @ x, x_slots) if need[0] else None,
            dw_hh,
            _from_slots(bias, x_slots) if need[2] and bias is not None else None,
            _from_slots(bias, h_slots) if need[3] and bias is not None else None,
            None,
        ]
    return dx, dflat

"""The Triton engine: one matrix product before the forward sweep, one per gradient after the other.

x ── x @ W_ih^T + b ──► gates [D, N, H, S] ── forward sweep ──► out, c, gates (overwritten)
dout ── reverse sweep ──► dgates [D, N, H, S] ── dgates^T h_prev, dgates^T x, dgates W_ih
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fused_rnn.cells import BY_NAME, Cell
from fused_rnn.devices import UnknownDevice, device_limits, kernel_device
from fused_rnn.extras import resets
from fused_rnn.precision import matmul_precision, rnn_precision
from fused_rnn.problem import Grads, Layer, OutputGrads, Outputs, Saved, Specs
from fused_rnn.triton_products import (
    H_SLOTS,
    PRODUCTS,
    SAVED,
    X_SLOTS,
    gradients,
    project,
    rebuild_gates,
    recurrent_bias,
    recurrent_weights,
)

if TYPE_CHECKING:
    from fused_rnn.kernels.extras import Extras
    from fused_rnn.kernels.plan import Plan

OLDEST_TRITON = (3, 6)  # the kernels are compiled by 3.6 and 3.9 in tests
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
            gates = project(layer, x, weights)
            out = x.new_empty(x.shape[0], layer.directions * H)
            swept = forward_sweep(
                name,
                gates,
                recurrent_weights(layer, weights),
                recurrent_bias(layer, weights),
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
        # What only a group's own product needs is not saved: whether there is a group depends on B,
        # which a tracer that has to know what is saved does not.
        fed = swept.fed if _saves_fed(layer, inputs) else None
        return outputs, (gates if keep_gates else None, c_seq, fed)

    def saved_specs(self, layer: Layer, inputs: Saved) -> Specs:
        """See :class:`fused_rnn.problem.Engine`."""
        x, h0, c0, _ = _split(inputs)
        D, _, H = h0.shape
        slots = 1 if len(X_SLOTS[layer.cell.name]) == 1 else 4
        kept = _saves_gates(layer, inputs) and not layer.recompute
        return (
            ((D, x.shape[0], H, slots), x.dtype) if kept else None,
            None if c0 is None else ((x.shape[0], D * H), torch.float32),
            ((x.shape[0], D * H), x.dtype) if _saves_fed(layer, inputs) else None,
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
                gates = rebuild_gates(layer, x, h0, outputs.out, fed, weights)
            found = reverse_sweep(
                layer.cell.name,
                gates,
                c_seq,
                outputs.out,
                recurrent_weights(layer, weights),
                h0.contiguous(),
                None if c0 is None else c0.contiguous(),
                *(None if g is None else g.contiguous() for g in grads),
                rows=layer.rows.on(x.device),
                reverse=_reverse(layer),
                precision=self.precision,
                plan=self.plan,
                extras=_kernel_extras(layer, inputs),
            )
            dx, dflat = gradients(layer, x, h0, outputs.out, fed, weights, found.dgates, needs)
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
    fits = (split or x_slots == h_slots) and set(h_slots) <= set(PRODUCTS[gates])
    fits = fits and len(set(h_slots)) == len(h_slots) == cell.gates
    if not fits or (gates == 1) != (cell.gates == 1):
        raise ValueError(
            f"the kernels cannot run {cell.gates} gates with x_slots={x_slots}, h_slots={h_slots}"
        )
    SPECS[cell.name] = Spec(gates, 1 if gates == 1 else 4, 2 if cell.has_c else 1)
    kernel_cells.STEPS[cell.name] = step
    kernel_cells.FACTORS[cell.name] = factors
    kernel_cells.ADJOINTS[cell.name] = adjoint
    X_SLOTS[cell.name], H_SLOTS[cell.name] = x_slots, h_slots
    SAVED[cell.name] = saved
    if cell_state is not None:
        kernel_cells.CELL_STATES[cell.name] = cell_state


def make_engine(
    layer: Layer, device: torch.device, dtype: torch.dtype, H: int, projected: bool
) -> TritonEngine | str:
    """The engine for a layer, or why there is none."""
    chip = kernel_device(device)
    if chip is None:
        return f"Triton runs on CUDA and ROCm devices, not on {device.type}"
    if reason := refusal(dtype, projected):
        return reason
    from fused_rnn.kernels.cells import CELL_STATES
    from fused_rnn.kernels.plan import DoesNotFit
    from fused_rnn.tuning import Request, choose_plan

    zoned = layer.extras is not None and layer.extras.zoned
    if zoned and layer.cell.has_c and layer.cell.name not in CELL_STATES:
        return f"there are no kernels for {layer.cell.name} with zoneout"
    # 16-bit products have no such switch, and the interpreter has no tensor cores.
    switched = chip.type == "cuda" and dtype == torch.float32
    precision: Literal["ieee", "tf32"] = rnn_precision() if switched else "ieee"
    request = Request(layer.cell.name, H, dtype, layer.rows.B, layer.directions, precision)
    try:
        plan = choose_plan(request, device_limits(chip), chip)
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
    return len(X_SLOTS[layer.cell.name]) > 1 or zoned


def _saves_fed(layer: Layer, inputs: Saved) -> bool:
    """Whether backward needs what the recurrent product took: it is not h0 and the output."""
    masks = layer.masks(inputs)
    return any(t is not None for t in (masks.lengths, masks.reset, masks.drop))


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

"""Parameters and their gradients between torch.nn's order and that of the gate buffer.

torch.nn stacks the gates, row = gate * H + unit. The gate buffer holds the four slots of a unit
side by side, so around its matrix products the rows are (unit, slot). One launch brings all that a
direction has into order, where PyTorch would need a call for each view, copy and sum.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_rnn.kernels.launch import Variant, launch_once

NONE = 7  # stands for no gate, in three bits
UNITS, COLUMNS = 16, 64  # of a program


@triton.constexpr_function
def gate_of(code, slot):
    """The gate in a slot, of a number with three bits for each slot."""
    return (code >> (3 * slot)) & 7


@triton.jit(do_not_specialize=["H", "I"], do_not_specialize_on_alignment=["b_ih", "b_hh"])
def pack_kernel(
    w,  # [G * H, I]
    b_ih,  # [G * H]
    b_hh,
    rows,  # [H * 4, I]
    bias,  # [H * 4]
    H,
    I,
    X_GATES: tl.constexpr,  # the gate of the rows and of b_ih in each slot
    H_GATES: tl.constexpr,  # that of b_hh
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    u = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (u < H)[:, None] & (k < I)
    for slot in tl.static_range(4):
        at = (u * 4 + slot).to(tl.int64)[:, None] * I + k
        x = tl.zeros((UNITS, COLUMNS), rows.dtype.element_ty)
        if gate_of(X_GATES, slot) < 7:
            row = (gate_of(X_GATES, slot) * H + u).to(tl.int64)[:, None]
            x = tl.load(w + row * I + k, mask=inside, other=0.0)
        tl.store(rows + at, x, mask=inside)
    if bias is not None:
        if tl.program_id(1) == 0:
            for slot in tl.static_range(4):
                b = tl.zeros((UNITS,), tl.float32)
                if gate_of(X_GATES, slot) < 7:
                    b += tl.load(b_ih + gate_of(X_GATES, slot) * H + u, mask=u < H, other=0.0)
                if gate_of(H_GATES, slot) < 7:
                    b += tl.load(b_hh + gate_of(H_GATES, slot) * H + u, mask=u < H, other=0.0)
                tl.store(bias + u * 4 + slot, b.to(bias.dtype.element_ty), mask=u < H)


@triton.jit
def unpack_rows(rows, w, u, k, H, I, GATES: tl.constexpr):
    """Rows (unit, slot) [H * 4, I] to (gate, unit) [G * H, I]."""
    inside = (u < H)[:, None] & (k < I)
    for slot in tl.static_range(4):
        if gate_of(GATES, slot) < 7:
            x = tl.load(rows + (u * 4 + slot).to(tl.int64)[:, None] * I + k, mask=inside)
            row = (gate_of(GATES, slot) * H + u).to(tl.int64)[:, None]
            tl.store(w + row * I + k, x, mask=inside)


@triton.jit
def unpack_bias(bias, b, u, H, GATES: tl.constexpr):
    for slot in tl.static_range(4):
        if gate_of(GATES, slot) < 7:
            x = tl.load(bias + u * 4 + slot, mask=u < H)
            tl.store(b + gate_of(GATES, slot) * H + u, x, mask=u < H)


@triton.jit(do_not_specialize=["H", "I"])
def unpack_kernel(
    x_rows,  # [H * 4, I]
    h_rows,  # [H * 4, H]
    bias,  # [H * 4]
    w_ih,  # [G * H, I]
    w_hh,  # [G * H, H]
    b_ih,  # [G * H]
    b_hh,
    H,
    I,
    X_GATES: tl.constexpr,
    H_GATES: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    u = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if w_ih is not None:
        unpack_rows(x_rows, w_ih, u, k, H, I, X_GATES)
    if w_hh is not None:
        unpack_rows(h_rows, w_hh, u, k, H, H, H_GATES)
    if tl.program_id(1) == 0:
        if b_ih is not None:
            unpack_bias(bias, b_ih, u, H, X_GATES)
        if b_hh is not None:
            unpack_bias(bias, b_hh, u, H, H_GATES)


def pack(
    w: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    x_slots: tuple[int, ...],
    h_slots: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """Rows and biases of one direction in the order (unit, slot); slots without a gate are zero.

    Args:
        w: [G * H, I], G > 1.
        b_ih: [G * H] or None.
        b_hh: the same; both or none.
        x_slots: the slot of each gate's rows and of b_ih.
        h_slots: that of b_hh. What shares a slot is added.

    Returns:
        rows [H * 4, I], and the bias [H * 4] or None
    """
    H, I = w.shape[0] // len(x_slots), w.shape[1]
    rows = w.new_empty(4 * H, I)
    bias = None if b_ih is None else w.new_empty(4 * H)
    tensors = {"w": w, "b_ih": b_ih, "b_hh": b_hh, "rows": rows, "bias": bias}
    grid = (triton.cdiv(H, UNITS), triton.cdiv(I, COLUMNS), 1)
    variant = _variant(pack_kernel, x_slots, h_slots)
    launch_once(variant, grid, w.device, tensors, {"H": H, "I": I})
    return rows, bias


def unpack(
    x_rows: Tensor | None,
    h_rows: Tensor | None,
    bias: Tensor | None,
    needs: tuple[bool, bool],
    x_slots: tuple[int, ...],
    h_slots: tuple[int, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the parameters of one direction, out of those by (unit, slot).

    Args:
        x_rows: [H * 4, I] or None.
        h_rows: [H * 4, H] or None.
        bias: [H * 4] or None.
        needs: whether those of b_ih and of b_hh are wanted.
        x_slots: as in `pack`.
        h_slots: as in `pack`.

    Returns:
        w_ih [G * H, I], w_hh [G * H, H], b_ih and b_hh [G * H], each where it is wanted
    """
    like = next(t for t in (x_rows, h_rows, bias) if t is not None)
    G, H = len(x_slots), like.shape[0] // 4
    I = 0 if x_rows is None else x_rows.shape[1]
    w_ih = None if x_rows is None else like.new_empty(G * H, I)
    w_hh = None if h_rows is None else like.new_empty(G * H, H)
    b_ih, b_hh = [like.new_empty(G * H) if need else None for need in needs]
    if x_slots == h_slots and b_ih is not None:
        b_hh, shared = None, b_hh is not None  # the two have one gradient
    else:
        shared = False
    tensors = {
        "x_rows": x_rows,
        "h_rows": h_rows,
        "bias": bias,
        "w_ih": w_ih,
        "w_hh": w_hh,
        "b_ih": b_ih,
        "b_hh": b_hh,
    }
    columns = max(I, 0 if h_rows is None else H, 1)
    grid = (triton.cdiv(H, UNITS), triton.cdiv(columns, COLUMNS), 1)
    variant = _variant(unpack_kernel, x_slots, h_slots)
    launch_once(variant, grid, like.device, tensors, {"H": H, "I": I})
    return w_ih, w_hh, b_ih, b_ih if shared else b_hh


_VARIANTS: dict[Any, Variant] = {}


def _variant(kernel: Any, x_slots: tuple[int, ...], h_slots: tuple[int, ...]) -> Variant:
    key = (kernel is pack_kernel, x_slots, h_slots)  # hashing a Triton function takes a while
    known = _VARIANTS.get(key)
    if known is None or known.kernel is not kernel:
        constants = {"X_GATES": _code(x_slots), "H_GATES": _code(h_slots)}
        constants |= {"UNITS": UNITS, "COLUMNS": COLUMNS}
        options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        known = _VARIANTS[key] = Variant(kernel, constants, options)
    return known


def _code(slots: tuple[int, ...]) -> int:
    """The gate in each slot, in three bits for each."""
    gates = {slot: gate for gate, slot in enumerate(slots)}
    return sum(gates.get(slot, NONE) << (3 * slot) for slot in range(4))

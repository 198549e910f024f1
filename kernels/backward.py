"""The reverse sweep: back-propagation through time of one layer, all its directions, in one launch.

The mirror image of the forward sweep: one program owns BLOCK_B sequences of one direction, with the
transposed weights, dh and dc in registers. A step is linear in (dh, dc), and its factors come from
saved values alone, so they are formed one step ahead, beside the product:

    start loading step t - 1;  gate gradients of step t;  W^T dgates;  store step t;
    factors of step t - 1
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rnn.kernels.cells import ADJOINTS, FACTORS
from fused_rnn.kernels.forward import Rows
from fused_rnn.kernels.plan import SPECS, Plan
from fused_rnn.kernels.tiles import (
    from_memory,
    load_weights,
    pin,
    product,
    step_rows,
    tile_steps,
    to_memory,
    unpack,
)


@triton.jit
def join_rows(x, y, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Two gates as one right operand [2 * BLOCK_H, BLOCK_B], row = gate * BLOCK_H + unit."""
    return tl.reshape(tl.permute(tl.join(x, y), (2, 0, 1)), (2 * BLOCK_H, BLOCK_B))


@triton.jit
def through_weights(
    w,
    x,
    init,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`product` with the transposed weights, [BLOCK_H, BLOCK_B] in and out."""
    if BATCH > 1:
        init = tl.reshape(init, (BATCH, BLOCK_H // BATCH, BLOCK_B))
    dh = product(w, x, init, BATCH, PRECISION)
    if BATCH > 1:
        dh = tl.reshape(dh, (BLOCK_H, BLOCK_B))
    return dh


@triton.jit
def first_product(
    w,
    slots,
    init,
    G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the first two gates, or the only one, send through the transposed weights, plus init."""
    x = slots[0].to(w.dtype)
    if G > 1:
        x = join_rows(x, slots[1].to(w.dtype), BLOCK_H, BLOCK_B)
    return through_weights(w, x, init, BLOCK_H, BLOCK_B, BATCH, PRECISION)


@triton.jit
def last_product(
    w,
    slots,
    init,
    G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for the other two gates; in GRU for one, which is in slot 3."""
    x = slots[3].to(w.dtype)
    if G == 4:
        x = join_rows(slots[2].to(w.dtype), x, BLOCK_H, BLOCK_B)
    return through_weights(w, x, init, BLOCK_H, BLOCK_B, BATCH, PRECISION)


@triton.jit
def load_step(
    gates,
    states,
    initial,
    row,
    count,
    before_row,
    before_count,
    gate_at,
    state_at,
    first_at,
    seq,
    B,
    G: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Start loading what the factors of a step need: its saved gates and the state before it.

    A cell without saved gates (RNN) needs its output instead, and no state before it.
    """
    u = tl.arange(0, BLOCK_H)[:, None]
    if G == 1:
        x = tl.load(
            states + row.to(tl.int64) * (D * H) + state_at, mask=(u < H) & (seq < count), other=0.0
        )
        before = x
    else:
        m = tl.arange(0, 4 * BLOCK_H)[:, None]
        x = tl.load(
            gates + row.to(tl.int64) * (4 * H) + gate_at,
            mask=(m < 4 * H) & (seq < count),
            other=0.0,
        )
        state = states + before_row.to(tl.int64) * (D * H) + state_at
        at = tl.where(seq < before_count, state, initial + first_at)
        before = tl.load(at, mask=(u < H) & (seq < B), other=0.0)
    return x, before


@triton.jit(do_not_specialize=["T", "B", "N", "reverse", "zero"])
def backward_kernel(
    gates,  # [D, N, H, S], as the forward sweep left them
    w,  # [D, G * H, H]
    states,  # [N, D * H]: c after each step if there is one, else out
    initial,  # [D, B, H]: the state before the first step
    dout,  # [N, D * H]
    dc_seq,  # [N, D * H]
    dh_n,  # [D, B, H]
    dc_n,
    dgates,  # [D, N, H, S]
    dh0,  # [D, B, H]
    dc0,
    offsets,  # [T + 1]
    scale,  # 1.0
    zero,  # 0, but not to the compiler
    T,
    B,
    N,
    reverse,  # bit d: direction d ran from the last step to the first
    FACTORS: tl.constexpr,
    ADJOINT: tl.constexpr,
    G: tl.constexpr,
    STATES: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BATCH: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    S: tl.constexpr = 4 if G > 1 else 1
    FIRST_GATES: tl.constexpr = 2 if G > 1 else 1
    PACKED: tl.constexpr = offsets is not None
    d = tl.program_id(1).to(tl.int64)
    b0 = tl.program_id(0) * BLOCK_B
    steps = tile_steps(offsets, b0, T, PACKED)
    backwards = ((reverse >> tl.program_id(1)) & 1) != 0
    t = tl.where(backwards, 0, steps - 1)
    dt = tl.where(backwards, 1, -1)

    u = tl.arange(0, BLOCK_H)[:, None]
    m = tl.arange(0, S * BLOCK_H)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    seq = b0 + b
    gate_at = b * (S * H) + m
    state_at = b * (D * H) + u
    first_at = b * H + u
    first_row = (d * B + b0) * H
    mine = (u < H) & (seq < B)
    column = b0.to(tl.int64) * (D * H) + d * H
    dgates += (d * N + b0) * (S * H)
    states += column
    if G > 1:
        gates += (d * N + b0) * (S * H)
        initial += first_row
    if dout is not None:
        dout += column
    if dc_seq is not None:
        dc_seq += column

    # A product with zeros before the loop reads the weights into registers (see forward.py), and
    # leaves dh in the layout of a product, which the whole step takes over from it.
    w += d * (G * H * H)
    none = tl.zeros((BLOCK_H, BLOCK_B), tl.float32) + zero
    zeros = (none, none, none, none)
    w_first = load_weights(w, scale, 0, FIRST_GATES, H, BLOCK_H, BATCH, True)
    dh = first_product(w_first, zeros, none, G, BLOCK_H, BLOCK_B, BATCH, PRECISION)
    w_last = w_first
    if G > 1:
        tl.debug_barrier()
        w_last = load_weights(w, scale, 2, G - 2, H, BLOCK_H, BATCH, True)
        dh += last_product(w_last, zeros, none, G, BLOCK_H, BLOCK_B, BATCH, PRECISION)
    none = pin(none, dh, zero)
    dc = none
    if dh_n is not None:
        dh += tl.load(dh_n + first_row + first_at, mask=mine, other=0.0).to(tl.float32)
    if dc_n is not None:
        dc += tl.load(dc_n + first_row + first_at, mask=mine, other=0.0).to(tl.float32)

    row, count = step_rows(offsets, t, T, B, PACKED)
    next_row, next_count = step_rows(offsets, t + dt, T, B, PACKED)
    here = (u < H) & (seq < count)
    x, before = load_step(
        gates, states, initial, row, count, next_row, next_count, gate_at, state_at, first_at, seq,
        B, G, D, H, BLOCK_H,
    )  # fmt: skip
    if dout is not None:
        dh += tl.load(dout + row.to(tl.int64) * (D * H) + state_at, mask=here, other=0.0).to(
            tl.float32
        )
    now = none
    if STATES == 2:
        now = tl.load(states + row.to(tl.int64) * (D * H) + state_at, mask=here, other=0.0)
        now = pin(now, dh, zero)
        if dc_seq is not None:
            dc += tl.load(dc_seq + row.to(tl.int64) * (D * H) + state_at, mask=here, other=0.0).to(
                tl.float32
            )
    before = pin(before, dh, zero)
    saved = unpack(pin(from_memory(x, S, BLOCK_H, BLOCK_B), dh, zero), S)
    factors = FACTORS(saved, now, before, FAST)
    for _ in range(steps):
        after_row, after_count = step_rows(offsets, t + 2 * dt, T, B, PACKED)
        x, earlier = load_step(
            gates, states, initial, next_row, next_count, after_row, after_count, gate_at, state_at,
            first_at, seq, B, G, D, H, BLOCK_H,
        )  # fmt: skip
        here = (u < H) & (seq < next_count)
        if dout is not None:
            gh = tl.load(dout + next_row.to(tl.int64) * (D * H) + state_at, mask=here, other=0.0)
        if dc_seq is not None:
            gc = tl.load(dc_seq + next_row.to(tl.int64) * (D * H) + state_at, mask=here, other=0.0)

        slots, direct, new_dc = ADJOINT(factors, dh, dc, none)
        # Two accumulators: half as long a chain of dependent instructions.
        new_dh = first_product(w_first, slots, direct, G, BLOCK_H, BLOCK_B, BATCH, PRECISION)
        if G > 1:
            new_dh += last_product(w_last, slots, none, G, BLOCK_H, BLOCK_B, BATCH, PRECISION)
        y = to_memory(slots, S, BLOCK_H, BLOCK_B).to(dgates.dtype.element_ty)
        tl.store(dgates + row.to(tl.int64) * (S * H) + gate_at, y, mask=(m < S * H) & (seq < count))

        ref = slots[0]
        now = before
        before = pin(earlier, ref, zero)
        saved = unpack(pin(from_memory(x, S, BLOCK_H, BLOCK_B), ref, zero), S)
        factors = FACTORS(saved, now, before, FAST)
        if PACKED:
            running = seq < count
            new_dh = tl.where(running, new_dh, dh)
            new_dc = tl.where(running, new_dc, dc)
        dh = new_dh
        dc = new_dc
        if dout is not None:
            dh += gh.to(tl.float32)
        if dc_seq is not None:
            dc += gc.to(tl.float32)
        row, count, next_row, next_count = next_row, next_count, after_row, after_count
        t += dt

    tl.store(dh0 + first_row + first_at, dh.to(dh0.dtype.element_ty), mask=mine)
    if STATES == 2:
        tl.store(dc0 + first_row + first_at, dc.to(dc0.dtype.element_ty), mask=mine)


def reverse_sweep(
    cell: str,
    gates: Tensor | None,
    c_seq: Tensor | None,
    out: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    dout: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_seq: Tensor | None = None,
    *,
    rows: Rows,
    reverse: tuple[bool, ...],
    precision: str,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Back-propagate through the recurrence of one layer. Nothing that was saved is modified.

    Args:
        cell: a key of `plan.SPECS`.
        gates: what `forward_sweep` left in its gates; None for RNN.
        c_seq: c after every step [N, D * H], LSTM only.
        out: [N, D * H].
        weight_hh: as in `forward_sweep`.
        h0: [D, B, H].
        c0: [D, B, H], LSTM only.
        dout: gradient of out, or None for zeros; so the next three.
        dh_n: [D, B, H].
        dc_n: [D, B, H].
        dc_seq: gradient of c_seq.
        rows: as in `forward_sweep`; so reverse and precision.
        reverse: per direction.
        precision: "ieee" or "tf32".
        plan: see `plan.make_plan`.

    Returns:
        dgates [D, N, H, S] in the dtype of weight_hh, GRU's slots (dr, dz, dn, r dn); dh0 and dc0
        [D, B, H] in fp32, dc0 for LSTM only.
    """
    spec = SPECS[cell]
    D, _, H = weight_hh.shape
    N = out.shape[0]
    states, initial = (c_seq, c0) if spec.states == 2 else (out, h0)
    dgates = torch.empty(D, N, H, spec.slots, dtype=weight_hh.dtype, device=out.device)
    dh0 = torch.empty(D, rows.B, H, dtype=torch.float32, device=out.device)
    dc0 = torch.empty_like(dh0) if spec.states == 2 else None
    backward_kernel[(triton.cdiv(rows.B, plan.block_b), D)](
        gates=gates if spec.slots == 4 else None,
        w=weight_hh,
        states=states,
        initial=initial.to(states.dtype) if spec.slots == 4 else None,
        dout=dout,
        dc_seq=dc_seq,
        dh_n=dh_n,
        dc_n=dc_n,
        dgates=dgates,
        dh0=dh0,
        dc0=dc0,
        offsets=rows.offsets,
        scale=1.0,
        zero=0,
        T=rows.T,
        B=rows.B,
        N=N,
        reverse=sum(1 << d for d, r in enumerate(reverse) if r),
        FACTORS=FACTORS[cell],
        ADJOINT=ADJOINTS[cell],
        G=spec.gates,
        STATES=spec.states,
        D=D,
        H=H,
        BLOCK_H=plan.block_h,
        BLOCK_B=plan.block_b,
        BATCH=plan.batch,
        FAST=plan.fast,
        PRECISION=precision,
        num_warps=plan.warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return dgates, dh0, dc0

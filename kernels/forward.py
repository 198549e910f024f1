"""The forward sweep: all time steps of one layer, all its directions, in one launch.

One program owns BLOCK_B sequences of one direction and walks through time, with its weights and
state in registers. The order within a step keeps everything but the state itself off the chain from
one product to the next:

    start loading x of step t + 1;  gates, c, h of step t;  W h;  store step t;  add x of step t + 1
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rnn.kernels.cells import STEPS
from fused_rnn.kernels.plan import SPECS, Plan
from fused_rnn.kernels.tiles import (
    from_memory,
    gate_tiles,
    load_weights,
    product,
    step_rows,
    tile_steps,
    to_memory,
    unpack,
)


@dataclass(frozen=True)
class Rows:
    """Where the rows of each time step lie.

    Attributes:
        T: time steps of the longest sequence.
        B: sequences, sorted by decreasing length.
        N: rows in all.
        offsets: int64 [T + 1] on the device, the first row of each step and N; None if every step
            owns B rows.
    """

    T: int
    B: int
    N: int
    offsets: Tensor | None = None


@triton.jit
def join_gates(first, last, G: tl.constexpr, BLOCK_H: tl.constexpr, BATCH: tl.constexpr):
    """The products of both weight tiles to the slots of a cell, as `tiles.from_memory` has them."""
    if G == 1:
        acc = gate_tiles(first, 1, BLOCK_H, BATCH)
    else:
        first = gate_tiles(first, 2, BLOCK_H, BATCH)
        last = gate_tiles(last, G - 2, BLOCK_H, BATCH)
        if G == 3:
            last = tl.join(last * 0.0, last)
        acc = tl.permute(tl.join(first, last), (0, 1, 3, 2))
    return acc


@triton.jit(do_not_specialize=["T", "B", "N", "reverse"])
def forward_kernel(
    gates,  # [D, N, H, S]
    w,  # [D, G * H, H]
    bias,  # [D, H], the recurrent bias of GRU's n
    h0,  # [D, B, H]
    c0,
    out,  # [N, D * H]
    h_n,  # [D, B, H]
    c_n,
    c_seq,  # [N, D * H]
    offsets,  # [T + 1]
    scale,  # 1.0
    T,
    B,
    N,
    reverse,  # bit d: direction d runs from the last step to the first
    STEP: tl.constexpr,
    G: tl.constexpr,
    STATES: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    SAVE: tl.constexpr,
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
    t = tl.where(backwards, steps - 1, 0)
    dt = tl.where(backwards, -1, 1)

    u = tl.arange(0, BLOCK_H)[:, None]
    m = tl.arange(0, S * BLOCK_H)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    seq = b0 + b
    gate_at = b * (S * H) + m
    gates += (d * N + b0) * (S * H)
    column = b0.to(tl.int64) * (D * H) + d * H
    state_at = b * (D * H) + u
    first_at = b * H + u
    first_row = (d * B + b0) * H
    mine = (u < H) & (seq < B)

    h = tl.load(h0 + first_row + first_at, mask=mine, other=0.0).to(tl.float32)
    state = (h,)
    if STATES == 2:
        state = (h, tl.load(c0 + first_row + first_at, mask=mine, other=0.0).to(tl.float32))
    if G == 3:
        hidden = tl.load(bias + d * H + m // 4, mask=m < 4 * H, other=0.0).to(
            gates.dtype.element_ty
        )

    # The first product stands before the loop: so the weights are read into registers here. One
    # tile after the other, since they pass through the same shared memory.
    w += d * (G * H * H)
    hw = h.to(w.dtype.element_ty)
    w_first = load_weights(w, scale, 0, FIRST_GATES, H, BLOCK_H, BATCH, False)
    first = product(w_first, hw, None, BATCH, PRECISION)
    w_last = w_first
    last = first
    if G > 1:
        tl.debug_barrier()
        w_last = load_weights(w, scale, 2, G - 2, H, BLOCK_H, BATCH, False)
        last = product(w_last, hw, None, BATCH, PRECISION)

    row, count = step_rows(offsets, t, T, B, PACKED)
    next_row, next_count = step_rows(offsets, t + dt, T, B, PACKED)
    x = tl.load(
        gates + row.to(tl.int64) * (S * H) + gate_at, mask=(m < S * H) & (seq < count), other=0.0
    )
    if G == 3:
        x = tl.where(m % 4 == 3, hidden, x)
    acc = join_gates(first, last, G, BLOCK_H, BATCH) + from_memory(x, S, BLOCK_H, BLOCK_B)
    for _ in range(steps):
        x = tl.load(
            gates + next_row.to(tl.int64) * (S * H) + gate_at,
            mask=(m < S * H) & (seq < next_count),
            other=0.0,
        )
        after_row, after_count = step_rows(offsets, t + 2 * dt, T, B, PACKED)
        saved, new = STEP(unpack(acc, S), state, FAST)
        if PACKED:
            running = seq < count
            if STATES == 2:
                state = (tl.where(running, new[0], state[0]), tl.where(running, new[1], state[1]))
            else:
                state = (tl.where(running, new[0], state[0]),)
        else:
            state = new

        hw = state[0].to(w.dtype.element_ty)
        first = product(w_first, hw, None, BATCH, PRECISION)
        if G > 1:
            last = product(w_last, hw, None, BATCH, PRECISION)

        stored = (u < H) & (seq < count)
        tl.store(out + (row.to(tl.int64) * (D * H) + column) + state_at, hw, mask=stored)
        if SAVE and STATES == 2:
            tl.store(
                c_seq + (row.to(tl.int64) * (D * H) + column) + state_at, state[1], mask=stored
            )
        if SAVE and S == 4:
            y = to_memory(saved, S, BLOCK_H, BLOCK_B).to(gates.dtype.element_ty)
            tl.store(
                gates + row.to(tl.int64) * (S * H) + gate_at, y, mask=(m < S * H) & (seq < count)
            )

        if G == 3:
            x = tl.where(m % 4 == 3, hidden, x)
        acc = join_gates(first, last, G, BLOCK_H, BATCH) + from_memory(x, S, BLOCK_H, BLOCK_B)
        row, count, next_row, next_count = next_row, next_count, after_row, after_count
        t += dt

    tl.store(h_n + first_row + first_at, state[0].to(h_n.dtype.element_ty), mask=mine)
    if STATES == 2:
        tl.store(c_n + first_row + first_at, state[1].to(c_n.dtype.element_ty), mask=mine)


def forward_sweep(
    cell: str,
    gates: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    out: Tensor,
    *,
    rows: Rows,
    reverse: tuple[bool, ...],
    save: bool,
    precision: str,
    plan: Plan,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the recurrence of one layer.

    Args:
        cell: a key of `plan.SPECS`.
        gates: [D, N, H, S] input part of the pre-activations with all biases but bias_hn, the gate
            fastest; S is 1 for RNN, 4 for GRU (r, z, n, unused) and LSTM (i, f, g, o). With save it
            is overwritten by what the reverse sweep needs: GRU (r, z, n, W_hn h + b_hn), LSTM the
            activated gates; RNN needs nothing but out.
        weight_hh: [D, G * H, H] in torch's order, in the dtype of gates.
        bias_hn: [D, H], GRU only.
        h0: [D, B, H].
        c0: [D, B, H], LSTM only.
        out: [N, D * H], written.
        rows: where the rows of each step lie.
        reverse: per direction, whether it runs from the last step to the first.
        save: whether a reverse sweep will follow.
        precision: "ieee" or "tf32", for fp32 products.
        plan: see `plan.make_plan`.

    Returns:
        h_n [D, B, H] in the dtype of out; c_n [D, B, H] and, with save, c after every step
        [N, D * H], both fp32 and for LSTM only.
    """
    spec = SPECS[cell]
    D, N, H, _ = gates.shape
    h_n = torch.empty(D, rows.B, H, dtype=out.dtype, device=out.device)
    c_n = c_seq = None
    if spec.states == 2:
        c_n = torch.empty(D, rows.B, H, dtype=torch.float32, device=out.device)
        if save:
            c_seq = torch.empty(N, D * H, dtype=torch.float32, device=out.device)
    forward_kernel[(triton.cdiv(rows.B, plan.block_b), D)](
        gates=gates,
        w=weight_hh,
        bias=bias_hn,
        h0=h0,
        c0=c0,
        out=out,
        h_n=h_n,
        c_n=c_n,
        c_seq=c_seq,
        offsets=rows.offsets,
        scale=1.0,
        T=rows.T,
        B=rows.B,
        N=N,
        reverse=sum(1 << d for d, r in enumerate(reverse) if r),
        STEP=STEPS[cell],
        G=spec.gates,
        STATES=spec.states,
        D=D,
        H=H,
        SAVE=save,
        BLOCK_H=plan.block_h,
        BLOCK_B=plan.block_b,
        BATCH=plan.batch,
        FAST=plan.fast,
        PRECISION=precision,
        num_warps=plan.warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return h_n, c_n, c_seq

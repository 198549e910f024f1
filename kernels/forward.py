"""The forward sweep: all time steps of one layer, all its directions, in one launch.

One program owns BLOCK_B sequences of one direction and walks through time, with its weights and
state in registers. The order within a step keeps everything but the state itself off the chain from
one product to the next:

    start loading x of step t + 1;  gates, c, h of step t;  W h;  store step t;  add x of step t + 1
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_rnn.kernels.cells import STEPS
from fused_rnn.kernels.extras import (
    Extras,
    blend,
    load_keep,
    load_lengths,
    load_reset,
    load_restarts,
    select,
    zeros_where_ragged,
)
from fused_rnn.kernels.group import (
    LINE,
    arrive,
    compile_target,
    launch_options,
    sweep_constants,
    wait,
)
from fused_rnn.kernels.launch import Variant, launch, sweep_kernel
from fused_rnn.kernels.plan import SPECS, Plan
from fused_rnn.kernels.tiles import (
    from_memory,
    insert_recurrent_bias,
    load_gates,
    load_states,
    step_rows,
    store_gates,
    store_states,
    tile_steps,
    to_memory,
    unpack,
    words,
)
from fused_rnn.kernels.weights import (
    join_gates,
    load_h,
    multiply,
    multiply_streamed,
    prime,
)


class Rows(NamedTuple):
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


@sweep_kernel
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
    fed,  # [N, D * H]: the product's operand, where that is not h of the step before
    lengths,  # the next seven: see extras.py
    reset,
    restart_h,
    restart_c,
    zone_h,
    zone_c,
    drop,
    offsets,  # [T + 1]
    counters,  # [batch tiles, D, 2, LINE]
    zoneout,  # see extras.py
    scale,  # 1.0
    T,
    B,
    N,
    first_tile,  # of the batch, where not all fit one launch
    first_direction,
    reverse,  # bit d: direction d runs from the last step to the first
    STEP: tl.constexpr,
    G: tl.constexpr,
    STATES: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    SAVE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    REGISTERS: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_BARRIER: tl.constexpr,  # see group.py
    KS: tl.constexpr,
    MS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    S: tl.constexpr = 4 if G > 1 else 1
    dtype: tl.constexpr = gates.dtype.element_ty
    WORDS: tl.constexpr = words(S, MEMBERS, dtype)
    WIDTH: tl.constexpr = D * H
    GROUP: tl.constexpr = MEMBERS > 1
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    RESIDENT: tl.constexpr = REGISTERS if REGISTERS < CHUNKS else CHUNKS
    RAGGED: tl.constexpr = (offsets is not None) or (lengths is not None)
    ZONED: tl.constexpr = (zone_h is not None) or (zoneout is not None)
    # Whether the product takes something else than the h that is put out. So it does in a ragged
    # group: one place to read from for all, be it h0 or h, costs less than a choice.
    FEEDS: tl.constexpr = (reset is not None) or (drop is not None) or (fed is not None and GROUP)
    FED_BEFORE: tl.constexpr = 1 if FEEDS else 0  # a barrier stands before the first step
    # From step to step in the layout of a product, or where there is none to keep, gate by gate.
    APART: tl.constexpr = S if GROUP else 1
    member = tl.program_id(0)
    direction = first_direction + tl.program_id(2)
    d = direction.to(tl.int64)
    batch_tile = first_tile + tl.program_id(1)
    b0 = batch_tile * BLOCK_B
    b = tl.arange(0, BLOCK_B)[None, :]
    seq = b0 + b
    length = load_lengths(lengths, seq, B)
    steps = tile_steps(offsets, length, b0, T)
    backwards = ((reverse >> direction) & 1) != 0
    t = tl.where(backwards, steps - 1, 0)
    dt = tl.where(backwards, -1, 1)
    if GROUP:
        counters += (batch_tile * D + direction) * (2 * LINE)

    u0 = member * BLOCK_H
    u = u0 + tl.arange(0, BLOCK_H)[:, None]
    m = u0 * WORDS + tl.arange(0, WORDS * BLOCK_H)[:, None]
    if WORDS < S:
        gates = gates.to(tl.pointer_type(tl.int64))
    gate_at = b * (WORDS * H) + m
    gates += (d * N + b0) * (WORDS * H)
    column = b0.to(tl.int64) * WIDTH + d * H
    state_at = b * WIDTH + u
    first_at = b * H + u
    first_row = (d * B + b0) * H
    mine = (u < H) & (seq < B)

    state = load_states((h0, c0) if STATES == 2 else (h0,), first_row, first_at, mine)
    if (ZONED or (reset is not None)) or (fed is not None):  # not sooner than it is needed
        row, count = step_rows(offsets, length, t, T, B)
    if ZONED:
        at = row.to(tl.int64) * WIDTH + column + state_at
        keep = load_keep(zone_h, zone_c, zoneout, at, (u < H) & (seq < count), STATES)
    if reset is not None:
        reset += d * N
        resets = load_reset(reset, row, seq, seq < count)
        restarts = load_restarts(restart_h, restart_c, d * H, u, H, STATES)
        state = select(resets, restarts, state)
    operand = state[0]
    if drop is not None:
        dropped = tl.load(drop + first_row + first_at, mask=mine, other=0.0).to(tl.float32)
        operand = operand * dropped
    operand = operand.to(dtype)
    if fed is not None:
        fed += column
        at = fed + row.to(tl.int64) * WIDTH + state_at
        tl.store(at, operand, mask=(u < H) & (seq < count))
    if G == 3:
        bias_n = tl.load(bias + d * H + m // WORDS, mask=m < WORDS * H, other=0.0).to(dtype)

    w += d * (G * H * H)
    h_at = h0 + first_row + b * H
    present = seq < B
    if FEEDS and GROUP:
        arrive(counters, 0, BLOCK_BARRIER)
        wait(counters, 0, MEMBERS, BLOCK_BARRIER)
        h_at = fed + row.to(tl.int64) * WIDTH + b * WIDTH
        present = seq < count
    if STREAM:
        ws = ()
        halves = multiply_streamed(w, h_at, present, u0, G, H, BLOCK_H, BLOCK_K, PRECISION)
    else:
        hs = load_h(h_at, present, H, BLOCK_K, CHUNKS) if GROUP else (operand,)
        ws, halves = prime(w, scale, u0, hs, G, H, BLOCK_H, BLOCK_K, REGISTERS, KS, MS, PRECISION)

    row, count = step_rows(offsets, length, t, T, B)
    next_row, next_count = step_rows(offsets, length, t + dt, T, B)
    x = load_gates(gates, row, gate_at, (m < WORDS * H) & (seq < count), WORDS * H)
    if G == 3:
        x = insert_recurrent_bias(x, bias_n, m, WORDS)
    acc = join_gates(halves, G, BLOCK_H, KS, MS) + from_memory(x, dtype, S, BLOCK_H, BLOCK_B)
    pre = unpack(acc, APART)
    once = (steps > 0).to(tl.int32)
    step = 0
    # No `for`: into one, Triton 3.8 moves the reads of all weights from shared memory.
    while step < steps:
        x = load_gates(gates, next_row, gate_at, (m < WORDS * H) & (seq < next_count), WORDS * H)
        after_row, after_count = step_rows(offsets, length, t + 2 * dt, T, B)

        saved, new = STEP(pre if GROUP else unpack(pre[0], S), state, FAST)
        if ZONED:
            new = blend(new, state, keep)
            next_at = next_row.to(tl.int64) * WIDTH + column + state_at
            keep = load_keep(zone_h, zone_c, zoneout, next_at, (u < H) & (seq < next_count), STATES)
        state = select(seq < count, new, state) if RAGGED else new
        h = state[0].to(dtype)
        c = state[STATES - 1]
        stored = (u < H) & (seq < count)
        if reset is not None:
            next_resets = load_reset(reset, next_row, seq, seq < next_count)
            state = select(next_resets, restarts, state)
        operand = (state[0] if drop is None else state[0] * dropped).to(dtype)

        # What others wait for is stored first, the rest while they read it. One program stores h
        # before or after its product, as ptxas makes the shorter step of it.
        out_at = out + (row.to(tl.int64) * WIDTH + column)
        if fed is not None:
            fed_at = fed + next_row.to(tl.int64) * WIDTH + state_at
            tl.store(fed_at, operand, mask=(u < H) & (seq < next_count))
        if GROUP and FEEDS:
            arrive(counters, step + FED_BEFORE, BLOCK_BARRIER)
        if GROUP or SAVE:
            tl.store(out_at + state_at, h, mask=stored)
        if GROUP and not FEEDS:
            arrive(counters, step, BLOCK_BARRIER)
        if not GROUP:
            halves = multiply(ws, (operand,), once, G, RESIDENT, KS, MS, PRECISION)
        if not (GROUP or SAVE):
            tl.store(out_at + state_at, h, mask=stored)
        if c_seq is not None:
            tl.store(c_seq + (row.to(tl.int64) * WIDTH + column) + state_at, c, mask=stored)
        if SAVE and (S == 4 or ZONED):
            y = to_memory(saved, dtype, WORDS, BLOCK_H, BLOCK_B)
            store_gates(gates, row, gate_at, y, (m < WORDS * H) & (seq < count), WORDS * H)

        if G == 3:
            x = insert_recurrent_bias(x, bias_n, m, WORDS)
        if GROUP:
            wait(counters, step + FED_BEFORE, MEMBERS, BLOCK_BARRIER)
            h_at = (fed + next_row.to(tl.int64) * WIDTH if FEEDS else out_at) + b * WIDTH
            present = seq < (next_count if FEEDS else B)
            if STREAM:
                halves = multiply_streamed(w, h_at, present, u0, G, H, BLOCK_H, BLOCK_K, PRECISION)
            else:
                hs = load_h(h_at, present, H, BLOCK_K, CHUNKS)
                halves = multiply(ws, hs, once, G, RESIDENT, KS, MS, PRECISION)
        acc = join_gates(halves, G, BLOCK_H, KS, MS) + from_memory(x, dtype, S, BLOCK_H, BLOCK_B)
        pre = unpack(acc, APART)
        row, count, next_row, next_count = next_row, next_count, after_row, after_count
        t += dt
        step += 1

    store_states((h_n, c_n) if STATES == 2 else (h_n,), first_row, first_at, state, mine)


NONE = Extras()


class Swept(NamedTuple):
    """What a forward sweep returns beside what it overwrites.

    Attributes:
        h_n: [D, B, H] in the dtype of out.
        c_n: [D, B, H] in the dtype of out, LSTM only.
        c_seq: c after every step [N, D * H] in fp32, if it was saved or wanted.
        fed: what the recurrent product of each step took [N, D * H], if that is not h0 or out.
    """

    h_n: Tensor
    c_n: Tensor | None
    c_seq: Tensor | None
    fed: Tensor | None


def plan_constants(plan: Plan) -> dict[str, int]:
    """The constexpr arguments that this sweep alone takes from a plan."""
    return {"KS": plan.k_split, "MS": plan.m_split}


def variant(
    plan: Plan, cell: str, D: int, H: int, save: bool, precision: str, target: Any = None
) -> Variant:
    """The sweep of one cell, named ``cell``, under one plan."""
    key = (plan, cell, D, H, save, precision, target)
    found, step = VARIANTS.get(key), STEPS[cell]
    if found is None or found.kernel is not forward_kernel or found.functions[0] is not step:
        spec = SPECS[cell]
        own = {"STEP": step, "G": spec.gates, "STATES": spec.states, "H": H, "SAVE": save}
        constants = sweep_constants(plan, D, target) | plan_constants(plan) | own
        constants["PRECISION"] = precision
        found = Variant(forward_kernel, (step,), constants, launch_options(plan))
        VARIANTS[key] = found
    return found


VARIANTS: dict[Any, Variant] = {}


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
    extras: Extras = NONE,
    cells: bool = False,
) -> Swept:
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
        extras: see there.
        cells: whether c of all steps is wanted without save, too.
    """
    spec = SPECS[cell]
    D, N, H, _ = gates.shape
    h_n = out.new_empty(D, rows.B, H)
    c_n = c_seq = fed = None
    if spec.states == 2:
        c_n = out.new_empty(D, rows.B, H)
        if save or cells:
            c_seq = zeros_where_ragged(extras, N, D * H, dtype=torch.float32, like=out)
    group = plan.members > 1
    if (extras.feeds and (save or group)) or (rows.offsets is not None and group):
        fed = zeros_where_ragged(extras, N, D * H, dtype=out.dtype, like=out)
    if extras.lengths is not None:
        out.zero_()
    tensors = {
        "gates": gates,
        "w": weight_hh,
        "bias": bias_hn,
        "h0": h0,
        "c0": c0,
        "out": out,
        "h_n": h_n,
        "c_n": c_n,
        "c_seq": c_seq,
        "fed": fed,
        "lengths": extras.lengths,
        "reset": extras.reset,
        "restart_h": extras.restart_h,
        "restart_c": extras.restart_c,
        "zone_h": extras.zone_h,
        "zone_c": extras.zone_c,
        "drop": extras.drop,
        "offsets": rows.offsets,
        "counters": None,
    }
    numbers = {
        "zoneout": extras.zoneout,
        "scale": 1.0,
        "T": rows.T,
        "B": rows.B,
        "N": N,
        "first_tile": 0,
        "first_direction": 0,
        "reverse": direction_bits(reverse),
    }
    target = compile_target(out.device) if plan.members > 1 else None
    this = variant(plan, cell, D, H, save, precision, target)
    launch(this, plan, D, out.device, tensors, numbers)
    return Swept(h_n, c_n, c_seq, fed)


@lru_cache
def direction_bits(reverse: tuple[bool, ...]) -> int:
    """Bit d says whether direction d runs from the last step to the first."""
    return sum([1 << d for d, r in enumerate(reverse) if r])

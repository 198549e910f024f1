"""The forward sweep: all time steps of one layer, all its directions, in one launch.

One program owns BLOCK_B sequences of one direction and walks through time, with its weights and
state in registers. The order within a step keeps everything but the state itself off the chain from
one product to the next:

    start loading x of step t + 1;  gates, c, h of step t;  W h;  store step t;  add x of step t + 1
"""

import triton.language as tl

from fused_rnn.kernels.group import (
    LINE,
    arrive,
    wait,
)
from fused_rnn.kernels.launch import sweep_kernel
from fused_rnn.kernels.options import (
    blend,
    load_keep,
    load_lengths,
    load_reset,
    load_restarts,
)
from fused_rnn.kernels.precision import to_tf32
from fused_rnn.kernels.products import (
    load_chunks,
    multiply,
    multiply_in_group,
    multiply_streamed,
    prime,
    to_slots,
)
from fused_rnn.kernels.states import (
    clear,
    load_states,
    load_vectors,
    row_place,
    select,
    sequence_place,
    store_others,
    store_states,
)
from fused_rnn.kernels.tiles import (
    from_memory,
    insert_recurrent_bias,
    load_gates,
    step_rows,
    store_gates,
    tile_steps,
    to_memory,
    unpack,
    words,
)


@sweep_kernel
def forward_kernel(
    gates,  # [D, N, H, S]; D are directions, and H units, of one head each: see sweep.Sweep
    w,  # [D, G * H, H]
    bias,  # [D, H], the recurrent bias of GRU's n
    vectors,  # [D, P, H], the cell's own parameters
    h0,  # [D, B, H]
    c0,  # [D, B, K * H], all states beside h
    out,  # [N, D * H]
    h_n,  # [D, B, H]
    c_n,  # [D, B, K * H]
    c_seq,  # [N, D * K * H]
    operand_seq,  # [N, D * H]: the product's operand, where that is not h of the step before
    lengths,  # the next seven: see sweep.SweepOptions
    reset,
    restart_h,
    restart_c,
    zone_h,
    zone_c,
    drop,
    offsets,  # [T + 1]
    counters,  # [batch tiles, D, 2, LINE]
    zoneout,  # see sweep.SweepOptions
    scale,  # 1.0
    T,
    B,
    N,
    first_tile,  # of the batch, where not all fit one launch
    first_direction,
    reverse,  # bit d: direction d, with all its heads, runs from the last step to the first
    STEP: tl.constexpr,
    G: tl.constexpr,
    STATES: tl.constexpr,
    P: tl.constexpr,  # the cell's own parameters
    KEEPS: tl.constexpr,  # whether it saves its slots
    MASKS: tl.constexpr,  # whether units beyond H must be kept at zero
    HEADS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    SAVE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    REGISTERS: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_BARRIER: tl.constexpr,  # see group.py
    KS: tl.constexpr,
    MS: tl.constexpr,
    JOINED: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    S: tl.constexpr = 4 if G > 1 else 1
    dtype: tl.constexpr = gates.dtype.element_ty
    WORDS: tl.constexpr = words(S, PROGRAMS, dtype)
    K: tl.constexpr = STATES - 1
    WIDE: tl.constexpr = HEADS * H
    WIDTH: tl.constexpr = D * H
    PADDED: tl.constexpr = MASKS and H % BLOCK_H != 0
    GROUP: tl.constexpr = PROGRAMS > 1
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    RESIDENT: tl.constexpr = REGISTERS if REGISTERS < CHUNKS else CHUNKS
    RAGGED: tl.constexpr = (offsets is not None) or (lengths is not None)
    ZONED: tl.constexpr = (zone_h is not None) or (zoneout is not None)
    # Whether the product takes something else than the h that is put out. So it does in a ragged
    # group: one place to read from for all, be it h0 or h, costs less than a choice.
    IN_MEMORY: tl.constexpr = (
        (reset is not None) or (drop is not None) or (operand_seq is not None and GROUP)
    )
    AHEAD: tl.constexpr = 1 if IN_MEMORY else 0  # a barrier stands before the first step
    # From step to step in the layout of a product, or where there is none to keep, gate by gate.
    APART: tl.constexpr = S if GROUP else 1
    program = tl.program_id(0)
    direction = first_direction + tl.program_id(2)
    d = direction.to(tl.int64)
    side = d // HEADS
    head = d % HEADS * H
    batch_tile = first_tile + tl.program_id(1)
    b0 = batch_tile * BLOCK_B
    b = tl.arange(0, BLOCK_B)[None, :]
    seq = b0 + b
    length = load_lengths(lengths, seq, B)
    steps = tile_steps(offsets, length, b0, T)
    backwards = ((reverse >> (direction // HEADS)) & 1) != 0
    t = tl.where(backwards, steps - 1, 0)
    dt = tl.where(backwards, -1, 1)
    if GROUP:
        counters += (batch_tile * D + direction) * (2 * LINE)

    u0 = program * BLOCK_H
    u = u0 + tl.arange(0, BLOCK_H)[:, None]
    m = u0 * WORDS + tl.arange(0, WORDS * BLOCK_H)[:, None]
    if WORDS < S:
        gates = gates.to(tl.pointer_type(tl.int64))
    gate_at = b * (WORDS * H) + m
    gates += (d * N + b0) * (WORDS * H)
    column = b0.to(tl.int64) * WIDTH + d * H
    column_c = b0.to(tl.int64) * (K * WIDTH) + side * (K * WIDE) + head
    state_at = b * WIDTH + u
    first = sequence_place(side * B + b0, head, b, u, WIDE, K)
    mine = (u < H) & (seq < B)

    params = load_vectors(vectors, side * (P * WIDE) + head, u, H, WIDE, P)
    state = load_states(h0, c0, first, mine, WIDE, STATES)
    if (ZONED or (reset is not None)) or (operand_seq is not None):  # not sooner than it is needed
        row, count = step_rows(offsets, length, t, T, B)
    if ZONED:
        begin = row_place(row, column, column_c, b, u, WIDTH, K)
        keep = load_keep(zone_h, zone_c, zoneout, begin, (u < H) & (seq < count), WIDE, STATES)
    if reset is not None:
        reset += side * N
        resets = load_reset(reset, row, seq, seq < count)
        restarts = load_restarts(restart_h, restart_c, side, head, u, H, WIDE, STATES)
        state = select(resets, restarts, state)
    operand = state[0]
    if drop is not None:
        dropped = tl.load(drop + first[0] + first[1], mask=mine, other=0.0).to(tl.float32)
        operand = operand * dropped
    operand = operand.to(dtype)
    if operand_seq is not None:
        operand_seq += column
        at = operand_seq + row.to(tl.int64) * WIDTH + state_at
        tl.store(at, operand, mask=(u < H) & (seq < count))
    if bias is not None:
        bias_n = tl.load(bias + d * H + m // WORDS, mask=m < WORDS * H, other=0.0).to(dtype)

    w += d * (G * H * H)
    first_h = h0 + first[0] + b * WIDE
    there = seq < B
    if IN_MEMORY and GROUP:
        arrive(counters, 0, BLOCK_BARRIER)
        wait(counters, 0, PROGRAMS, BLOCK_BARRIER)
        first_h = operand_seq + row.to(tl.int64) * WIDTH + b * WIDTH
        there = seq < count
    if STREAM:
        ws = ()
        halves = multiply_streamed(w, first_h, there, u0, G, H, BLOCK_H, BLOCK_K, PRECISION)
    else:
        if GROUP:
            hs = load_chunks(first_h, there, H, BLOCK_K, CHUNKS, dtype, JOINED, PRECISION)
        else:
            hs = (to_tf32(operand, PRECISION),)
        zero = (T < 0).to(tl.int32)  # which the compiler does not know
        ws, halves = prime(
            w, scale, zero, u0, hs, G, H, BLOCK_H, BLOCK_K, REGISTERS, KS, MS, JOINED, PRECISION
        )

    row, count = step_rows(offsets, length, t, T, B)
    next_row, next_count = step_rows(offsets, length, t + dt, T, B)
    x = load_gates(gates, row, gate_at, (m < WORDS * H) & (seq < count), WORDS * H)
    if bias is not None:
        x = insert_recurrent_bias(x, bias_n, m, WORDS)
    acc = to_slots(halves, G, BLOCK_H, KS, MS, JOINED)
    acc += from_memory(x, dtype, S, BLOCK_H, BLOCK_B)
    pre = unpack(acc, APART)
    once = (steps > 0).to(tl.int32)
    step = 0
    # No `for`: into one, Triton 3.8 moves the reads of all weights from shared memory.
    while step < steps:
        x = load_gates(gates, next_row, gate_at, (m < WORDS * H) & (seq < next_count), WORDS * H)
        after_row, after_count = step_rows(offsets, length, t + 2 * dt, T, B)

        saved, new = STEP(pre if GROUP else unpack(pre[0], S), state, params, H, FAST)
        if PADDED:
            new = clear(u >= H, new)
        if ZONED:
            new = blend(new, state, keep)
            next_place = row_place(next_row, column, column_c, b, u, WIDTH, K)
            running = (u < H) & (seq < next_count)
            keep = load_keep(zone_h, zone_c, zoneout, next_place, running, WIDE, STATES)
        state = select(seq < count, new, state) if RAGGED else new
        h = state[0].to(dtype)
        ended = state
        stored = (u < H) & (seq < count)
        if reset is not None:
            next_resets = load_reset(reset, next_row, seq, seq < next_count)
            state = select(next_resets, restarts, state)
        operand = (state[0] if drop is None else state[0] * dropped).to(dtype)

        # What others wait for is stored first, the rest while they read it. One program stores h
        # before or after its product, as ptxas makes the shorter step of it.
        place = row_place(row, column, column_c, b, u, WIDTH, K)
        out_at = out + place[0]
        if operand_seq is not None:
            operand_at = operand_seq + next_row.to(tl.int64) * WIDTH + state_at
            tl.store(operand_at, operand, mask=(u < H) & (seq < next_count))
        if GROUP and IN_MEMORY:
            arrive(counters, step + AHEAD, BLOCK_BARRIER)
        if GROUP or SAVE:
            tl.store(out_at + state_at, h, mask=stored)
        if GROUP and not IN_MEMORY:
            arrive(counters, step, BLOCK_BARRIER)
        if not GROUP:
            rounded = to_tf32(operand, PRECISION)
            halves = multiply(ws, (rounded,), once, G, RESIDENT, KS, MS, PRECISION)
        if not (GROUP or SAVE):
            tl.store(out_at + state_at, h, mask=stored)
        store_others(c_seq, place, ended, stored, WIDE)
        if SAVE and (KEEPS or ZONED):
            y = to_memory(saved, dtype, WORDS, BLOCK_H, BLOCK_B)
            store_gates(gates, row, gate_at, y, (m < WORDS * H) & (seq < count), WORDS * H)

        if bias is not None:
            x = insert_recurrent_bias(x, bias_n, m, WORDS)
        if GROUP:
            wait(counters, step + AHEAD, PROGRAMS, BLOCK_BARRIER)
            h_at = (
                operand_seq + next_row.to(tl.int64) * WIDTH if IN_MEMORY else out_at
            ) + b * WIDTH
            present = seq < (next_count if IN_MEMORY else B)
            halves = multiply_in_group(
                w, ws, h_at, present, u0, once, G, H, BLOCK_H, BLOCK_K, CHUNKS, RESIDENT, STREAM,
                KS, MS, JOINED, PRECISION,
            )  # fmt: skip
        acc = to_slots(halves, G, BLOCK_H, KS, MS, JOINED)
        acc += from_memory(x, dtype, S, BLOCK_H, BLOCK_B)
        pre = unpack(acc, APART)
        row, count, next_row, next_count = next_row, next_count, after_row, after_count
        t += dt
        step += 1

    store_states(h_n, c_n, first, state, mine, WIDE)

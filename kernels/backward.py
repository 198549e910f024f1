"""The reverse sweep: back-propagation through time of one layer, all its directions, in one launch.

The mirror image of the forward sweep: one program owns BLOCK_B sequences of one direction, with the
transposed weights, dh and dc in registers. A step is linear in (dh, dc), and its factors come from
saved values alone, so they are formed one step ahead, beside the product:

    start loading step t - 1;  gate gradients of step t;  W^T dgates;  store step t;
    factors of step t - 1
"""

import triton.language as tl

from fused_rnn.kernels.group import (
    LINE,
    arrive,
    wait,
)
from fused_rnn.kernels.launch import sweep_kernel
from fused_rnn.kernels.options import (
    add_gradient,
    add_where,
    clip_gradients,
    load_gradient,
    load_keep,
    load_lengths,
    load_reset,
    select,
)
from fused_rnn.kernels.partials import (
    multiply_transposed,
    operands,
    prime_transposed,
    send_partials,
    sum_partials,
)
from fused_rnn.kernels.tiles import (
    from_memory,
    load_step,
    pin,
    step_rows,
    store_gates,
    store_states,
    tile_steps,
    to_memory,
    unpack,
    words,
)


@sweep_kernel
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
    drestart_h,  # [D, B, H]
    drestart_c,
    lengths,  # the next six: see sweep.SweepOptions
    reset,
    restart,  # of what `initial` is the first state
    zone_h,
    zone_c,
    drop,
    offsets,  # [T + 1]
    counters,  # [batch tiles, D, 2, LINE]
    partials,  # [groups of a launch, 2, PROGRAMS, PROGRAMS, BLOCK_B, BLOCK_H] fp32
    zoneout,  # see sweep.SweepOptions
    clip,
    scale,  # 1.0
    zero,  # 0, but not to the compiler
    T,
    B,
    N,
    first_tile,  # of the batch, where not all fit one launch
    first_direction,
    reverse,  # bit d: direction d ran from the last step to the first
    FACTORS: tl.constexpr,
    ADJOINT: tl.constexpr,
    CELL_STATE: tl.constexpr,
    G: tl.constexpr,
    STATES: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    REGISTERS: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_BARRIER: tl.constexpr,  # see group.py
    MS: tl.constexpr,
    TOGETHER: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    S: tl.constexpr = 4 if G > 1 else 1
    dtype: tl.constexpr = w.dtype.element_ty
    WORDS: tl.constexpr = words(S, PROGRAMS, dtype)
    WIDTH: tl.constexpr = D * H
    GROUP: tl.constexpr = PROGRAMS > 1
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    RAGGED: tl.constexpr = (offsets is not None) or (lengths is not None)
    ZONED: tl.constexpr = (zone_h is not None) or (zoneout is not None)
    # c after a step is what the next one began with, unless that one began anew.
    RELOADS: tl.constexpr = (reset is not None) and (STATES == 2 and not ZONED)
    program = tl.program_id(0)
    direction = first_direction + tl.program_id(2)
    d = direction.to(tl.int64)
    batch_tile = first_tile + tl.program_id(1)
    b0 = batch_tile * BLOCK_B
    b = tl.arange(0, BLOCK_B)[None, :]
    seq = b0 + b
    length = load_lengths(lengths, seq, B)
    steps = tile_steps(offsets, length, b0, T)
    backwards = ((reverse >> direction) & 1) != 0
    t = tl.where(backwards, 0, steps - 1)
    dt = tl.where(backwards, 1, -1)
    if GROUP:
        counters += (batch_tile * D + direction) * (2 * LINE)
        PART: tl.constexpr = PROGRAMS * BLOCK_H * BLOCK_B  # of one program, or for one
        group = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        partials += group.to(tl.int64) * (2 * PROGRAMS * PART)

    u0 = program * BLOCK_H
    u = u0 + tl.arange(0, BLOCK_H)[:, None]
    m = u0 * WORDS + tl.arange(0, WORDS * BLOCK_H)[:, None]
    gate_at = b * (WORDS * H) + m
    state_at = b * WIDTH + u
    first_at = b * H + u
    first_row = (d * B + b0) * H
    mine = (u < H) & (seq < B)
    column = b0.to(tl.int64) * WIDTH + d * H
    if WORDS < S:
        gates = gates.to(tl.pointer_type(tl.int64))
        dgates = dgates.to(tl.pointer_type(tl.int64))
    dgates += (d * N + b0) * (WORDS * H)
    states += column
    if G > 1 or ZONED:
        gates += (d * N + b0) * (WORDS * H)
    if G > 1:
        initial += first_row
    if reset is not None:
        reset += d * N
    if restart is not None:
        restart += d * H
    if dout is not None:
        dout += column
    if dc_seq is not None:
        dc_seq += column
    memory = (gates, states, initial, reset, restart)
    places = (gate_at, state_at, first_at, seq, u, m, mine)

    # A product with zeros before the loop reads the weights into registers (see weights.py), and
    # leaves dh in the layout of a product, which the whole step takes over from it if the product
    # stays in this program.
    w += d * (G * H * H)
    none = tl.zeros((BLOCK_H, BLOCK_B), tl.float32) + zero
    nothing = tl.zeros((BLOCK_K, BLOCK_B), tl.float32) + zero
    ws = ()
    dh = none
    if not STREAM:
        xs = operands((none, none, none, none), dtype, G, BLOCK_H, BLOCK_B)
        ws, nothing = prime_transposed(
            w, scale, u0, xs, nothing, G, H, BLOCK_H, BLOCK_K, CHUNKS, REGISTERS, MS, PRECISION
        )
    if GROUP:
        dh += tl.sum(nothing)  # a scalar: its layout is to reach nothing
    else:
        dh = nothing
    none = pin(none, dh, zero)
    dh = add_gradient(dh, load_gradient(dh_n, first_row, first_at, mine))
    dc = add_gradient(none, load_gradient(dc_n, first_row, first_at, mine))
    restarted = (none, none)
    if drop is not None:
        dropped = tl.load(drop + first_row + first_at, mask=mine, other=0.0).to(tl.float32)
        dropped = pin(dropped, dh, zero)

    row, count = step_rows(offsets, length, t, T, B)
    next_row, next_count = step_rows(offsets, length, t + dt, T, B)
    here = (u < H) & (seq < count)
    x, before = load_step(memory, row, count, next_row, next_count, places, G, D, H, WORDS, ZONED)
    at = row.to(tl.int64) * WIDTH
    if ZONED:
        keep = load_keep(zone_h, zone_c, zoneout, at + column + state_at, here, STATES)
    dh = add_gradient(dh, load_gradient(dout, at, state_at, here))
    dc = add_gradient(dc, load_gradient(dc_seq, at, state_at, here))
    now = none
    if STATES == 2:
        now = pin(tl.load(states + at + state_at, mask=here, other=0.0), dh, zero)
    before = pin(before, dh, zero)
    saved = unpack(pin(from_memory(x, dtype, S, BLOCK_H, BLOCK_B), dh, zero), S)
    if ZONED and STATES == 2:
        now = CELL_STATE(saved, before)
    factors = FACTORS(saved, now, before, FAST)
    once = (steps > 0).to(tl.int32)
    step = 0
    while step < steps:  # no `for`, see the forward sweep
        after_row, after_count = step_rows(offsets, length, t + 2 * dt, T, B)
        x, earlier = load_step(
            memory, next_row, next_count, after_row, after_count, places, G, D, H, WORDS, ZONED
        )
        here = (u < H) & (seq < next_count)
        at = next_row.to(tl.int64) * WIDTH
        if reset is not None:
            resets = load_reset(reset, row, seq, seq < count)
        if RELOADS:
            ended = tl.load(states + at + state_at, mask=here, other=0.0)
        next_dout = load_gradient(dout, at, state_at, here)
        next_dc_seq = load_gradient(dc_seq, at, state_at, here)

        if ZONED:  # what is kept passes the cell by
            kept_dh, kept_dc = keep[0] * dh, keep[STATES - 1] * dc
            keep = load_keep(zone_h, zone_c, zoneout, at + column + state_at, here, STATES)
            slots, direct, new_dc = ADJOINT(factors, dh - kept_dh, dc - kept_dc, none)
            direct, new_dc = direct + kept_dh, new_dc + kept_dc
        else:
            slots, direct, new_dc = ADJOINT(factors, dh, dc, none)
        xs = operands(slots, dtype, G, BLOCK_H, BLOCK_B)
        if GROUP:
            exchanged = partials + (step % 2) * (PROGRAMS * PART)
            send_partials(
                w, ws, u0, xs, once, exchanged, program, PROGRAMS, STREAM, G, H, BLOCK_H, BLOCK_K,
                CHUNKS, REGISTERS, MS, PRECISION,
            )  # fmt: skip
            arrive(counters, step, BLOCK_BARRIER)
        else:
            new_dh = multiply_transposed(
                ws[0], xs, direct if drop is None else none, none, MS, PRECISION
            )
        y = to_memory(slots, dtype, WORDS, BLOCK_H, BLOCK_B)
        store_gates(dgates, row, gate_at, y, (m < WORDS * H) & (seq < count), WORDS * H)

        # In a group, only sums of partials reach dh: its layout is then not that of a product.
        ref = dh if GROUP else slots[0]
        now = pin(ended, ref, zero) if RELOADS else before
        before = pin(earlier, ref, zero)
        saved = unpack(pin(from_memory(x, dtype, S, BLOCK_H, BLOCK_B), ref, zero), S)
        if ZONED and STATES == 2:
            now = CELL_STATE(saved, before)
        factors = FACTORS(saved, now, before, FAST)

        if GROUP:
            wait(counters, step, PROGRAMS, BLOCK_BARRIER)
            received = exchanged + program * PART
            new_dh = sum_partials(received, u0, PROGRAMS, TOGETHER, H, BLOCK_H, BLOCK_B)
        if drop is not None:
            new_dh = dropped * new_dh
        if GROUP or drop is not None:
            new_dh = direct + new_dh
        new = clip_gradients((new_dh, new_dc), clip)
        if reset is not None:
            if drestart_h is not None:
                restarted = add_where(resets, restarted, new)
            new = select(resets, (0.0, 0.0), new)
        if RAGGED:
            new = select(seq < count, new, (dh, dc))
        dh, dc = add_gradient(new[0], next_dout), add_gradient(new[1], next_dc_seq)
        row, count, next_row, next_count = next_row, next_count, after_row, after_count
        t += dt
        step += 1

    store_states((dh0, dc0) if STATES == 2 else (dh0,), first_row, first_at, (dh, dc), mine)
    if drestart_h is not None:
        pointers = (drestart_h, drestart_c) if STATES == 2 else (drestart_h,)
        store_states(pointers, first_row, first_at, restarted, mine)

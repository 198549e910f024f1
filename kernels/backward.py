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
    clip_gradients,
    load_keep,
    load_lengths,
    load_reset,
    split_kept,
)
from fused_rnn.kernels.partials import (
    multiply_transposed,
    operands,
    prime_transposed,
    send_partials,
    sum_partials,
)
from fused_rnn.kernels.states import (
    add,
    add_gradients,
    add_where,
    beside_h,
    clear,
    load_gradient,
    load_others,
    load_vectors,
    repeat,
    row_place,
    select,
    sequence_place,
    store_states,
    store_vectors,
    with_h,
)
from fused_rnn.kernels.tiles import (
    from_memory,
    load_step,
    pin,
    pin_all,
    pin_before,
    step_rows,
    store_gates,
    tile_steps,
    to_memory,
    unpack,
    words,
)


@sweep_kernel
def backward_kernel(
    gates,  # [D, N, H, S], as the forward sweep left them; D, H: of one head each
    w,  # [D, G * H, H]
    vectors,  # [D, P, H], the cell's own parameters
    out,  # [N, D * H]
    c_seq,  # [N, D * K * H]: all states beside h after each step
    h0,  # [D, B, H]
    c0,  # [D, B, K * H]
    dout,  # [N, D * H]
    dc_seq,  # [N, D * K * H]
    dh_n,  # [D, B, H]
    dc_n,  # [D, B, K * H]
    dgates,  # [D, N, H, S]
    dh0,  # [D, B, H]
    dc0,  # [D, B, K * H]
    drestart_h,  # [D, B, H]
    drestart_c,  # [D, B, K * H]
    dvectors,  # [D, batch tiles, P, H] fp32
    lengths,  # the next seven: see sweep.SweepOptions
    reset,
    restart_h,
    restart_c,
    zone_h,
    zone_c,
    drop,
    offsets,  # [T + 1]
    counters,  # [batch tiles, D, 2, LINE]
    partials,  # [groups of a launch, 2, PROGRAMS, PROGRAMS, BLOCK_B, BLOCK_H]: see sweeps.py
    zoneout,  # see sweep.SweepOptions
    clip,
    scale,  # 1.0
    zero,  # 0, but not to the compiler
    T,
    B,
    N,
    first_tile,  # of the batch, where not all fit one launch
    first_direction,
    reverse,  # bit d: direction d, with all its heads, ran from the last step to the first
    FACTORS: tl.constexpr,
    ADJOINT: tl.constexpr,
    OTHERS: tl.constexpr,
    G: tl.constexpr,
    STATES: tl.constexpr,
    P: tl.constexpr,  # the cell's own parameters
    KEEPS: tl.constexpr,  # whether it saves its slots
    MASKS: tl.constexpr,  # whether units beyond H must be kept at zero
    NEEDS_H: tl.constexpr,  # whether its factors need the h before a step
    HEADS: tl.constexpr,
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
    JOINED: tl.constexpr,
    TOGETHER: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    S: tl.constexpr = 4 if G > 1 else 1
    dtype: tl.constexpr = w.dtype.element_ty
    WORDS: tl.constexpr = words(S, PROGRAMS, dtype)
    K: tl.constexpr = STATES - 1
    WIDE: tl.constexpr = HEADS * H
    WIDTH: tl.constexpr = D * H
    PADDED: tl.constexpr = MASKS and H % BLOCK_H != 0
    GROUP: tl.constexpr = PROGRAMS > 1
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    RAGGED: tl.constexpr = (offsets is not None) or (lengths is not None)
    ZONED: tl.constexpr = (zone_h is not None) or (zoneout is not None)
    GATES: tl.constexpr = KEEPS or ZONED
    # c after a step is what the next one began with, unless that one began anew.
    RELOADS: tl.constexpr = (reset is not None) and (K > 0 and not ZONED)
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
    first = sequence_place(side * B + b0, head, b, u, WIDE, K)
    mine = (u < H) & (seq < B)
    column = b0.to(tl.int64) * WIDTH + d * H
    column_c = b0.to(tl.int64) * (K * WIDTH) + side * (K * WIDE) + head
    if WORDS < S:
        gates = gates.to(tl.pointer_type(tl.int64))
        dgates = dgates.to(tl.pointer_type(tl.int64))
    dgates += (d * N + b0) * (WORDS * H)
    if GATES:
        gates += (d * N + b0) * (WORDS * H)
    if out is not None:
        out += column
    if dout is not None:
        dout += column
    if zone_h is not None:
        zone_h += column
    if c_seq is not None:
        c_seq += column_c
    if dc_seq is not None:
        dc_seq += column_c
    if zone_c is not None:
        zone_c += column_c
    if reset is not None:
        reset += side * N
    if restart_h is not None:
        restart_h += side * WIDE + head
    if restart_c is not None:
        restart_c += side * (K * WIDE) + head
    memory = (gates, out, c_seq, h0, c0, reset, restart_h, restart_c)
    places = (gate_at, first, b, seq, u, m, mine)
    params = load_vectors(vectors, side * (P * WIDE) + head, u, H, WIDE, P)

    # A product with zeros before the loop reads the weights into registers (see weights.py), and
    # leaves dh in the layout of a product, which the whole step takes over from it if the product
    # stays in this program.
    w += d * (G * H * H)
    none = tl.zeros((BLOCK_H, BLOCK_B), tl.float32) + zero
    nothing = tl.zeros((BLOCK_K, BLOCK_B), tl.float32) + zero
    ws = ()
    dh = none
    if not STREAM:
        xs = operands((none, none, none, none), dtype, G, BLOCK_H, BLOCK_B, JOINED, PRECISION)
        ws, nothing = prime_transposed(
            w, scale, zero, u0, xs, nothing, G, H, BLOCK_H, BLOCK_K, CHUNKS, REGISTERS, MS, JOINED,
            PRECISION,
        )  # fmt: skip
    if GROUP:
        dh += tl.sum(nothing)  # a scalar: its layout is to reach nothing
    else:
        dh = nothing
    none = pin(none, dh, zero)
    grads = with_h(dh, repeat(none, STATES))
    last_dc = load_others(dc_n, first, mine, WIDE, STATES)
    grads = add_gradients(grads, load_gradient(dh_n, first, mine), last_dc)
    restarted = repeat(none, STATES)
    vector_grads = repeat(none, P)
    if drop is not None:
        dropped = tl.load(drop + first[0] + first[1], mask=mine, other=0.0).to(tl.float32)
        dropped = pin(dropped, grads[0], zero)

    row, count = step_rows(offsets, length, t, T, B)
    next_row, next_count = step_rows(offsets, length, t + dt, T, B)
    here = (u < H) & (seq < count)
    x, loaded = load_step(
        memory, row, count, next_row, next_count, places, GATES, NEEDS_H, STATES, D, H, WIDE, WORDS
    )
    last = row_place(row, 0, 0, b, u, WIDTH, K)
    if ZONED:
        keep = load_keep(zone_h, zone_c, zoneout, last, here, WIDE, STATES)
    last_dc = load_others(dc_seq, last, here, WIDE, STATES)
    grads = add_gradients(grads, load_gradient(dout, last, here), last_dc)
    before = pin_before(loaded, none, grads[0], zero, NEEDS_H)
    saved = unpack(pin(from_memory(x, dtype, S, BLOCK_H, BLOCK_B), grads[0], zero), S)
    if ZONED and K > 0:
        now = OTHERS(saved, before, params, H, FAST)
    else:
        now = pin_all(load_others(c_seq, last, here, WIDE, STATES), grads[0], zero)
    factors = FACTORS(saved, now, before, params, H, FAST)
    once = (steps > 0).to(tl.int32)
    step = 0
    while step < steps:  # no `for`, see the forward sweep
        after_row, after_count = step_rows(offsets, length, t + 2 * dt, T, B)
        x, loaded = load_step(
            memory, next_row, next_count, after_row, after_count, places, GATES, NEEDS_H, STATES,
            D, H, WIDE, WORDS,
        )  # fmt: skip
        stored = (u < H) & (seq < count)
        here = (u < H) & (seq < next_count)
        place = row_place(next_row, 0, 0, b, u, WIDTH, K)
        if reset is not None:
            resets = load_reset(reset, row, seq, seq < count)
        if RELOADS:
            ended = load_others(c_seq, place, here, WIDE, STATES)
        next_dout = load_gradient(dout, place, here)
        next_dc_seq = load_others(dc_seq, place, here, WIDE, STATES)

        if ZONED:  # what is kept passes the cell by
            kept, left = split_kept(keep, grads)
            keep = load_keep(zone_h, zone_c, zoneout, place, here, WIDE, STATES)
            slots, direct, dparams = ADJOINT(factors, left, none, H)
            direct = add(direct, kept)
        else:
            slots, direct, dparams = ADJOINT(factors, grads, none, H)
        if PADDED:
            slots = clear(u >= H, slots)
        vector_grads = add_where(stored, vector_grads, dparams)
        xs = operands(slots, dtype, G, BLOCK_H, BLOCK_B, JOINED, PRECISION)
        if GROUP:
            exchanged = partials + (step % 2) * (PROGRAMS * PART)
            send_partials(
                w, ws, u0, xs, once, exchanged, program, PROGRAMS, STREAM, G, H, BLOCK_H, BLOCK_K,
                CHUNKS, REGISTERS, MS, PRECISION,
            )  # fmt: skip
            arrive(counters, step, BLOCK_BARRIER)
        else:
            new_dh = multiply_transposed(
                ws[0], xs, direct[0] if drop is None else none, none, MS, PRECISION
            )
        y = to_memory(slots, dtype, WORDS, BLOCK_H, BLOCK_B)
        store_gates(dgates, row, gate_at, y, (m < WORDS * H) & (seq < count), WORDS * H)

        # In a group, only sums of partials reach dh: its layout is then not that of a product.
        ref = grads[0] if GROUP else slots[0]
        now = pin_all(ended, ref, zero) if RELOADS else beside_h(before)
        before = pin_before(loaded, none, ref, zero, NEEDS_H)
        saved = unpack(pin(from_memory(x, dtype, S, BLOCK_H, BLOCK_B), ref, zero), S)
        if ZONED and K > 0:
            now = OTHERS(saved, before, params, H, FAST)
        factors = FACTORS(saved, now, before, params, H, FAST)

        if GROUP:
            wait(counters, step, PROGRAMS, BLOCK_BARRIER)
            received = exchanged + program * PART
            new_dh = sum_partials(received, u0, PROGRAMS, TOGETHER, H, BLOCK_H, BLOCK_B)
        if drop is not None:
            new_dh = dropped * new_dh
        if GROUP or drop is not None:
            new_dh = direct[0] + new_dh
        new = clip_gradients(with_h(new_dh, direct), clip)
        if reset is not None:
            if drestart_h is not None:
                restarted = add_where(resets, restarted, new)
            new = clear(resets, new)
        if RAGGED:
            new = select(seq < count, new, grads)
        grads = add_gradients(new, next_dout, next_dc_seq)
        row, count, next_row, next_count = next_row, next_count, after_row, after_count
        t += dt
        step += 1

    store_states(dh0, dc0, first, grads, mine, WIDE)
    if drestart_h is not None:
        store_states(drestart_h, drestart_c, first, restarted, mine, WIDE)
    tile = (side * ((B + BLOCK_B - 1) // BLOCK_B) + batch_tile) * (P * WIDE) + head
    store_vectors(dvectors, tile, u, vector_grads, H, WIDE)

"""The reverse sweep: back-propagation through time of one layer, all its directions, in one launch.

The mirror image of the forward sweep: one program owns BLOCK_B sequences of one direction, with the
transposed weights, dh and dc in registers. A step is linear in (dh, dc), and its factors come from
saved values alone, so they are formed one step ahead, beside the product:

    start loading step t - 1;  gate gradients of step t;  W^T dgates;  store step t;
    factors of step t - 1
"""

from operator import is_
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_rnn.kernels.cells import ADJOINTS, CELL_STATES, FACTORS
from fused_rnn.kernels.extras import (
    Extras,
    add_gradient,
    add_where,
    clip_gradients,
    load_gradient,
    load_keep,
    load_lengths,
    load_reset,
    select,
    zeros_where_ragged,
)
from fused_rnn.kernels.forward import NONE, Rows, direction_bits
from fused_rnn.kernels.group import (
    LINE,
    arrive,
    compile_target,
    launch_options,
    sweep_constants,
    wait,
)
from fused_rnn.kernels.launch import Variant, launch, sweep_kernel
from fused_rnn.kernels.partials import (
    multiply_transposed,
    operands,
    prime_transposed,
    send_partials,
    sum_partials,
)
from fused_rnn.kernels.plan import SPECS, Plan
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
    lengths,  # the next six: see extras.py
    reset,
    restart,  # of what `initial` is the first state
    zone_h,
    zone_c,
    drop,
    offsets,  # [T + 1]
    counters,  # [batch tiles, D, 2, LINE]
    partials,  # [groups of a launch, 2, MEMBERS, MEMBERS, BLOCK_B, BLOCK_H] fp32
    zoneout,  # see extras.py
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
    MEMBERS: tl.constexpr,
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
    WORDS: tl.constexpr = words(S, MEMBERS, dtype)
    WIDTH: tl.constexpr = D * H
    GROUP: tl.constexpr = MEMBERS > 1
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    RAGGED: tl.constexpr = (offsets is not None) or (lengths is not None)
    ZONED: tl.constexpr = (zone_h is not None) or (zoneout is not None)
    # c after a step is what the next one began with, unless that one began anew.
    RELOADS: tl.constexpr = (reset is not None) and (STATES == 2 and not ZONED)
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
    t = tl.where(backwards, 0, steps - 1)
    dt = tl.where(backwards, 1, -1)
    if GROUP:
        counters += (batch_tile * D + direction) * (2 * LINE)
        PART: tl.constexpr = MEMBERS * BLOCK_H * BLOCK_B  # of one member, or for one
        group = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        partials += group.to(tl.int64) * (2 * MEMBERS * PART)

    u0 = member * BLOCK_H
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
            exchanged = partials + (step % 2) * (MEMBERS * PART)
            send_partials(
                w, ws, u0, xs, once, exchanged, member, MEMBERS, STREAM, G, H, BLOCK_H, BLOCK_K,
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
            wait(counters, step, MEMBERS, BLOCK_BARRIER)
            received = exchanged + member * PART
            new_dh = sum_partials(received, u0, MEMBERS, TOGETHER, H, BLOCK_H, BLOCK_B)
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


class Gradients(NamedTuple):
    """What a reverse sweep finds; all but dgates in fp32.

    Attributes:
        dgates: [D, N, H, S] in the dtype of the weights, GRU's slots (dr, dz, dn, r dn).
        dh0: [D, B, H].
        dc0: [D, B, H], LSTM only.
        drestart_h: [D, B, H], with a restart state.
        drestart_c: [D, B, H], LSTM only.
    """

    dgates: Tensor
    dh0: Tensor
    dc0: Tensor | None
    drestart_h: Tensor | None
    drestart_c: Tensor | None


def plan_constants(plan: Plan) -> dict[str, int]:
    """The constexpr arguments that this sweep alone takes from a plan."""
    # As many members' partial sums at a time as fill the threads with 16 bytes each.
    together = 128 * plan.warps // (plan.block_h * plan.block_b)
    return {"MS": plan.k_split * plan.m_split, "TOGETHER": max(1, min(8, together))}


def variant(plan: Plan, cell: str, D: int, H: int, precision: str, target: Any = None) -> Variant:
    """The sweep of one cell, named ``cell``, under one plan."""
    key = (plan, cell, D, H, precision, target)
    found, functions = VARIANTS.get(key), (FACTORS[cell], ADJOINTS[cell], CELL_STATES.get(cell))
    alike = found is not None and all(map(is_, found.functions, functions))
    if found is None or not alike or found.kernel is not backward_kernel:
        spec = SPECS[cell]
        own = dict(zip(("FACTORS", "ADJOINT", "CELL_STATE"), functions, strict=True))
        own |= {"G": spec.gates, "STATES": spec.states, "H": H, "PRECISION": precision}
        constants = sweep_constants(plan, D, target) | plan_constants(plan) | own
        found = Variant(backward_kernel, functions, constants, launch_options(plan))
        VARIANTS[key] = found
    return found


VARIANTS: dict[Any, Variant] = {}


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
    extras: Extras = NONE,
) -> Gradients:
    """Back-propagate through the recurrence of one layer. Nothing that was saved is modified.

    Args:
        cell: a key of `plan.SPECS`.
        gates: what `forward_sweep` left in its gates; None for RNN without zoneout.
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
        extras: of the forward sweep.
    """
    spec = SPECS[cell]
    D, _, H = weight_hh.shape
    N = out.shape[0]
    states, initial = (c_seq, c0) if spec.states == 2 else (out, h0)
    dgates = zeros_where_ragged(extras, D, N, H, spec.slots, dtype=weight_hh.dtype, like=out)
    dh0 = torch.empty(D, rows.B, H, dtype=torch.float32, device=out.device)
    dc0 = torch.empty_like(dh0) if spec.states == 2 else None
    drestart_h = drestart_c = None
    if extras.reset is not None and extras.restart_h is not None:
        drestart_h = torch.empty_like(dh0)
        drestart_c = None if dc0 is None else torch.empty_like(dc0)
    restart = extras.restart_c if spec.states == 2 else extras.restart_h
    partials = None
    if plan.members > 1:
        groups = max(tiles * directions for _, tiles, _, directions in plan.launches(rows.B, D))
        size = 2 * plan.members**2 * plan.block_h * plan.block_b
        partials = torch.empty(groups * size, dtype=torch.float32, device=out.device)
    tensors = {
        "gates": gates if spec.slots == 4 or extras.zoned else None,
        "w": weight_hh,
        "states": states,
        "initial": initial.to(states.dtype) if spec.slots == 4 else None,
        "dout": dout,
        "dc_seq": dc_seq,
        "dh_n": dh_n,
        "dc_n": dc_n,
        "dgates": dgates,
        "dh0": dh0,
        "dc0": dc0,
        "drestart_h": drestart_h,
        "drestart_c": drestart_c,
        "lengths": extras.lengths,
        "reset": extras.reset,
        "restart": restart.to(states.dtype) if spec.slots == 4 and restart is not None else None,
        "zone_h": extras.zone_h,
        "zone_c": extras.zone_c,
        "drop": extras.drop,
        "offsets": rows.offsets,
        "counters": None,
        "partials": partials,
    }
    numbers = {
        "zoneout": extras.zoneout,
        "clip": extras.clip,
        "scale": 1.0,
        "zero": 0,
        "T": rows.T,
        "B": rows.B,
        "N": N,
        "first_tile": 0,
        "first_direction": 0,
        "reverse": direction_bits(reverse),
    }
    target = compile_target(out.device) if plan.members > 1 else None
    this = variant(plan, cell, D, H, precision, target)
    launch(this, plan, D, out.device, tensors, numbers)
    return Gradients(dgates, dh0, dc0, drestart_h, drestart_c)

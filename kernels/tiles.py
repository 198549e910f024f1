"""Small tile operations of the sweeps, and their loads and stores.

Two orders of one tile of gates occur. In memory the slots of a unit lie together, so a tile is read
and written as [S * BLOCK_H, BLOCK_B], row = unit * S + slot. In registers a gate is a tile
[BLOCK_H, BLOCK_B]; four gates that are not yet taken apart are [BLOCK_H, BLOCK_B, 2, 2].
"""

import triton
import triton.language as tl

from fused_rnn.kernels.options import load_reset
from fused_rnn.kernels.states import row_place


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """FAST: one instruction, relative error 2^-11. Otherwise absolute error below 2e-7, any x."""
    if FAST:
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp(-2.0 * tl.abs(x))  # in [0, 1]: neither end can make a NaN
        y = (1.0 - e) / (1.0 + e)
        y = tl.where(x < 0, -y, y)
    return y


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """FAST: absolute error 2^-12. Otherwise absolute error below 2e-7, any x."""
    if FAST:
        y = tanh(x * 0.5, True) * 0.5 + 0.5
    else:
        y = 1.0 / (1.0 + tl.exp(-x))
    return y


@triton.constexpr_function
def words(S, programs, dtype):
    """Elements of a unit in a tile as it is loaded or stored: S slots, or one word of 64 bits.

    In a group a program has few units, and with one word per unit and sequence no thread has to
    pass slots to another. In a tile of all units the slots move through shared memory at less cost.
    """
    return 1 if programs > 1 and dtype.primitive_bitwidth == 16 else S


@triton.jit
def from_memory(x, dtype, S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """A tile as it was loaded to fp32 [BLOCK_H, BLOCK_B, 2, 2]; [BLOCK_H, BLOCK_B] if S is 1."""
    if x.dtype == tl.int64:
        s0 = x.to(tl.int16).to(dtype, bitcast=True)
        s1 = (x >> 16).to(tl.int16).to(dtype, bitcast=True)
        s2 = (x >> 32).to(tl.int16).to(dtype, bitcast=True)
        s3 = (x >> 48).to(tl.int16).to(dtype, bitcast=True)
        x = tl.join(tl.join(s0, s2), tl.join(s1, s3)).to(tl.float32)
    elif S == 4:
        x = tl.reshape(x.to(tl.float32), (BLOCK_H, 2, 2, BLOCK_B))
        x = tl.permute(x, (0, 3, 1, 2))
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def bits(x, dtype):
    return x.to(dtype).to(tl.uint16, bitcast=True).to(tl.int64)


@triton.jit
def to_memory(slots, dtype, WORDS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """The inverse: a tuple of gates to one tile as it is stored."""
    if len(slots) == 1:
        x = slots[0].to(dtype)
    elif WORDS == 1:
        x = bits(slots[0], dtype) | (bits(slots[1], dtype) << 16)
        x |= (bits(slots[2], dtype) << 32) | (bits(slots[3], dtype) << 48)
    else:
        x = tl.join(tl.join(slots[0], slots[2]), tl.join(slots[1], slots[3]))
        x = tl.reshape(tl.permute(x, (0, 2, 3, 1)), (4 * BLOCK_H, BLOCK_B)).to(dtype)
    return x


@triton.jit
def insert_recurrent_bias(x, bias_n, m, WORDS: tl.constexpr):
    """GRU's tile as it was loaded, with the recurrent bias of n in its last slot."""
    if WORDS == 1:
        x = (x & 0xFFFFFFFFFFFF) | (bias_n.to(tl.uint16, bitcast=True).to(tl.int64) << 48)
    else:
        x = tl.where(m % 4 == 3, bias_n, x)
    return x


@triton.jit
def load_gates(gates, row, gate_at, mask, WIDTH: tl.constexpr):
    """A step's tile of gates as it lies in memory, whose rows are WIDTH apart."""
    return tl.load(gates + row.to(tl.int64) * WIDTH + gate_at, mask=mask, other=0)


@triton.jit
def store_gates(gates, row, gate_at, x, mask, WIDTH: tl.constexpr):
    """The inverse of `load_gates`."""
    tl.store(gates + row.to(tl.int64) * WIDTH + gate_at, x, mask=mask)


@triton.jit
def load_before(state, began, initial, resets, restart, restart_at, mine):
    """A state before a step: of the step before, else the initial one, or that of a new segment."""
    at = tl.where(began, state, initial)
    mask = mine
    if resets is not None:
        if restart is None:
            mask = mask & (resets == 0)
        else:
            at = tl.where(resets, restart + restart_at, at)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_step(
    memory, row, count, before_row, before_count, places, GATES: tl.constexpr,
    NEEDS_H: tl.constexpr, STATES: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    WIDE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """What the factors of a step need, as it is loaded: its saved slots, the states before it.

    Without GATES the output is the one saved slot. Of the states, h is left out if nobody needs it.
    """
    gates, out, c_seq, h0, c0, reset, restart_h, restart_c = memory
    gate_at, first, b, seq, u, m, mine = places
    if GATES:
        x = load_gates(gates, row, gate_at, (m < WORDS * H) & (seq < count), WORDS * H)
    else:
        here = row_place(row, 0, 0, b, u, D * H, STATES - 1)
        x = tl.load(out + here[0] + here[1], mask=(u < H) & (seq < count), other=0.0)
    resets = None
    if reset is not None:
        resets = load_reset(reset, row, seq, seq < count)
    at = row_place(before_row, 0, 0, b, u, D * H, STATES - 1)
    began = seq < before_count
    before = ()
    if NEEDS_H:
        state = out + at[0] + at[1]
        initial = h0 + first[0] + first[1]
        before = (load_before(state, began, initial, resets, restart_h, u, mine),)
    for k in tl.static_range(STATES - 1):
        state = c_seq + at[2] + k * WIDE + at[3]
        initial = c0 + first[2] + k * WIDE + first[3]
        x_k = load_before(state, began, initial, resets, restart_c, k * WIDE + u, mine)
        before = before + (x_k,)
    return x, before


@triton.jit
def unpack(x, S: tl.constexpr):
    """[BLOCK_H, BLOCK_B, 2, 2] to a tuple of four gates."""
    if S == 4:
        even, odd = tl.split(x)
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        slots = (s0, s1, s2, s3)
    else:
        slots = (x,)
    return slots


@triton.jit
def pin(x, ref, zero):
    """Return x unchanged, in the register layout of ref; zero is a 0 that cannot be folded.

    ref comes out of the dot. Layouts spread from a dot through the operations that use it, so the
    compiler converts x once, as it was loaded, instead of everything computed from x.
    """
    none = ref.to(tl.int32, bitcast=True) & zero
    if len(x.shape) == 4:
        none = tl.join(tl.join(none, none), tl.join(none, none))
    return (x.to(tl.float32).to(tl.int32, bitcast=True) | none).to(tl.float32, bitcast=True)


@triton.jit
def pin_all(states, ref, zero):
    """`pin` of each."""
    pinned = ()
    for i in tl.static_range(len(states)):
        pinned = pinned + (pin(states[i], ref, zero),)
    return pinned


@triton.jit
def pin_before(states, none, ref, zero, NEEDS_H: tl.constexpr):
    """All states before a step in the layout of ref, from those that `load_step` loaded.

    Where nobody needs h, `none` has its place.
    """
    if NEEDS_H:
        return pin_all(states, ref, zero)
    else:
        return (none,) + pin_all(states, ref, zero)


@triton.jit
def step_rows(offsets, length, t, T, B):
    """First row of step t, and how many sequences are running; none outside the sweep.

    With `length` [1, BLOCK_B] the count is a tile: of all sequences for one that is running, else
    0, so that `seq < count` is right in any case. A row fits 32 bits, which spares registers; what
    is multiplied by it does not.
    """
    inside = (t >= 0) & (t < T)
    if offsets is not None:
        start = tl.load(offsets + t, mask=inside, other=0).to(tl.int32)
        stop = tl.load(offsets + t + 1, mask=inside, other=0).to(tl.int32)
        count = stop - start
    else:
        start = t * B
        if length is not None:
            inside = inside & (t < length)
        count = tl.where(inside, B, 0)
    return start, count


@triton.jit
def tile_steps(offsets, length, b, T):
    """Steps in which any sequence of the tile is running; sequence b is its first one.

    In a packed batch that is also its longest.
    """
    steps = T
    if offsets is not None:
        low = T * 0
        while low < steps:  # batch sizes fall, so a binary search finds the first step without b
            mid = (low + steps) // 2
            size = tl.load(offsets + mid + 1) - tl.load(offsets + mid)
            if size > b:
                low = mid + 1
            else:
                steps = mid
    elif length is not None:
        steps = tl.minimum(tl.max(length), T)
    return steps

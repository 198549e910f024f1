"""Small tile operations that both sweeps share.

Two orders of one tile of gates occur. In memory the slots of a unit lie together, so a tile is read
and written as [S * BLOCK_H, BLOCK_B], row = unit * S + slot. In registers a gate is a tile
[BLOCK_H, BLOCK_B]; four gates that are not yet taken apart are [BLOCK_H, BLOCK_B, 2, 2].
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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


@triton.jit
def from_memory(x, S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """A tile in memory order to fp32 [BLOCK_H, BLOCK_B, 2, 2]; [BLOCK_H, BLOCK_B] if S is 1."""
    x = x.to(tl.float32)
    if S == 4:
        x = tl.permute(tl.reshape(x, (BLOCK_H, 2, 2, BLOCK_B)), (0, 3, 1, 2))
    return x


@triton.jit
def to_memory(slots, S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """The inverse: a tuple of S gates to one tile in memory order."""
    if S == 4:
        x = tl.join(tl.join(slots[0], slots[2]), tl.join(slots[1], slots[3]))
        x = tl.reshape(tl.permute(x, (0, 2, 3, 1)), (4 * BLOCK_H, BLOCK_B))
    else:
        x = slots[0]
    return x


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
def load_weights(
    w,
    scale,
    FIRST: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BATCH: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    """The left operand for gates FIRST .. FIRST + GATES - 1 of w [G * H, H], in torch's order.

    Forward  [GATES * BLOCK_H, BLOCK_H]: row = gate * BLOCK_H + unit, so that with 16 * num_warps
             units, or fewer warps, all gates of a unit end up in one thread.
    Reverse  [BLOCK_H, GATES * BLOCK_H], the transpose.
    BATCH > 1 cuts the rows over a leading axis, one entry per warp (see `product`).

    scale is 1.0 at run time. Behind it the tile is no longer the result of a load, and the compiler
    keeps the registers across the time loop instead of reading shared memory in every step.
    """
    UNITS: tl.constexpr = BLOCK_H // BATCH
    ROWS: tl.constexpr = UNITS if TRANSPOSE else GATES * UNITS
    COLS: tl.constexpr = GATES * BLOCK_H if TRANSPOSE else BLOCK_H
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    if BATCH > 1:
        row = row[None, :] + tl.arange(0, BATCH)[:, None] * ROWS
    row = tl.expand_dims(row, len(row.shape))
    if BATCH > 1:
        col = col[None, None, :]
    else:
        col = col[None, :]
    if TRANSPOSE:
        unit = row
        gate = col // BLOCK_H
        k = col % BLOCK_H
        at = ((FIRST + gate) * H + k) * H + unit
    else:
        gate = (row % ROWS) // UNITS
        unit = (row // ROWS) * UNITS + row % UNITS
        k = col
        at = ((FIRST + gate) * H + unit) * H + k
    tile = tl.load(w + at, mask=(unit < H) & (k < H), other=0.0)
    return (tile.to(tl.float32) * scale).to(w.dtype.element_ty)


@triton.jit
def product(w, x, init, BATCH: tl.constexpr, PRECISION: tl.constexpr):
    """Return w @ x + init in fp32, x [K, BLOCK_B].

    Where the compiler would turn a plain dot of so few columns into wgmma or tcgen05, a batched dot
    with one slice of the rows per warp (BATCH = num_warps) keeps it on mma.sync, whose layouts suit
    a batch tile of 8: no shared memory between the product and the gates.
    """
    if INTERPRETED:  # its dot takes the bits of bf16 for integers
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    if BATCH > 1:
        x = tl.broadcast_to(x[None, :, :], (BATCH, x.shape[0], x.shape[1]))
    return tl.dot(w, x, init, input_precision=PRECISION)


@triton.jit
def gate_tiles(acc, GATES: tl.constexpr, BLOCK_H: tl.constexpr, BATCH: tl.constexpr):
    """A forward product to [BLOCK_H, BLOCK_B], or [BLOCK_H, BLOCK_B, 2] if GATES is 2."""
    UNITS: tl.constexpr = BLOCK_H // BATCH
    BLOCK_B: tl.constexpr = acc.shape[len(acc.shape) - 1]
    if GATES == 2:
        acc = tl.permute(tl.reshape(acc, (BATCH, 2, UNITS, BLOCK_B)), (0, 2, 3, 1))
        acc = tl.reshape(acc, (BLOCK_H, BLOCK_B, 2))
    elif BATCH > 1:
        acc = tl.reshape(acc, (BLOCK_H, BLOCK_B))
    return acc


@triton.jit
def step_rows(offsets, t, T, B, PACKED: tl.constexpr):
    """First row of step t, and how many sequences are running; none outside the sweep.

    A row fits 32 bits, which spares registers; what is multiplied by it does not.
    """
    inside = (t >= 0) & (t < T)
    if PACKED:
        start = tl.load(offsets + t, mask=inside, other=0).to(tl.int32)
        stop = tl.load(offsets + t + 1, mask=inside, other=0).to(tl.int32)
        count = stop - start
    else:
        start = t * B
        count = tl.where(inside, B, 0)
    return start, count


@triton.jit
def tile_steps(offsets, b, T, PACKED: tl.constexpr):
    """Steps in which sequence b is running: all that a tile with b as its longest has to do."""
    steps = T
    if PACKED:
        low = T * 0
        while low < steps:  # batch sizes fall, so a binary search finds the first step without b
            mid = (low + steps) // 2
            size = tl.load(offsets + mid + 1) - tl.load(offsets + mid)
            if size > b:
                low = mid + 1
            else:
                steps = mid
    return steps

"""The products with the transposed weights, and the partial sums that a group exchanges.

In the reverse sweep a program has the rows of its own units' gates, and finds from their gradients
a part of dh of all units. A group's programs store these parts, and each adds up those for its own
units. What goes through the weights comes in halves, as in `weights`: (first two gates, others).
"""

import triton
import triton.language as tl

from fused_rnn.kernels.precision import product, to_tf32
from fused_rnn.kernels.weights import add_slices, load_half, load_shared, when_used


@triton.jit
def join_rows(x, y, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Two gates as one right operand [2 * BLOCK_H, BLOCK_B], row = gate * BLOCK_H + unit."""
    return tl.reshape(tl.permute(tl.join(x, y), (2, 0, 1)), (2 * BLOCK_H, BLOCK_B))


@triton.jit
def operands(
    slots,
    dtype,
    G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both halves of what goes through the weights; GRU has one gate in the last, of slot 3.

    Joined gates are one operand; the weights of GRU's slot 2 are zeros in it.
    """
    x = to_tf32(slots[0].to(dtype), PRECISION)
    if G == 1:
        if BLOCK_H < 16:
            x = join_rows(x, tl.zeros_like(x), BLOCK_H, BLOCK_B)
        return (x,)
    elif JOINED:
        x = tl.join(x, slots[3 if G == 3 else 2].to(dtype))
        y = tl.join(slots[1].to(dtype), slots[3].to(dtype))
        x = tl.permute(tl.join(x, y), (2, 3, 0, 1))
        return (tl.reshape(x, (4 * BLOCK_H, BLOCK_B)),)
    else:
        x = join_rows(x, to_tf32(slots[1].to(dtype), PRECISION), BLOCK_H, BLOCK_B)
        y = to_tf32(slots[3].to(dtype), PRECISION)
        if G == 4:
            y = join_rows(to_tf32(slots[2].to(dtype), PRECISION), y, BLOCK_H, BLOCK_B)
        elif BLOCK_H < 16:
            y = join_rows(y, tl.zeros_like(y), BLOCK_H, BLOCK_B)
        return (x, y)


@triton.jit
def through_weights(w, x, init, MS: tl.constexpr, PRECISION: tl.constexpr):
    """`product` with a transposed tile, to [BLOCK_K, BLOCK_B]."""
    ROWS: tl.constexpr = init.shape[0]
    if MS > 1:
        init = tl.reshape(init, (MS, ROWS // MS, init.shape[1]))
    dh = product(w, x, init, 1, MS, PRECISION)
    if MS > 1:
        dh = tl.reshape(dh, (ROWS, dh.shape[2]))
    return dh


@triton.jit
def multiply_transposed(tiles, xs, init, none, MS: tl.constexpr, PRECISION: tl.constexpr):
    """W^T x + init from the only chunk's tiles, none being zeros.

    Two accumulators: half as long a chain of dependent instructions.
    """
    dh = through_weights(tiles[0], xs[0], init, MS, PRECISION)
    if len(tiles) > 1:
        dh += through_weights(tiles[1], xs[1], none, MS, PRECISION)
    return dh


@triton.jit
def prime_transposed(
    w, scale, zero, u0, xs, init, G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, REGISTERS: tl.constexpr, MS: tl.constexpr,
    JOINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The resident tiles of each chunk, and a product with them (see `products.prime`)."""
    HALVES: tl.constexpr = len(xs)
    kept = ()
    if not JOINED:
        kept = load_shared(
            w, scale, zero, u0, HALVES, G, H, BLOCK_H, BLOCK_K, REGISTERS, 1, MS, True, PRECISION
        )
    ws = ()
    for i in tl.static_range(CHUNKS):
        tiles = ()
        for j in tl.static_range(HALVES):
            if i + j > 0:
                tl.debug_barrier()
            tile = load_half(
                w, scale, u0, i, 2 * j, HALVES, G, H, BLOCK_H, BLOCK_K, 1, MS, True, PRECISION
            )
            init = through_weights(tile, xs[j], init, MS, PRECISION)
            tiles = tiles + (tile,)
        if i < REGISTERS:
            ws = ws + (tiles,)
    if JOINED:
        kept = load_shared(
            w, None, zero, u0, HALVES, G, H, BLOCK_H, BLOCK_K, REGISTERS, 1, MS, True, PRECISION
        )
    return ws + kept, init


@triton.jit
def multiply_chunk(tiles, xs, part, MS: tl.constexpr, PRECISION: tl.constexpr):
    """W^T x + part of the units of one chunk."""
    for j in tl.static_range(len(xs)):
        part = through_weights(tiles[j], xs[j], part, MS, PRECISION)
    return part


@triton.jit
def store_partial(
    part,
    partials,
    chunk,
    program,
    PROGRAMS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Store what this program found for a chunk of all units, each program's part at its place."""
    k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    at = ((k // BLOCK_H) * PROGRAMS + program) * (BLOCK_H * BLOCK_B)
    at += tl.arange(0, BLOCK_B)[None, :] * BLOCK_H + k % BLOCK_H
    part = part.to(partials.dtype.element_ty)
    tl.store(partials + at, part, mask=k < PROGRAMS * BLOCK_H)


@triton.jit
def send_partials(
    w, ws, u0, xs, once, partials, program, PROGRAMS: tl.constexpr, STREAM: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr, REGISTERS: tl.constexpr, MS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store this program's part of W^T x for all units, by chunks; once: see `multiply_half`."""
    BLOCK_B: tl.constexpr = xs[0].shape[1]
    if STREAM:
        for i in tl.range(0, CHUNKS, num_stages=3):
            part = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
            for j in tl.static_range(len(xs)):
                tile = load_half(
                    w, None, u0, i, 2 * j, len(xs), G, H, BLOCK_H, BLOCK_K, 1, 1, True, PRECISION
                )
                tile = when_used(tile, PRECISION)
                part = through_weights(tile, xs[j], part, 1, PRECISION)
            store_partial(part, partials, i, program, PROGRAMS, BLOCK_H, BLOCK_K, BLOCK_B)
    else:
        for i in tl.static_range(CHUNKS):
            part = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
            if i < REGISTERS:
                part = multiply_chunk(ws[i], xs, part, MS, PRECISION)
            else:
                for _ in range(once):
                    part = multiply_chunk(ws[i], xs, part, MS, PRECISION)
            store_partial(part, partials, i, program, PROGRAMS, BLOCK_H, BLOCK_K, BLOCK_B)


@triton.jit
def sum_partials(
    partials,
    u0,
    PROGRAMS: tl.constexpr,
    TOGETHER: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The sum of what all programs found for this program's units, in a fixed order."""
    p = tl.arange(0, TOGETHER)[:, None, None]
    u = tl.arange(0, BLOCK_H)[None, None, :]
    at = (p * BLOCK_B + tl.arange(0, BLOCK_B)[None, :, None]) * BLOCK_H + u
    total = tl.zeros((TOGETHER, BLOCK_B, BLOCK_H), tl.float32)
    for i in tl.static_range(0, PROGRAMS, TOGETHER):
        total += tl.load(
            partials + i * (BLOCK_B * BLOCK_H) + at,
            mask=(i + p < PROGRAMS) & (u0 + u < H),
            other=0.0,
            cache_modifier=".cg",
        )
    return add_slices(tl.permute(total, (2, 1, 0)), 1, TOGETHER)

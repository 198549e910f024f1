"""The recurrent weights of a program, and the products with them.

A program owns BLOCK_H hidden units. Of each gate it holds their rows of the weights, cut along all
H units into chunks of BLOCK_K, the first two gates of a cell apart from the others, or joined. The
left operand of every product is a tile of weights, the right one has a column for each sequence, so
that a batch tile of 8 fills the tensor cores.
"""

import triton
import triton.language as tl

from fused_rnn.kernels.precision import ROUNDED, SPLIT, parts_of, product, stack, to_tf32


@triton.jit
def load_weights(
    w, scale, u0, chunk, FIRST: tl.constexpr, GATES: tl.constexpr, H: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr,
    TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr = False,
):  # fmt: skip
    """A left operand: a tile of gates FIRST .. FIRST + GATES - 1 of w [G * H, H], in torch's order.

    It lies between BLOCK_H units from u0, which this program owns, and a chunk of all units.
    With SLOTS they are GRU's four slots: the third is zeros, and no gate in w.

    Forward  [GATES * BLOCK_H, BLOCK_K]: row = gate * BLOCK_H + unit, so that with 16 * num_warps
             units, or fewer warps, all gates of a unit end up in one thread.
    Reverse  [BLOCK_K, GATES * BLOCK_H], the transpose.
    KS * MS > 1 cuts columns and rows over a leading axis, one entry per warp (see `product`).

    scale is 1.0 at run time. Behind it the tile is no longer the result of a load, which the
    compiler would rather repeat, or keep in another place than it is meant to have. None for a tile
    that wgmma reads from shared memory, or that is streamed; that one is not rounded yet.
    """
    UNITS: tl.constexpr = BLOCK_H // MS
    ROWS: tl.constexpr = BLOCK_K // MS if TRANSPOSE else GATES * UNITS
    COLS: tl.constexpr = (GATES * BLOCK_H if TRANSPOSE else BLOCK_K) // KS
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    part = 0
    if KS * MS > 1:  # the slices between rows and columns: else their rows would interleave in
        slices = tl.arange(0, KS * MS)[None, :, None]  # shared memory, all in the same banks
        row = row[:, None, :]
        col = col[:, None, :] + (slices // MS) * COLS
        part = slices % MS
    if TRANSPOSE:
        k = chunk * BLOCK_K + part * ROWS + row
        gate = col // BLOCK_H
        unit = u0 + col % BLOCK_H
        at = ((FIRST + gate) * H + unit) * H + k
    else:
        k = chunk * BLOCK_K + col
        gate = row // UNITS
        unit = u0 + part * UNITS + row % UNITS
        at = ((FIRST + gate) * H + unit) * H + k
    mask = (unit < H) & (k < H)
    if SLOTS:
        mask, at = mask & (gate != 2), at - gate // 3 * (H * H)
    tile = tl.load(w + at, mask=mask, other=0.0)
    if KS * MS > 1:
        tile = tl.permute(tile, (1, 0, 2))
    if scale is not None:
        tile = (tile.to(tl.float32) * scale).to(w.dtype.element_ty)
    if scale is None and PRECISION == ROUNDED:
        return (tile,)
    elif ROWS == 8 and PRECISION == SPLIT:
        return stack(parts_of(tile, PRECISION), GATES if TRANSPOSE else 1)
    else:
        return parts_of(tile, PRECISION)


@triton.jit
def when_used(tile, PRECISION: tl.constexpr):
    """A streamed tile as it is multiplied."""
    if PRECISION == ROUNDED:
        return parts_of(tile[0], PRECISION)
    else:
        return tile


@triton.jit
def widen(w):
    """A transposed operand [slices, rows, 8] in parts, with as many zeros beside its columns.

    mma multiplies 16 columns at least: more than 8 units of a single gate have.
    """
    S: tl.constexpr = w[0].shape[0]
    ROWS: tl.constexpr = w[0].shape[1]
    wide = ()
    for i in tl.static_range(len(w)):
        both = tl.permute(tl.join(w[i], tl.zeros_like(w[i])), (0, 1, 3, 2))
        wide = wide + (tl.reshape(both, (S, ROWS, 16)),)
    return wide


@triton.jit
def load_half(
    w, scale, u0, chunk, FIRST: tl.constexpr, HALVES: tl.constexpr, G: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, KS: tl.constexpr,
    MS: tl.constexpr, TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the half whose first gate is given, or of all of joined gates."""
    GATES: tl.constexpr = 4 if HALVES == 1 and G > 1 else (2 if FIRST + 1 < G else 1)
    SLOTS: tl.constexpr = GATES > G
    tile = load_weights(
        w, scale, u0, chunk, FIRST, GATES, H, BLOCK_H, BLOCK_K, KS, MS, TRANSPOSE, PRECISION, SLOTS
    )
    if TRANSPOSE and GATES * BLOCK_H < 16:
        tile = widen(tile)
    return tile


@triton.jit
def load_shared(
    w, scale, zero, u0, HALVES: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, REGISTERS: tl.constexpr, KS: tl.constexpr,
    MS: tl.constexpr, TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles beyond the first REGISTERS chunks, which stay in shared memory.

    They are loaded for the time loop alone: a tile with one use is read where it is used. zero is 0
    at run time; so no address waits in registers for the other load of the same tile.
    """
    ws = ()
    for i in tl.static_range(REGISTERS, (H + BLOCK_K - 1) // BLOCK_K):
        tiles = ()
        for j in tl.static_range(HALVES):
            tl.debug_barrier()
            tile = load_half(
                w, scale, u0, i + zero, 2 * j, HALVES, G, H, BLOCK_H, BLOCK_K, KS, MS, TRANSPOSE,
                PRECISION,
            )  # fmt: skip
            tiles = tiles + (tile,)
        ws = ws + (tiles,)
    return ws


@triton.jit
def stream_product(
    w,
    at,
    running,
    u0,
    FIRST: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product with all of h, at a row of each sequence; the weights are read on the way."""
    acc = tl.zeros((GATES * BLOCK_H, running.shape[1]), tl.float32)
    for i in tl.range(0, (H + BLOCK_K - 1) // BLOCK_K, num_stages=3):
        tile = load_weights(
            w, None, u0, i, FIRST, GATES, H, BLOCK_H, BLOCK_K, 1, 1, False, PRECISION
        )
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        x = tl.load(at + k, mask=(k < H) & running, other=0.0, cache_modifier=".cg")
        x = to_tf32(x.to(w.dtype.element_ty), PRECISION)
        acc = product(when_used(tile, PRECISION), x, acc, 1, 1, PRECISION)
    return acc


@triton.jit
def load_chunks_at_once(
    at, running, H: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to four chunks of h: one load that is then cut.

    Its latency counts once, and it crosses shared memory once.
    """
    C: tl.constexpr = CHUNKS if CHUNKS <= 2 else 4
    k = tl.arange(0, C * BLOCK_K)[:, None]
    x = tl.load(at + k, mask=(k < H) & running, other=0.0, cache_modifier=".cg")
    x = to_tf32(x.to(dtype), PRECISION)
    B: tl.constexpr = x.shape[1]
    if C == 1:
        chunks = (x,)
    elif C == 2:
        chunks = tl.split(tl.permute(tl.reshape(x, (2, BLOCK_K, B)), (1, 2, 0)))
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (2, 2, BLOCK_K, B)), (2, 3, 0, 1)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        chunks = (x0, x1, x2, x3)
    return chunks


@triton.jit
def load_h(
    at, running, H: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """H of all units from a row of each sequence, in chunks [BLOCK_K, BLOCK_B] of a dtype.

    Of more than four chunks the rest is another load: no registers for a power of two of them.
    """
    FIRST: tl.constexpr = CHUNKS if CHUNKS <= 4 else 4
    chunks = load_chunks_at_once(at, running, H, BLOCK_K, FIRST, dtype, PRECISION)
    if CHUNKS > 4:
        chunks = chunks + load_chunks_at_once(
            at + 4 * BLOCK_K, running, H - 4 * BLOCK_K, BLOCK_K, CHUNKS - 4, dtype, PRECISION
        )
    return chunks


@triton.jit
def gate_tiles(acc, GATES: tl.constexpr, BLOCK_H: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr):
    """A forward product to [BLOCK_H, BLOCK_B, GATES, KS], without the last two where they are 1."""
    UNITS: tl.constexpr = BLOCK_H // MS
    BLOCK_B: tl.constexpr = acc.shape[len(acc.shape) - 1]
    if KS > 1:
        acc = tl.permute(tl.reshape(acc, (KS, MS, GATES, UNITS, BLOCK_B)), (1, 3, 4, 2, 0))
        if GATES == 2:
            acc = tl.reshape(acc, (BLOCK_H, BLOCK_B, 2, KS))
        else:
            acc = tl.reshape(acc, (BLOCK_H, BLOCK_B, KS))
    elif GATES == 2:
        acc = tl.permute(tl.reshape(acc, (MS, 2, UNITS, BLOCK_B)), (0, 2, 3, 1))
        acc = tl.reshape(acc, (BLOCK_H, BLOCK_B, 2))
    elif MS > 1:
        acc = tl.reshape(acc, (BLOCK_H, BLOCK_B))
    return acc


@triton.jit
def add_slices(x, S: tl.constexpr, KS: tl.constexpr):
    """The sum over the last axis, KS <= 8, in a fixed order; S slots before it."""
    BLOCK_H: tl.constexpr = x.shape[0]
    BLOCK_B: tl.constexpr = x.shape[1]
    for i in tl.static_range(3):
        if (1 << i) < KS:
            if S == 1:
                a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_B, KS // (2 << i), 2)))
            else:
                a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_B, 2, 2, KS // (2 << i), 2)))
            x = a + b
    if S == 1:
        x = tl.reshape(x, (BLOCK_H, BLOCK_B))
    else:
        x = tl.reshape(x, (BLOCK_H, BLOCK_B, 2, 2))
    return x


@triton.jit
def join_halves(halves, G: tl.constexpr, BLOCK_H: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr):
    """The products of both halves to the slots of a cell, as `tiles.from_memory` has them."""
    acc = gate_tiles(halves[0], 2 if G > 1 else 1, BLOCK_H, KS, MS)
    if G > 1:
        last = gate_tiles(halves[1], G - 2, BLOCK_H, KS, MS)
        if G == 3:
            last = tl.join(last * 0.0, last)
            if KS > 1:
                last = tl.permute(last, (0, 1, 3, 2))
        acc = tl.join(acc, last)
        if KS > 1:
            acc = tl.permute(acc, (0, 1, 4, 2, 3))
        else:
            acc = tl.permute(acc, (0, 1, 3, 2))
    if KS > 1:
        acc = add_slices(acc, 4 if G > 1 else 1, KS)
    return acc

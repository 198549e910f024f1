"""The recurrent product W h: from weights that one program keeps, a group keeps, or streams.

What goes through the weights is in halves, (first two gates, others), or the only one of a cell
with one gate. Joined gates are one tile, too: all slots of a program's units, slot by slot, so that
a plain dot has the rows for sm_90's wgmma. That reads weights from registers or, with no trip
through them, from shared memory. So one program holds more units, and a group of fewer programs
sends less through L2 for each sequence.
"""

import triton
import triton.language as tl

from fused_rnn.kernels.precision import product
from fused_rnn.kernels.weights import (
    join_halves,
    load_h,
    load_half,
    load_shared,
    stream_product,
)

AHEAD = tl.constexpr(3)  # chunks of h that are under way while one is multiplied


@triton.jit
def load_chunk(at, running, chunk: tl.constexpr, H: tl.constexpr):
    """H of a chunk of units, [BLOCK_K, BLOCK_B], at being the place of the first chunk."""
    BLOCK_K: tl.constexpr = at.shape[0]
    if chunk * BLOCK_K + BLOCK_K > H:
        running = running & (chunk * BLOCK_K + tl.arange(0, BLOCK_K)[:, None] < H)
    return tl.load(at + chunk * BLOCK_K, mask=running, other=0.0, cache_modifier=".cg")


@triton.jit
def load_chunks(
    at, running, H: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    dtype: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of h; wgmma takes it from shared memory, and a load for each is as good there."""
    if JOINED:
        hs = ()
        at += tl.arange(0, BLOCK_K)[:, None]
        for i in tl.static_range(CHUNKS):
            hs = hs + (load_chunk(at, running, i, H).to(dtype),)
        return hs
    else:
        return load_h(at, running, H, BLOCK_K, CHUNKS, dtype, PRECISION)


@triton.jit
def prime(
    w, scale, zero, u0, hs, G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, REGISTERS: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr,
    JOINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The resident tiles of each chunk, and their product with the first h.

    This product stands before the time loop: so tiles are read into registers here, one after the
    other, since they pass through the same shared memory. The tiles that stay there come first,
    while there are registers for their way; but not beside all of a wide h.
    """
    HALVES: tl.constexpr = 2 if G > 1 and not JOINED else 1
    kept = ()
    if not JOINED:
        kept = load_shared(
            w, scale, zero, u0, HALVES, G, H, BLOCK_H, BLOCK_K, REGISTERS, KS, MS, False, PRECISION
        )
    ws = ()
    acc = None
    last = None
    for i in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
        tl.debug_barrier()
        tile = load_half(
            w, scale, u0, i, 0, HALVES, G, H, BLOCK_H, BLOCK_K, KS, MS, False, PRECISION
        )
        acc = product(tile, hs[i], acc, KS, MS, PRECISION)
        tiles = (tile,)
        if HALVES > 1:
            tl.debug_barrier()
            tile = load_half(
                w, scale, u0, i, 2, HALVES, G, H, BLOCK_H, BLOCK_K, KS, MS, False, PRECISION
            )
            last = product(tile, hs[i], last, KS, MS, PRECISION)
            tiles = tiles + (tile,)
        if i < REGISTERS:
            ws = ws + (tiles,)
    if JOINED:
        kept = load_shared(
            w, None, zero, u0, HALVES, G, H, BLOCK_H, BLOCK_K, REGISTERS, KS, MS, False, PRECISION
        )
    halves = (acc,)
    if HALVES > 1:
        halves = (acc, last)
    return ws + kept, halves


@triton.jit
def multiply_half(
    ws, hs, once, half: tl.constexpr, REGISTERS: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of a half's products of all chunks, of which the first REGISTERS are in registers.

    once is 1 at run time. In a loop around their product, the compiler reads the other tiles where
    they are used, from shared memory; else it would hold them in registers as well, and spill.
    """
    acc = None
    for i in tl.static_range(REGISTERS):
        acc = product(ws[i][half], hs[i], acc, KS, MS, PRECISION)
    if len(ws) > REGISTERS:
        if acc is None:
            tile = ws[0][half][0]
            ROWS: tl.constexpr = tile.shape[len(tile.shape) - 2]
            B: tl.constexpr = hs[0].shape[1]
            acc = tl.zeros((KS * MS, ROWS, B) if KS * MS > 1 else (ROWS, B), tl.float32)
        for _ in range(once):
            for i in tl.static_range(REGISTERS, len(ws)):
                acc = product(ws[i][half], hs[i], acc, KS, MS, PRECISION)
    return acc


@triton.jit
def multiply(
    ws, hs, once, G: tl.constexpr, REGISTERS: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W h from resident weights."""
    halves = (multiply_half(ws, hs, once, 0, REGISTERS, KS, MS, PRECISION),)
    if G > 1:
        halves = halves + (multiply_half(ws, hs, once, 1, REGISTERS, KS, MS, PRECISION),)
    return halves


@triton.jit
def multiply_joined(
    ws, at, running, H: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W h from resident weights of joined gates; h is read on the way, a few chunks ahead."""
    acc = None
    hs = ()
    at += tl.arange(0, BLOCK_K)[:, None]
    for i in tl.static_range(CHUNKS + AHEAD):
        if i < CHUNKS:
            hs = hs + (load_chunk(at, running, i, H),)
        if i >= AHEAD:
            acc = product(ws[i - AHEAD][0], hs[i - AHEAD], acc, 1, 1, PRECISION)
    return (acc,)


@triton.jit
def multiply_streamed(
    w, at, running, u0, G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W h from weights that are read on the way."""
    FIRST: tl.constexpr = 2 if G > 1 else 1
    halves = (stream_product(w, at, running, u0, 0, FIRST, H, BLOCK_H, BLOCK_K, PRECISION),)
    if G > 1:
        last = stream_product(w, at, running, u0, 2, G - 2, H, BLOCK_H, BLOCK_K, PRECISION)
        halves = halves + (last,)
    return halves


@triton.jit
def multiply_in_group(
    w, ws, at, running, u0, once, G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, REGISTERS: tl.constexpr, STREAM: tl.constexpr,
    KS: tl.constexpr, MS: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W h of a group, h at a row of each sequence."""
    if STREAM:
        return multiply_streamed(w, at, running, u0, G, H, BLOCK_H, BLOCK_K, PRECISION)
    elif JOINED:
        return multiply_joined(ws, at, running, H, BLOCK_K, CHUNKS, PRECISION)
    else:
        hs = load_h(at, running, H, BLOCK_K, CHUNKS, at.dtype.element_ty, PRECISION)
        return multiply(ws, hs, once, G, REGISTERS, KS, MS, PRECISION)


@triton.jit
def to_slots(
    halves, G: tl.constexpr, BLOCK_H: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr,
    JOINED: tl.constexpr,
):  # fmt: skip
    """A product to the slots of a cell, as `tiles.from_memory` has them."""
    if JOINED and G > 1:
        acc = tl.reshape(halves[0], (2, 2, BLOCK_H, halves[0].shape[1]))
        acc = tl.permute(acc, (2, 3, 0, 1))
    else:
        acc = join_halves(halves, G, BLOCK_H, KS, MS)
    return acc

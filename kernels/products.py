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
    first_products,
    join_halves,
    load_h,
    products,
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
    w, scale, u0, hs, G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, REGISTERS: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr,
    JOINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The resident weights, and their product with the first h (see `weights.first_products`)."""
    FIRST: tl.constexpr = (4 if JOINED else 2) if G > 1 else 1
    ws, acc = first_products(
        w, scale, u0, hs, 0, FIRST, H, BLOCK_H, BLOCK_K, REGISTERS, KS, MS, PRECISION, FIRST > G
    )
    if G <= FIRST:
        return (ws,), (acc,)
    else:
        ws_last, last = first_products(
            w, scale, u0, hs, 2, G - 2, H, BLOCK_H, BLOCK_K, REGISTERS, KS, MS, PRECISION
        )
        return (ws, ws_last), (acc, last)


@triton.jit
def multiply(
    ws, hs, once, G: tl.constexpr, REGISTERS: tl.constexpr, KS: tl.constexpr, MS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W h from resident weights."""
    halves = (products(ws[0], hs, once, REGISTERS, KS, MS, PRECISION),)
    if G > 1:
        halves = halves + (products(ws[1], hs, once, REGISTERS, KS, MS, PRECISION),)
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
            acc = product(ws[i - AHEAD], hs[i - AHEAD], acc, 1, 1, PRECISION)
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
        return multiply_joined(ws[0], at, running, H, BLOCK_K, CHUNKS, PRECISION)
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

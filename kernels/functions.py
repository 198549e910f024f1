"""Functions of the tiles of a derived cell that Triton lacks.

Those of a layer norm take tiles [BLOCK_H, BLOCK_B] of all units of a head, of which H are there.
"""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x), accurate where x is small, too: what 1 + x lost is made good."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1, accurate where x is small, too."""
    u = tl.exp(x)
    y = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u)))
    return tl.where((u > 0.0) & (u < float("inf")), y, u - 1.0)


@triton.jit
def unit_mean(x, H: tl.constexpr):
    """The mean over the units [1, BLOCK_B].

    Were x a product, the compiler would fuse it with the sum's first addition, in which each of two
    lanes adds the other one's rounded product to its own exact one: two results of one sum. The
    minimum, which changes nothing but a NaN to the infinity, whose norm is NaN as well, is between.
    """
    there = tl.arange(0, x.shape[0])[:, None] < H
    x = tl.minimum(x, float("inf"))
    return tl.sum(tl.where(there, x, 0.0), 0, keep_dims=True) / H


@triton.jit
def layer_rstd(x, eps, H: tl.constexpr):
    """1 / sqrt(variance + eps) over the units [1, BLOCK_B]."""
    centered = x - unit_mean(x, H)
    return tl.rsqrt(unit_mean(centered * centered, H) + eps)


@triton.jit
def layer_norm(x, eps, H: tl.constexpr):
    """(x - mean) rstd; zero for units that only fill up the tile."""
    there = tl.arange(0, x.shape[0])[:, None] < H
    return tl.where(there, (x - unit_mean(x, H)) * layer_rstd(x, eps, H), 0.0)


@triton.jit
def layer_center(d, y, H: tl.constexpr):
    """The gradient of x over rstd, of the gradient d of y = (x - mean) rstd."""
    there = tl.arange(0, d.shape[0])[:, None] < H
    return tl.where(there, d - unit_mean(d, H) - y * unit_mean(d * y, H), 0.0)

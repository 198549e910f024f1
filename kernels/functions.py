"""Functions of the tiles of a derived cell that Triton lacks."""

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

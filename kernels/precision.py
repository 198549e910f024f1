"""What becomes of fp32 operands on the tensor cores, and the product of such operands.

An operand is a tuple of tiles, its parts, whose sum it is: one part, but for fp32 in full precision
on NVIDIA's tensor cores, which multiply no fp32. There it is three of bf16, of 8 bits each.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROUNDED = tl.constexpr("rounded tf32")  # a precision: TF32 on NVIDIA's tensor cores
SPLIT = tl.constexpr("split fp32")  # another one: full fp32 there


@triton.jit
def to_tf32(x, PRECISION: tl.constexpr):
    """The fp32 operand of a product, rounded to TF32.

    Tensor cores cut it off there, which makes every number smaller: errors that add up over the
    steps to two or three times those of rounding.
    """
    if PRECISION == ROUNDED and x.dtype == tl.float32:
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        ).to(tl.float32, bitcast=True)
    return x


@triton.jit
def split(x):
    """Three bf16 tiles whose sum is x, the largest first; of an infinite x, two are NaN.

    In assembly, where no difference is fused with what x was made by: from h in a register and
    from h in memory must come the same parts.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        cvt.rn.bf16x2.f32 $0, $4, $3;
        shl.b32 a, $0, 16;
        and.b32 b, $0, 0xffff0000;
        sub.rn.f32 a, $3, a;
        sub.rn.f32 b, $4, b;
        cvt.rn.bf16x2.f32 $1, b, a;
        shl.b32 c, $1, 16;
        and.b32 d, $1, 0xffff0000;
        sub.rn.f32 a, a, c;
        sub.rn.f32 b, b, d;
        cvt.rn.bf16x2.f32 $2, b, a;
        }""",
        "=&r,=&r,=&r,f,f",
        [x],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def parts_of(x, PRECISION: tl.constexpr):
    """The parts of a tile."""
    if PRECISION == SPLIT and x.dtype == tl.float32:
        high, middle, low = split(x)
        return (high, middle, low)
    else:
        return (to_tf32(x, PRECISION),)


@triton.jit
def slices(x, KS: tl.constexpr, MS: tl.constexpr):
    """The right operand of a batched dot: a slice of x [K, BLOCK_B] for each warp."""
    if KS * MS > 1:
        K: tl.constexpr = x.shape[0] // KS
        B: tl.constexpr = x.shape[1]
        if KS > 1:
            x = tl.broadcast_to(tl.reshape(x, (KS, 1, K, B)), (KS, MS, K, B))
            x = tl.reshape(x, (KS * MS, K, B))
        else:
            x = tl.broadcast_to(x[None, :, :], (MS, K, B))
    return x


@triton.jit
def in_two(x):
    """The first and the last rows of a tile [K, BLOCK_B]."""
    K: tl.constexpr = x.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(x, (2, K, x.shape[1])), (1, 2, 0)))


@triton.jit
def over(first, second):
    """Two tiles [slices, 8, K] as one of 16 rows."""
    S: tl.constexpr = first.shape[0]
    K: tl.constexpr = first.shape[2]
    return tl.reshape(tl.permute(tl.join(first, second), (0, 3, 1, 2)), (S, 16, K))


@triton.jit
def apart(acc):
    """The inverse of `over`, for a product [slices, 16, BLOCK_B]: a thread has both."""
    S: tl.constexpr = acc.shape[0]
    B: tl.constexpr = acc.shape[2]
    return tl.split(tl.permute(tl.reshape(acc, (S, 2, 8, B)), (0, 2, 3, 1)))


@triton.jit
def stack(parts, GATES: tl.constexpr):
    """The parts of a left operand [slices, 8, columns], as mma takes them: 16 rows at a time.

    The two large parts lie one over the other. So do, where the columns are those of two gates, the
    small part's columns of the one and the other; else half of its rows are wasted.
    """
    high, middle, low = parts
    if GATES == 1:
        return ((over(high, middle),), low)
    else:
        S: tl.constexpr = high.shape[0]
        K: tl.constexpr = high.shape[2] // 2
        high0, high1 = tl.split(tl.permute(tl.reshape(high, (S, 8, 2, K)), (0, 1, 3, 2)))
        middle0, middle1 = tl.split(tl.permute(tl.reshape(middle, (S, 8, 2, K)), (0, 1, 3, 2)))
        low0, low1 = tl.split(tl.permute(tl.reshape(low, (S, 8, 2, K)), (0, 1, 3, 2)))
        return ((over(high0, middle0), over(high1, middle1)), over(low0, low1))


@triton.jit
def stacked_product(w, x, KS: tl.constexpr, MS: tl.constexpr):
    """`product` with a left operand as `stack` makes it."""
    stacks, low = w
    xs = (x,) if len(stacks) == 1 else in_two(x)
    acc = None
    for i in tl.static_range(len(stacks)):
        x_high, x_middle, x_low = split(slices(xs[i], KS, MS))
        small = tl.dot(low, x_high)
        if len(stacks) > 1:
            small = apart(small)[i]
        high, middle = apart(tl.dot(stacks[i], x_middle, tl.dot(stacks[i], x_low)))
        small += high + middle
        high, middle = apart(tl.dot(stacks[i], x_high))
        small += middle
        acc = high + small if acc is None else acc + (high + small)
    return acc


@triton.jit
def product(w, x, init, KS: tl.constexpr, MS: tl.constexpr, PRECISION: tl.constexpr):
    """Return w @ x + init in fp32, of operands w and x [K, BLOCK_B].

    KS * MS = num_warps makes it a batched dot, in which each warp multiplies one of KS slices of
    the columns by one of MS slices of the rows. So no warp holds what another one holds, however
    few rows there are; and what would become wgmma or tcgen05 stays on mma.sync, whose layouts suit
    a batch tile of 8. The result is [KS * MS, rows / MS, BLOCK_B], the slices not yet summed.

    Of three parts each there are six products; the others are smaller than the last bit of fp32.
    Tensor cores cut off their sums, always towards zero: so the large product comes last, and what
    is large already, init, is added by other means. Two sums are half as long a chain.
    """
    if len(w) == 1:
        left, right = w[0], x
        if INTERPRETED:  # its dot takes the bits of bf16 for integers
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        right = slices(right, KS, MS)
        # 16-bit operands have one part in any precision.
        how: tl.constexpr = "tf32" if PRECISION == ROUNDED or PRECISION == "tf32" else "ieee"
        acc = tl.dot(left, right, init, input_precision=how)
    else:
        if len(w) == 2:
            acc = stacked_product(w, x, KS, MS)
        else:
            high, middle, low = split(slices(x, KS, MS))
            small = tl.dot(w[0], low)
            small = tl.dot(w[2], high, small)
            small = tl.dot(w[1], middle, small)
            acc = tl.dot(w[0], middle)
            acc = tl.dot(w[1], high, acc)
            acc = tl.dot(w[0], high, acc) + small
        if init is not None:
            acc += init
    return acc

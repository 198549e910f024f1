"""The states of a cell, as tuples of tiles and in memory.

h of a row, or of a sequence, lies in the WIDE units of a direction: H of each of its heads. The
states beside h, which arguments call c, lie one after the other in K * WIDE. So a place is four
numbers: a scalar and offsets [BLOCK_H, BLOCK_B] of h, and the same of the first of the others.
"""

import triton
import triton.language as tl


@triton.jit
def row_place(row, column, column_c, b, u, WIDTH: tl.constexpr, K: tl.constexpr):
    """The place in [N, WIDTH] and [N, K * WIDTH], from columns of sequence b = 0 and unit u = 0."""
    row = row.to(tl.int64)
    return row * WIDTH + column, b * WIDTH + u, row * (K * WIDTH) + column_c, b * (K * WIDTH) + u


@triton.jit
def sequence_place(first, head, b, u, WIDE: tl.constexpr, K: tl.constexpr):
    """The place in [D, B, WIDE] and [D, B, K * WIDE]; first: of all D * B sequences."""
    return first * WIDE + head, b * WIDE + u, first * (K * WIDE) + head, b * (K * WIDE) + u


@triton.jit
def load_others(c, place, mask, WIDE: tl.constexpr, STATES: tl.constexpr):
    """The states beside h in the type of the pointer; an empty tuple if there is none."""
    states = ()
    if c is not None:
        for k in tl.static_range(STATES - 1):
            x = tl.load(c + place[2] + k * WIDE + place[3], mask=mask, other=0.0)
            states = states + (x,)
    return states


@triton.jit
def load_states(h, c, place, mask, WIDE: tl.constexpr, STATES: tl.constexpr):
    """All states in fp32."""
    states = (tl.load(h + place[0] + place[1], mask=mask, other=0.0).to(tl.float32),)
    others = load_others(c, place, mask, WIDE, STATES)
    for k in tl.static_range(STATES - 1):
        states = states + (others[k].to(tl.float32),)
    return states


@triton.jit
def store_others(c, place, states, mask, WIDE: tl.constexpr):
    """The inverse of `load_others`, of a tuple with h in front."""
    if c is not None:
        for k in tl.static_range(len(states) - 1):
            to = c + place[2] + k * WIDE + place[3]
            tl.store(to, states[k + 1].to(to.dtype.element_ty), mask=mask)


@triton.jit
def store_states(h, c, place, states, mask, WIDE: tl.constexpr):
    """The inverse of `load_states`, in the type of each pointer."""
    to = h + place[0] + place[1]
    tl.store(to, states[0].to(to.dtype.element_ty), mask=mask)
    store_others(c, place, states, mask, WIDE)


@triton.jit
def load_vectors(vectors, first, u, H: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr):
    """A cell's own parameters in fp32, P tiles [BLOCK_H, 1]."""
    params = ()
    for i in tl.static_range(P):
        x = tl.load(vectors + first + i * WIDE + u, mask=u < H, other=0.0)
        params = params + (x.to(tl.float32),)
    return params


@triton.jit
def store_vectors(vectors, first, u, grads, H: tl.constexpr, WIDE: tl.constexpr):
    """The sums over a tile's sequences of the gradients of a cell's own parameters."""
    for i in tl.static_range(len(grads)):
        total = tl.sum(grads[i], axis=1, keep_dims=True)
        tl.store(vectors + first + i * WIDE + u, total, mask=u < H)


@triton.jit
def repeat(tile, TIMES: tl.constexpr):
    """A tuple that has a tile so many times."""
    tiles = ()
    for _ in tl.static_range(TIMES):
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def with_h(h, states):
    """The states, h replaced."""
    new = (h,)
    for i in tl.static_range(1, len(states)):
        new = new + (states[i],)
    return new


@triton.jit
def beside_h(states):
    """The states without h."""
    others = ()
    for i in tl.static_range(1, len(states)):
        others = others + (states[i],)
    return others


@triton.jit
def select(mask, a, b):
    """`tl.where` of each state: a where the mask is set, else b."""
    states = ()
    for i in tl.static_range(len(a)):
        states = states + (tl.where(mask, a[i], b[i]),)
    return states


@triton.jit
def clear(mask, states):
    """The states, with zeros where the mask is set."""
    left = ()
    for i in tl.static_range(len(states)):
        left = left + (tl.where(mask, 0.0, states[i]),)
    return left


@triton.jit
def add(states, others):
    """The sum of each."""
    sums = ()
    for i in tl.static_range(len(states)):
        sums = sums + (states[i] + others[i],)
    return sums


@triton.jit
def add_where(mask, states, others):
    """The states, with the others added where the mask is set."""
    sums = ()
    for i in tl.static_range(len(states)):
        sums = sums + (states[i] + tl.where(mask, others[i], 0.0),)
    return sums


@triton.jit
def load_gradient(h, place, mask):
    """The tile of a gradient of h from outside, None if there is no pointer."""
    tile = None
    if h is not None:
        tile = tl.load(h + place[0] + place[1], mask=mask, other=0.0)
    return tile


@triton.jit
def add_gradients(states, dh, others):
    """Their sums with what `load_gradient` and `load_others` returned."""
    x = states[0]
    if dh is not None:
        x += dh.to(tl.float32)
    sums = (x,)
    for i in tl.static_range(1, len(states)):
        if len(others) > 0:
            sums = sums + (states[i] + others[i - 1].to(tl.float32),)
        else:
            sums = sums + (states[i],)
    return sums

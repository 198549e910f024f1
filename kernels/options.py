"""What the sweeps can do beside a plain recurrence: lengths, resets, zoneout, dropout of h.

Each is switched on by the tensor that it needs. Without it, its code is not compiled.
"""

import triton
import triton.language as tl


@triton.jit
def load_lengths(lengths, seq, B):
    """The lengths [1, BLOCK_B] of a tile's sequences, None if all are equal."""
    length = None
    if lengths is not None:
        length = tl.load(lengths + seq, mask=seq < B, other=0)
    return length


@triton.jit
def load_reset(reset, row, seq_at, running):
    """Which sequences of a step begin anew [1, BLOCK_B]."""
    return tl.load(reset + row.to(tl.int64) + seq_at, mask=running, other=0) != 0


@triton.jit
def load_restart(restart, first, u, H: tl.constexpr):
    """The state [BLOCK_H, 1] that a new segment begins with; zeros where there is no pointer."""
    state = tl.zeros(u.shape, tl.float32)
    if restart is not None:
        state = tl.load(restart + first + u, mask=u < H, other=0.0).to(tl.float32)
    return state


@triton.jit
def load_restarts(restart_h, restart_c, first, u, H: tl.constexpr, STATES: tl.constexpr):
    """`load_restart` of each state."""
    states = (load_restart(restart_h, first, u, H),)
    if STATES == 2:
        states = states + (load_restart(restart_c, first, u, H),)
    return states


@triton.jit
def load_share(zone, zoneout, at, mask):
    """How much of its old value a state keeps in a step: a tile of 0 and 1, or a number."""
    share = zoneout
    if zone is not None:
        share = tl.load(zone + at, mask=mask, other=0).to(tl.float32)
    return share


@triton.jit
def load_keep(zone_h, zone_c, zoneout, at, mask, STATES: tl.constexpr):
    """`load_share` of each state."""
    keep = (load_share(zone_h, zoneout, at, mask),)
    if STATES == 2:
        keep = keep + (load_share(zone_c, zoneout, at, mask),)
    return keep


@triton.jit
def blend(new, old, keep):
    """`keep` of each old state, the rest of the new; exactly the old where a mask says so."""
    states = ()
    for i in tl.static_range(len(new)):
        if len(keep[i].shape) > 0:
            state = tl.where(keep[i] != 0, old[i], new[i])
        else:
            state = new[i] + keep[i] * (old[i] - new[i])
        states = states + (state,)
    return states


@triton.jit
def select(mask, a, b):
    """`tl.where` of each state: a where the mask is set, else b."""
    states = ()
    for i in tl.static_range(len(a)):
        states = states + (tl.where(mask, a[i], b[i]),)
    return states


@triton.jit
def load_gradient(pointer, first, at, mask):
    """The tile of a gradient from outside, None if there is no pointer."""
    tile = None
    if pointer is not None:
        tile = tl.load(pointer + first + at, mask=mask, other=0.0)
    return tile


@triton.jit
def add_gradient(x, other):
    """The sum of a tile and what `load_gradient` returned."""
    if other is not None:
        x += other.to(tl.float32)
    return x


@triton.jit
def add_where(mask, states, others):
    """The states, with the others added where the mask is set."""
    sums = ()
    for i in tl.static_range(len(states)):
        sums = sums + (states[i] + tl.where(mask, others[i], 0.0),)
    return sums


@triton.jit
def clip_gradients(states, clip):
    """Each cut to [-clip, clip] if there is a bound; NaN stays NaN."""
    cut = ()
    for i in tl.static_range(len(states)):
        x = states[i]
        if clip is not None:
            x = tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))
        cut = cut + (x,)
    return cut

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
def load_restarts(
    restart_h, restart_c, side, head, u, H: tl.constexpr, WIDE: tl.constexpr, STATES: tl.constexpr
):
    """`load_restart` of each state of a head; side: its direction."""
    states = (load_restart(restart_h, side * WIDE + head, u, H),)
    for k in tl.static_range(STATES - 1):
        first = side * ((STATES - 1) * WIDE) + head + k * WIDE
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
def load_keep(
    zone_h, zone_c, zoneout, place, mask, WIDE: tl.constexpr, STATES: tl.constexpr
):  # fmt: skip
    """`load_share` of each state."""
    keep = (load_share(zone_h, zoneout, place[0] + place[1], mask),)
    for k in tl.static_range(STATES - 1):
        at = place[2] + k * WIDE + place[3]
        keep = keep + (load_share(zone_c, zoneout, at, mask),)
    return keep


@triton.jit
def split_kept(keep, grads):
    """What of the gradients passes the cell by, and what is left for it."""
    kept = ()
    left = ()
    for i in tl.static_range(len(grads)):
        x = keep[i] * grads[i]
        kept = kept + (x,)
        left = left + (grads[i] - x,)
    return kept, left


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
def clip_gradients(states, clip):
    """Each cut to [-clip, clip] if there is a bound; NaN stays NaN."""
    cut = ()
    for i in tl.static_range(len(states)):
        x = states[i]
        if clip is not None:
            x = tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))
        cut = cut + (x,)
    return cut

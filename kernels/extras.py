"""What the sweeps can do beside a plain recurrence: lengths, resets, zoneout, dropout of h.

Each is switched on by the tensor that it needs. Without it, its code is not compiled.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Extras:
    """Extras of a sweep; each may be absent.

    Attributes:
        lengths: steps of each sequence of a uniform batch, int32 [B].
        reset: uint8 [D, N], whether a row's step begins anew.
        restart_h: [D, H], the state that it begins with, or None for zeros.
        restart_c: [D, H].
        zone_h: uint8 [N, D * H], whether a unit keeps its h in a row's step.
        zone_c: uint8 [N, D * H].
        zoneout: without such masks, how much of the old state is kept.
        drop: [D, B, H], factors of h on its way into the recurrent product.
        clip: bound of the gradients of the states from step to step.
    """

    lengths: Tensor | None = None
    reset: Tensor | None = None
    restart_h: Tensor | None = None
    restart_c: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    zoneout: float | None = None
    drop: Tensor | None = None
    clip: float | None = None

    @property
    def zoned(self) -> bool:
        """Whether a state is more than what the cell's step returns."""
        return self.zone_h is not None or self.zoneout is not None

    @property
    def feeds(self) -> bool:
        """Whether the product takes something else than h0 and the h that are put out."""
        return not (self.lengths is None and self.reset is None and self.drop is None)


def zeros_where_ragged(extras: Extras, *shape: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory that a sweep fills; zeros where it leaves out steps beyond a sequence's end."""
    make = torch.empty if extras.lengths is None else torch.zeros
    return make(shape, dtype=dtype, device=like.device)


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
def load_restart(restart, u, H: tl.constexpr):
    """The state [BLOCK_H, 1] that a new stretch begins with."""
    value = tl.zeros(u.shape, tl.float32)
    if restart is not None:
        value = tl.load(restart + u, mask=u < H, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_kept(zone, zoneout, at, mask):
    """How much of the old state a step keeps: a tile of 0 and 1, or a number for all."""
    if zone is not None:
        kept = tl.load(zone + at, mask=mask, other=0).to(tl.float32)
    else:
        kept = zoneout
    return kept


@triton.jit
def keep(new, old, kept):
    """`kept` of the old, the rest of the new; exactly the old where a mask says so."""
    if len(kept.shape) > 0:
        new = tl.where(kept != 0, old, new)
    else:
        new = new + kept * (old - new)
    return new


@triton.jit
def clip_gradient(x, clip):
    """Cut to [-clip, clip]; NaN stays NaN."""
    if clip is not None:
        x = tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))
    return x

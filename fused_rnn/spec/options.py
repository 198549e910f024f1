"""The options of a call that torch.nn's layers lack: variable lengths, resets, zoneout, and so on.

Everything random is drawn here, once for a call, so that all engines compute the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn.spec.cells import Cell
from fused_rnn.spec.context import exporting
from fused_rnn.spec.layer import LayerSpec, Options, OptionTensors

Draw = Callable[..., Tensor]  # (*shape, p, device) -> bool tensor, true with probability p


class CallOptions(NamedTuple):
    """The options of one layer's call, as a user states them.

    Attributes:
        lengths: steps of each sequence of a uniform batch, int64 [B].
        reset: whether a new segment begins at a row, bool [N].
        restart: what it begins with, h [D, R] and c [D, H] or None; by default zeros.
        zoneout: probability that a unit keeps its state.
        recurrent_dropout: probability that a unit is left out of the recurrent product.
        clip_recurrent_grad: bound of the gradient from step to step.
        return_cell_sequence: return c of all steps.
        training: draw the masks of zoneout and dropout; else take their expectation.
        generator: from which they are drawn; by default the device's own.
    """

    lengths: Tensor | None = None
    reset: Tensor | None = None
    restart: tuple[Tensor, Tensor | None] | None = None
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    clip_recurrent_grad: float | None = None
    return_cell_sequence: bool = False
    training: bool = True
    generator: torch.Generator | None = None

    def draw(self, *shape: int, p: float, device: torch.device) -> Tensor:
        """A mask, true with probability ``p``."""
        like = torch.empty((), dtype=torch.bool, device=device).expand(shape)
        # Not in place: vmap may want the masks different.
        return like.bernoulli(p, generator=self.generator)


NO_OPTIONS = CallOptions()


def undrawn(*shape: int, p: float, device: torch.device) -> Tensor:
    """In the place of :meth:`CallOptions.draw`, for who asks only whether there is a mask."""
    return torch.empty((), dtype=torch.bool, device=device).expand(shape)


def settle(
    options: CallOptions,
    cell: Cell,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    draw: Draw | None = None,
) -> tuple[Options | None, OptionTensors]:
    """What the options of a call come to; None if all is as in torch.nn.

    Args:
        options: the options.
        cell: the layer's cell.
        x: the layer's input, rows [N, I]; while it is traced [T, B, I].
        h0: initial hidden state [D, B, R].
        c0: initial cell state [D, B, H], or None.
        draw: draws the masks; by default :meth:`CallOptions.draw`.
    """
    lengths, reset, restart, zoneout, dropout, clip, cells, training, _ = options
    cells = cells and cell.has_c
    zoned, dropped = zoneout > 0, training and dropout > 0
    if not (torch.is_grad_enabled() or exporting()):
        clip = None  # there will be no gradient; an exported graph may see one later
    given = lengths is not None or reset is not None
    if not (given or zoned or dropped or cells or clip is not None):
        return None, OptionTensors()
    draw = draw or options.draw
    D, rows = h0.shape[0], x.shape[:-1]
    zone_h = zone_c = drop = None
    restart_h, restart_c = (None, None) if restart is None or reset is None else restart
    if zoned and training:
        zone_h = draw(*rows, D * h0.shape[-1], p=zoneout, device=x.device)
        if c0 is not None:
            zone_c = draw(*rows, D * c0.shape[-1], p=zoneout, device=x.device)
    if dropped:
        keep = 1.0 - dropout
        drop = draw(*h0.shape, p=keep, device=x.device).to(x.dtype).div_(keep)
    settled = Options(
        zoned=zoned,
        zoneout=0.0 if training else zoneout,
        clip=None if clip is None else float(clip),
        cells=cells,
    )
    return settled, OptionTensors(lengths, reset, restart_h, restart_c, zone_h, zone_c, drop)


def without_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Rows [T, B, I] or [T * B, I] with zeros beyond the lengths [B].

    What stands there may be NaN, and would be one in the products for the gradients of weights.
    """
    if lengths.shape[0] == 0:
        return x
    steps = x.unflatten(0, (-1, lengths.shape[0])) if x.dim() == 2 else x
    running = torch.arange(steps.shape[0], device=x.device)[:, None] < lengths
    return torch.where(running[..., None], steps, 0.0).view(x.shape)


def resets(spec: LayerSpec, options: OptionTensors) -> Tensor | None:
    """Rows [D, N] before which each direction takes up the restart state, in its own order.

    A segment that begins at step t ends the other direction's before step t - 1. Steps beyond a
    sequence's length count for nothing.
    """
    layout, reset = spec.layout, options.reset
    if reset is None:
        return None
    if options.lengths is not None:
        step = torch.arange(layout.T, device=reset.device)[:, None]
        reset = reset & (step < options.lengths).flatten()
    if spec.directions == 1:
        return reset[None]
    none = torch.zeros(layout.B, 1, dtype=torch.bool, device=reset.device)
    return torch.stack([reset, layout.previous(reset[:, None], none, reverse=True)[:, 0]])

"""What torch.nn's layers lack: variable lengths without packing, resets, zoneout, and the like.

Everything random is drawn here, once for a call, so that all backends compute the same.
"""

from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells import Cell
from fused_rnn.problem import Extras, Layer, Masks
from fused_rnn.tracing import exporting


def prepare(
    cell: Cell,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *,
    lengths: Tensor | None,
    reset: Tensor | None,
    restart: tuple[Tensor, Tensor | None] | None,
    zoneout: float,
    recurrent_dropout: float,
    clip_recurrent_grad: float | None,
    return_cell_sequence: bool,
    training: bool,
    generator: torch.Generator | None,
) -> tuple[Extras, Masks] | None:
    """The extras of one call of :func:`fused_rnn.functional.rnn_layer`, None if there are none."""
    zoned, dropped = zoneout > 0, training and recurrent_dropout > 0
    if not (torch.is_grad_enabled() or exporting()):
        clip_recurrent_grad = None  # there will be none; an exported graph may see one later
    tensors = lengths is not None or reset is not None
    if not (zoned or dropped or tensors or return_cell_sequence or clip_recurrent_grad is not None):
        return None
    D, steps = h0.shape[0], x.shape[:-1]
    zone_h = zone_c = drop = None
    restart_h, restart_c = (None, None) if restart is None or reset is None else restart

    def draw(*shape: int, p: float) -> Tensor:
        like = torch.empty((), dtype=torch.bool, device=x.device).expand(shape)
        return like.bernoulli(p, generator=generator)  # not in place: vmap may want them different

    if zoned and training:
        zone_h = draw(*steps, D * h0.shape[-1], p=zoneout)
        if c0 is not None:
            zone_c = draw(*steps, D * c0.shape[-1], p=zoneout)
    if dropped:
        keep = 1.0 - recurrent_dropout
        drop = draw(*h0.shape, p=keep).to(x.dtype).div_(keep)
    extras = Extras(
        zoned=zoned,
        zoneout=0.0 if training else zoneout,
        clip=None if clip_recurrent_grad is None else float(clip_recurrent_grad),
        cells=return_cell_sequence and cell.has_c,
    )
    return extras, Masks(lengths, reset, restart_h, restart_c, zone_h, zone_c, drop)


def without_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Rows [T, B, I] or [T * B, I] with zeros beyond the lengths [B].

    What stands there may be NaN, and would be one in the products for the gradients of weights.
    """
    if lengths.shape[0] == 0:
        return x
    steps = x.unflatten(0, (-1, lengths.shape[0])) if x.dim() == 2 else x
    on = torch.arange(steps.shape[0], device=x.device)[:, None] < lengths
    return torch.where(on[..., None], steps, 0.0).view(x.shape)


def resets(layer: Layer, masks: Masks) -> Tensor | None:
    """Rows [D, N] before which each direction takes up the restart state, in its own order.

    A stretch that begins at step t ends the other direction's before step t - 1. Steps beyond a
    sequence's length count for nothing.
    """
    rows, reset = layer.rows, masks.reset
    if reset is None:
        return None
    if masks.lengths is not None:
        reset = reset & running(layer, masks.lengths).flatten()
    if layer.directions == 1:
        return reset[None]
    none = torch.zeros(rows.B, 1, dtype=torch.bool, device=reset.device)
    return torch.stack([reset, rows.previous(reset[:, None], none, reverse=True)[:, 0]])


def running(layer: Layer, lengths: Tensor) -> Tensor:
    """Whether a sequence is running [T, B]."""
    return torch.arange(layer.rows.T, device=lengths.device)[:, None] < lengths


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is cut to [-bound, bound], element by element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.bound, ctx.bound), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def clip_gradient(x: Tensor, bound: float | None) -> Tensor:
    """Return ``x``; its gradient is cut to [-bound, bound] if ``bound`` is given."""
    found: Tensor = x if bound is None else _ClipGradient.apply(x, bound)
    return found

"""One recurrent layer as a function of tensors, whichever backend runs it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fused_rnn import extras, ops, transforms
from fused_rnn.cells import Cell
from fused_rnn.dispatch import Backend
from fused_rnn.ops import TracedRows
from fused_rnn.precision import autocast_dtype, without_autocast
from fused_rnn.problem import Extras, Layer, Masks, Outputs, Saved, Weights
from fused_rnn.rows import Rows
from fused_rnn.stretches import Stretches


def rnn_layer(
    cell: Cell,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    rows: Rows | TracedRows,
    backend: Backend = "auto",
    recompute: bool = False,
    *,
    from_zero: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    restart: tuple[Tensor, Tensor | None] | None = None,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    clip_recurrent_grad: float | None = None,
    return_cell_sequence: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Outputs:
    """Run one recurrent layer over a batch of sequences.

    Under autocast everything is computed in the autocast dtype. (``nn.LSTM`` takes fp16 on a GPU,
    even where autocast is set to bf16.)
    What the keywords mean is told in :class:`fused_rnn.FusedLSTM`.

    Args:
        cell: one of :mod:`fused_rnn.cells`.
        x: input rows [N, I] in order of time, see :class:`fused_rnn.rows.Rows`.
        h0: initial hidden state [D, B, R], with R the projection size or else H.
        c0: initial cell state [D, B, H], or None for a cell without one.
        weights: parameters of each of the D directions; the second one sweeps in reverse.
        rows: where the rows of each time step lie.
        backend: "auto", "triton", "cpu", "native" (torch.nn's own kernels) or "eager".
        recompute: save only the states for backward and compute the gates a second time.
        from_zero: the initial states are zeros; saves a product in backward.
        lengths: steps of each sequence of a uniform batch, int64 [B].
        reset: whether a new stretch begins at a row, bool [N].
        restart: what it begins with, h [D, R] and c [D, H] or None; by default zeros.
        zoneout: probability that a unit keeps its state.
        recurrent_dropout: probability that a unit is left out of the recurrent product.
        clip_recurrent_grad: bound of the gradient from step to step.
        return_cell_sequence: return c of all steps.
        training: draw the masks of zoneout and dropout; else take their expectation.
        generator: from which they are drawn; by default the device's own.

    Returns:
        out [N, D*R], h_n [D, B, R], c_n [D, B, H] or None, c_seq [N, D*H] or None

    Raises:
        RuntimeError: ``backend`` cannot run this layer.
        ValueError: ``backend`` is not a backend's name.
    """
    more: Extras | None = None
    masks: Saved = ()
    with_tensors = lengths is not None or reset is not None
    if with_tensors or zoneout or recurrent_dropout or return_cell_sequence or clip_recurrent_grad:
        found = extras.prepare(
            cell,
            x,
            h0,
            c0,
            lengths=lengths,
            reset=reset,
            restart=restart,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            clip_recurrent_grad=clip_recurrent_grad,
            return_cell_sequence=return_cell_sequence,
            training=training,
            generator=generator,
        )
        if found is not None:
            more, masks = found
        if lengths is not None:
            x = extras.without_padding(x, lengths)
    inputs = (x, h0, c0, *[p for w in weights for p in w], *masks)
    dtype = autocast_dtype(x)
    if dtype is None:
        return _run(cell, rows, len(weights), recompute, more, inputs, backend, from_zero)
    inputs = tuple([t if t is None or not t.is_floating_point() else t.to(dtype) for t in inputs])
    with without_autocast(x.device):
        return _run(cell, rows, len(weights), recompute, more, inputs, backend, from_zero)


def _run(
    cell: Cell,
    rows: Rows | TracedRows,
    directions: int,
    recompute: bool,
    more: Extras | None,
    inputs: Saved,
    backend: Backend,
    from_zero: bool,
) -> Outputs:
    if isinstance(rows, TracedRows):
        return ops.run(cell.name, rows, directions, recompute, more, inputs, backend)
    if rows.B == 0:
        return _nothing(rows, directions, more, inputs)
    layer = Layer(cell, rows, directions, recompute, more, from_zero)
    if more is not None and backend in ("auto", "cpu", "native") and not transforms.active():
        found = _by_stretches(layer, inputs, backend)
        if found is not None:
            return found
    return transforms.run(layer, inputs, backend)


def _nothing(rows: Rows, directions: int, more: Extras | None, inputs: Saved) -> Outputs:
    """No steps at all, as in an empty batch: states stay, and all gradients but theirs are zeros.

    Zeros, not None, for everything that is differentiable.
    """
    x, h0, c0, *_ = inputs
    assert x is not None
    assert h0 is not None
    # Sums of no elements, so that a parameter that is not finite does no harm.
    tensors = [t for t in inputs if t is not None and t.is_floating_point()]
    zero = torch.stack([t.narrow(0, 0, 0).sum() for t in tensors]).sum()

    def rows_of(state: Tensor) -> Tensor:
        return x.new_zeros(rows.N, directions * state.shape[-1]) + zero

    cells = more is not None and more.cells and c0 is not None
    return Outputs(
        rows_of(h0),
        h0 + zero,
        None if c0 is None else c0 + zero,
        rows_of(c0) if cells and c0 is not None else None,
    )


def stretches_suit(layer: Layer, masks: Masks, device: torch.device) -> bool:
    """Whether :class:`fused_rnn.stretches.Stretches` do for a layer with extras.

    Of a uniform batch on a CPU, whose only extras are lengths and resets.
    """
    uniform = device.type == "cpu" and layer.rows.batch_sizes is None
    return uniform and layer.extras == Extras() and all([t is None for t in masks[4:]])


def restarts_suit(layer: Layer, masks: Masks) -> bool:
    """Whether resets are no more than other initial states: in a single step of all sequences."""
    return layer.rows.T == 1 and masks.lengths is None


def _restarted(state: Tensor, reset: Tensor | None, restart: Tensor | None) -> Tensor:
    """The initial state [D, B, .] of a single step, which the reverse direction takes as it is."""
    assert reset is not None
    again = state.new_zeros(()) if restart is None else restart[0]
    first = torch.where(reset[:, None], again, state[0])
    return torch.cat([first[None], state[1:]])


def _by_stretches(layer: Layer, inputs: Saved, backend: Backend) -> Outputs | None:
    """Lengths and resets on the CPU, if there are no other extras."""
    masks, rows = layer.masks(inputs), layer.rows
    x, h0, c0, *rest = inputs
    assert x is not None
    assert h0 is not None
    if not stretches_suit(layer, masks, x.device):
        return None
    plain = Layer(layer.cell, rows, layer.directions, layer.recompute)
    if restarts_suit(layer, masks):
        h0 = _restarted(h0, masks.reset, masks.restart_h)
        c0 = None if c0 is None else _restarted(c0, masks.reset, masks.restart_c)
        return transforms.run(plain, (x, h0, c0, *rest[: -len(masks)]), backend)
    stretches = Stretches.of(rows, masks)
    if stretches is None:
        return _nothing(rows, layer.directions, layer.extras, inputs)
    packed = (
        x[stretches.steps],
        stretches.initial(h0, masks.restart_h),
        None if c0 is None else stretches.initial(c0, masks.restart_c),
        *rest[: -len(masks)],
    )
    found = transforms.run(replace(plain, rows=stretches.rows), packed, backend)
    c_n = None
    if c0 is not None and found.c_n is not None:
        c_n = stretches.final(found.c_n, c0)
    return Outputs(stretches.spread(found.out, rows.N), stretches.final(found.h_n, h0), c_n)

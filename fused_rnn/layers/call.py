"""The description of a call: what the arguments come to, checked, for the stack and its layers.

The call itself and :func:`fused_rnn.explain` both begin here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.layers.checks import (
    check_dims,
    check_initial,
    check_input,
    check_kind,
    check_lengths,
    check_parameters,
    check_reset,
    check_states,
    lengths_of,
    packed_layout,
    packed_reset,
)
from fused_rnn.layers.parameters import RecurrentModule, States
from fused_rnn.ops import functional
from fused_rnn.spec.batch import BatchLayout, TracedLayout
from fused_rnn.spec.cells import Cell
from fused_rnn.spec.context import tracing
from fused_rnn.spec.layer import LayerInputs, LayerSpec, Weights
from fused_rnn.spec.options import NO_OPTIONS, CallOptions, Draw
from fused_rnn.spec.precision import autocast_dtype


class Padded(NamedTuple):
    """How a padded or unbatched input was laid out, and how its outputs are to be.

    Attributes:
        T: time steps; None while it is traced, when sequences are not cut into rows.
        B: sequences.
        batch_first: whether B comes before T.
        batched: whether there was a batch axis.
    """

    T: int | None
    B: int
    batch_first: bool
    batched: bool

    def restore(self, sequences: tuple[Tensor, ...], states: States) -> tuple[Any, ...]:
        """The first sequence, the final states, and the other sequences."""
        if self.T is not None:
            sequences = tuple([s.view(self.T, self.B, s.shape[-1]) for s in sequences])
        if self.batch_first:
            sequences = tuple([s.transpose(0, 1) for s in sequences])
        if not self.batched:
            sequences = tuple([s.squeeze(0 if self.batch_first else 1) for s in sequences])
            states = tuple([s.squeeze(1) for s in states])
        return sequences[0], states, *sequences[1:]


class Packed(NamedTuple):
    """How a PackedSequence was laid out, and how its outputs are to be.

    Attributes:
        batch_sizes: rows of each step, int64 [T].
        sorted_indices: its own, int64 [B], or None.
        unsorted_indices: its own, int64 [B], or None.
    """

    batch_sizes: Tensor
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None

    def restore(self, sequences: tuple[Tensor, ...], states: States) -> tuple[Any, ...]:
        """The first sequence, the final states, and the other sequences."""
        if self.unsorted_indices is not None:
            back = self.unsorted_indices
            states = tuple([s.index_select(1, back) for s in states])
        packed = [PackedSequence(s, *self) for s in sequences]
        return packed[0], states, *packed[1:]


class StackCall(NamedTuple):
    """What the layers of a stack are to compute.

    Attributes:
        x: input rows [N, I]; while it is traced [T, B, I].
        states: initial states [L*D, B, .], h or h and c, in the order of the rows; c stands for all
            states beside h, see :mod:`fused_rnn.spec.layer`.
        layout: where the rows of each time step lie.
        weights: the parameters by layer and direction.
        learned: the learned initial states [L*D, .], likewise, if the call needs any.
        lengths: steps of each sequence of a uniform batch, int64 [B], or None.
        reset: whether a new segment begins at a row, bool [N], or None.
        cells: whether c of all steps of the last layer is an output.
        from_zero: whether the initial h is zeros.
        dtype: in which all is computed under autocast, else None.
        shape: how the outputs are to be laid out.
    """

    x: Tensor
    states: States
    layout: BatchLayout | TracedLayout
    weights: list[list[Weights]]
    learned: States | None
    lengths: Tensor | None
    reset: Tensor | None
    cells: bool
    from_zero: bool
    dtype: torch.dtype | None
    shape: Padded | Packed


def describe(
    module: RecurrentModule,
    input: Any,
    hx: Any,
    lengths: Tensor | None,
    reset: Any,
    mask: Any,
    cells: bool,
) -> StackCall:
    """Check the arguments of a call, and say what they come to.

    Args:
        module: the stack.
        input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a PackedSequence.
        hx: (h,) or (h, c), or None.
        lengths: steps of each sequence, int64 [B], or None.
        reset: bool, as the input is laid out, or None.
        mask: bool, as the input is laid out, or None.
        cells: whether c of all steps is asked for.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a value, a dtype or a combination is wrong.
        RuntimeError: a size, a device or a parameter is wrong, as in torch.nn.
    """
    if not isinstance(input, (Tensor, PackedSequence)):
        kind = type(input).__name__
        raise TypeError(f"input should be a tensor or a PackedSequence, got {kind}")
    if hx is not None:
        check_states(hx, module._cell)
    if isinstance(input, PackedSequence):
        return _packed(module, input, hx, lengths, reset, mask, cells)
    return _padded(module, input, hx, lengths, reset, mask, cells)


def _padded(
    module: RecurrentModule,
    input: Tensor,
    hx: States | None,
    lengths: Tensor | None,
    reset: Any,
    mask: Any,
    cells: bool,
) -> StackCall:
    if input.dim() not in (2, 3):
        suffix = " tensor instead" if module.mode.startswith("RNN") else " instead"
        name = type(module).__name__.removeprefix("Fused")
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{suffix}")
    batched, batch_first, traced = input.dim() == 3, module.batch_first, tracing()
    if hx is not None:
        check_dims(hx, batched)
    if not batched:
        input = input.unsqueeze(0 if batch_first else 1)
        hx = None if hx is None else tuple([s.unsqueeze(1) for s in hx])
    weights = module._weights()
    w_ih = weights[0][0].w_ih
    check_input(input, w_ih, module.input_size, batch_first, packed=False)
    check_parameters(input, module._sizes.names, weights)
    x = input.transpose(0, 1) if batch_first else input
    T, B, _ = x.shape
    if mask is not None:
        if lengths is not None:
            raise ValueError("lengths and mask say the same: give one of them")
        lengths = lengths_of(_by_step(module, mask, x, batched, "mask"))
    if lengths is not None:
        check_lengths(lengths, x, batched, "lengths" if mask is None else "mask")
    if reset is not None:
        reset = _by_step(module, reset, x, batched, "reset")
        reset = reset if traced else reset.reshape(T * B)
    if hx is not None:
        check_initial(x, hx, module._sizes.states, B, module._sizes.widths)
        hx = beside(hx)
    learned = _learned(module, hx, reset, w_ih)
    states = _zeros_or(learned, module, x, B) if hx is None else hx
    layout: BatchLayout | TracedLayout = BatchLayout(T, B)
    if traced:  # the operators take the batch as it is
        layout = TracedLayout(B)
    else:
        x = x.reshape(T * B, x.shape[-1])
    shape = Padded(None if traced else T, B, batch_first, batched)
    zero = hx is None and learned is None and not module._cell.initial[0]
    dtype = autocast_dtype(x)
    return StackCall(x, states, layout, weights, learned, lengths, reset, cells, zero, dtype, shape)


def _packed(
    module: RecurrentModule,
    input: PackedSequence,
    hx: States | None,
    lengths: Tensor | None,
    reset: Any,
    mask: Any,
    cells: bool,
) -> StackCall:
    x, batch_sizes, sorted_indices, unsorted_indices = input
    weights = module._weights()
    w_ih = weights[0][0].w_ih
    check_input(x, w_ih, module.input_size, module.batch_first, packed=True)
    check_parameters(x, module._sizes.names, weights)
    reset = None if reset is None else packed_reset(input, reset)
    if lengths is not None or mask is not None:
        name = "mask" if lengths is None else "lengths"
        raise ValueError(f"{name}: only for padded input; a PackedSequence has lengths itself")
    layout: BatchLayout | TracedLayout
    layout = TracedLayout.packed(input, hx) if tracing() else packed_layout(input)
    if hx is not None:
        check_initial(x, hx, module._sizes.states, layout.B, module._sizes.widths)
        if sorted_indices is not None:
            hx = tuple([s.index_select(1, sorted_indices) for s in hx])
        hx = beside(hx)
    learned = _learned(module, hx, reset, w_ih)
    states = _zeros_or(learned, module, x, layout.B) if hx is None else hx
    shape = Packed(batch_sizes, sorted_indices, unsorted_indices)
    zero = hx is None and learned is None and not module._cell.initial[0]
    dtype = autocast_dtype(x)
    return StackCall(x, states, layout, weights, learned, None, reset, cells, zero, dtype, shape)


def _by_step(module: RecurrentModule, mask: Any, x: Tensor, batched: bool, name: str) -> Tensor:
    """``mask``, laid out as the input is, as [T, B]; checked against ``x`` [T, B, I]."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} should be a bool tensor, as input, got {type(mask).__name__}")
    T, B, _ = x.shape
    size = ((B, T) if module.batch_first else (T, B)) if batched else (T,)
    check_reset(mask, x, size, name)
    if not batched:
        return mask.unsqueeze(-1)
    return mask.transpose(0, 1) if module.batch_first else mask


def _learned(
    module: RecurrentModule, hx: States | None, reset: Tensor | None, like: Tensor
) -> States | None:
    """The learned initial states [L*D, .] if this call needs any; read once, as weights are."""
    if not module.learn_h0 or (hx is not None and reset is None):
        return None
    learned = []
    for name, width in zip(module._initial_names, module._sizes.widths, strict=True):
        learned.append(module.read_parameter(name, (module._sizes.states, width)))
        check_kind(name, learned[-1], like, autocast_dtype(like) is not None)
    return beside(tuple(learned))


def beside(states: States) -> States:
    """``(h, c)`` of the states of a cell: c are all those beside h, one after the other."""
    return states if len(states) < 3 else (states[0], torch.cat(states[1:], -1))


def taken_apart(states: States, cell: Cell) -> States:
    """The inverse of :func:`beside`."""
    K = len(cell.states) - 1
    if K < 2:
        return states
    return (states[0], *states[1].unflatten(-1, (K, -1)).unbind(-2))


def each_state(sequence: Tensor, cell: Cell, directions: int) -> States:
    """Of c of all steps [.., D*K*H] each state's sequence [.., D*H]."""
    K = len(cell.states) - 1
    if K == 1:
        return (sequence,)
    by_state = sequence.unflatten(-1, (directions, K, -1)).unbind(-2)
    return tuple([s.flatten(-2) for s in by_state])


def _zeros_or(learned: States | None, module: RecurrentModule, x: Tensor, B: int) -> States:
    """The initial states where none are given."""
    if learned is not None:
        return tuple([s[:, None].expand(-1, B, -1).to(x.dtype) for s in learned])
    _, _, rows, widths = module._sizes
    if any(module._cell.initial):
        pairs = zip(module._cell.initial, widths, strict=True)
        return beside(tuple([x.new_full((rows, B, width), value) for value, width in pairs]))
    if len(widths) == 2 and widths[0] == widths[1]:  # one call for both
        return x.new_zeros(2, rows, B, widths[0]).unbind()
    return tuple([x.new_zeros(rows, B, w) for w in (widths[0], sum(widths[1:])) if w])


def describe_layer(
    module: RecurrentModule, call: StackCall, number: int, x: Tensor, draw: Draw | None = None
) -> tuple[LayerSpec, LayerInputs]:
    """What one layer of the stack is to compute of ``x``.

    Args:
        module: the stack.
        call: its call.
        number: of the layer, from 0 at the input.
        x: the layer's input rows.
        draw: draws the masks of zoneout and dropout; by default at random.
    """
    D = module._directions
    mine = slice(number * D, (number + 1) * D)
    states = call.states if module.num_layers == 1 else tuple([s[mine] for s in call.states])
    cells = call.cells and number == module.num_layers - 1
    options = NO_OPTIONS
    if (
        call.lengths is not None
        or call.reset is not None
        or cells
        or module.zoneout
        or module.recurrent_dropout
        or module.clip_recurrent_grad is not None
    ):
        restart = None
        if call.reset is not None and (call.learned is not None or any(module._cell.initial)):
            first = call.learned or [s[:, 0] for s in _zeros_or(None, module, x, 1)]
            first = [s[mine].to(x.dtype) for s in first]
            restart = (first[0], first[1] if len(first) == 2 else None)
        options = CallOptions(
            call.lengths,
            call.reset,
            restart,
            module.zoneout,
            module.recurrent_dropout,
            module.clip_recurrent_grad,
            cells,
            module.training,
        )
    return functional.describe(
        module._cell,
        x,
        states[0],
        states[1] if len(states) == 2 else None,
        call.weights[number],
        call.layout,
        recompute=module.recompute,
        from_zero=call.from_zero,
        options=options,
        dtype=call.dtype,
        draw=draw,
    )

"""What a call of a layer does: the stack of its layers, bottom up; and the layer of any cell."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.engines.dispatch import Backend
from fused_rnn.engines.wavefront.stack import StackLayer, Wavefront
from fused_rnn.kernels.launch import LaunchRefused
from fused_rnn.layers import recording, whole_stack
from fused_rnn.layers.call import StackCall, describe, describe_layer, each_state, taken_apart
from fused_rnn.layers.parameters import RecurrentModule, States
from fused_rnn.ops import functional, operators
from fused_rnn.spec.batch import TracedLayout
from fused_rnn.spec.cells import Cell
from fused_rnn.spec.context import tracing
from fused_rnn.spec.layer import LayerInputs, LayerSpec
from fused_rnn.spec.precision import without_autocast


class FusedRNNBase(RecurrentModule):
    """The common part of FusedRNN, FusedGRU and FusedLSTM: a module whose layers run as a stack."""

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: States | None,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
        return_cell_sequence: bool = False,
    ) -> tuple[Any, ...]:
        """``output``, the final states, and c of all steps if it is asked for."""
        if recording.recording(input):
            keywords = {"lengths": lengths, "reset": reset, "mask": mask}
            return recording.record(self, input, hx, keywords, return_cell_sequence)
        options = lengths is not None or reset is not None or mask is not None
        if not (options or return_cell_sequence or tracing()):
            prepared = whole_stack.prepare(self, input, hx)
            if prepared is not None:
                return whole_stack.call(self, input, prepared)
        call = describe(self, input, hx, lengths, reset, mask, return_cell_sequence)
        sequences, states = run_stack(self, call)
        return call.shape.restore(sequences, states)


def run_stack(module: RecurrentModule, call: StackCall) -> tuple[tuple[Tensor, ...], States]:
    """All layers, bottom up: the output rows [N, D*R] of the last one, and the final states.

    Where they are asked for, the other states of all steps [N, D*H] stand behind the output.
    """
    x, last = call.x, module.num_layers - 1
    finals: list[States] = []
    with nullcontext() if call.dtype is None else without_autocast(x.device):
        for number in range(module.num_layers):
            spec, inputs = describe_layer(module, call, number, x)
            route = None
            if number == 0 and last > 0 and isinstance(spec.layout, TracedLayout):
                if functional.traced_together(spec, inputs, module.backend, call.cells):
                    return _as_one_operator(module, call, (spec, inputs))
            elif number == 0 and last > 0:
                route = functional.route_of(spec, inputs, module.backend)
                together = _overlapping(module, call, route)
                if together is not None:
                    return together
            out, h_n, c_n, c_seq = functional.run(spec, inputs, module.backend, route)
            finals.append((h_n,) if c_n is None else (h_n, c_n))
            x = out
            if module.dropout > 0 and number < last:
                x = F.dropout(x, module.dropout, module.training)
    cell = module._cell
    sequences = (x,) if c_seq is None else (x, *each_state(c_seq, cell, module._directions))
    states = finals[0]
    if last > 0:
        states = tuple([torch.cat(same) for same in zip(*finals, strict=True)])
    return sequences, taken_apart(states, cell)


def _overlapping(
    module: RecurrentModule, call: StackCall, route: functional.Route
) -> tuple[tuple[Tensor, ...], States] | None:
    """What :func:`run_stack` returns, of layers that overlap in time; None if they do not."""
    wave = wavefront_of(module, call, route)
    if isinstance(wave, str):
        return None
    above = _layers_above(module, call)
    layers = [StackLayer(*layer) for layer in [(route.spec, route.inputs), *above]]
    try:
        out, h_n, c_n, _ = functional.run_stack(wave, layers)
    except LaunchRefused:  # layer by layer smaller plans are tried
        return None
    return (out,), taken_apart((h_n,) if c_n is None else (h_n, c_n), module._cell)


def _layers_above(module: RecurrentModule, call: StackCall) -> list[tuple[LayerSpec, LayerInputs]]:
    """What all layers but the first are to compute; x stands for nothing."""
    like = call.x.new_empty(0, *call.x.shape[1:-1], module.hidden_size)
    return [describe_layer(module, call, n, like) for n in range(1, module.num_layers)]


def _as_one_operator(
    module: RecurrentModule, call: StackCall, first: tuple[LayerSpec, LayerInputs]
) -> tuple[tuple[Tensor, ...], States]:
    """What :func:`run_stack` returns, traced; whether layers overlap is decided when it runs."""
    masks, p = [], module.dropout if module.training else 0.0
    if p > 0:
        ones = first[1].x.new_ones(*call.x.shape[:-1], module.hidden_size)
        masks = [F.dropout(ones, p, True) != 0 for _ in range(module.num_layers - 1)]
    layers = [first, *_layers_above(module, call)]
    out, h_n, c_n, _ = operators.run(layers, module.backend, masks, p)
    return (out,), taken_apart((h_n,) if c_n is None else (h_n, c_n), module._cell)


def wavefront_of(
    module: RecurrentModule, call: StackCall, route: functional.Route
) -> Wavefront | str:
    """How the layers of a call overlap, the first going by ``route``; or why they do not."""
    record = torch.is_grad_enabled() and any(
        [t is not None and t.requires_grad for t in (call.x, *call.states, *(call.learned or ()))]
        + [t is not None and t.requires_grad for layer in call.weights for d in layer for t in d]
    )
    dropout = module.dropout if module.training else 0.0
    stack = module.num_layers, dropout, record, call.cells
    return functional.wavefront_of(route, module.backend, *stack)


class FusedRecurrent(FusedRNNBase):
    """A stack of recurrent layers of any cell.

    A layer has the parameters ``weight_ih_l0`` [G*H, I], ``weight_hh_l0`` [G*H, H] and two biases
    [G*H], their rows by gate in the cell's order and then by unit, and a vector [H] ``<name>_l0``
    for each of the cell's own parameters; those of the second direction end in ``_reverse``. The
    cell's step says what it computes, see :func:`fused_rnn.cell`.

    Args:
        cell: what :func:`fused_rnn.cell` made, or one of :mod:`fused_rnn.cells`.
        input_size: features I of the input.
        hidden_size: features H of each state.
        num_layers: layers L, each of which takes the output of the one before it.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether batched tensors are [B, T, .], not [T, B, .]; states are not concerned.
        dropout: probability, in [0, 1], with which the output of each layer but the last is dropped
            in training.
        bidirectional: whether a second direction sweeps from the last step to the first; D is 2
            then, else 1.
        device: of the parameters; by default PyTorch's own.
        dtype: of the parameters; by default PyTorch's own.
        backend: "auto" (what is fastest, see :func:`fused_rnn.explain`), "triton", "cpu" or
            "eager"; one that cannot run is an error at the call.
        recompute: save only the states for backward and compute the gates a second time.
        zoneout: probability, in [0, 1), that a unit keeps a state for a step
            (Krueger et al. 2017, arXiv:1606.01305); without training, the expectation is taken.
        recurrent_dropout: probability, in [0, 1), that a unit of h is left out of the recurrent
            product, the same ones at all steps (Gal and Ghahramani 2016, arXiv:1512.05287); only in
            training.
        learn_h0: own the initial states as parameters [L*D, H], ``h_0`` and so on by the states'
            names, at first what the cell says; they stand in for ``hx`` where it is not given.
        clip_recurrent_grad: cut the gradient that a step passes to the states before it to
            [-value, value], element by element; None to leave it.
        heads: blocks k on the diagonal of the recurrent weights: each k-th part of h enters its own
            part of the gates alone. k divides H, and ``weight_hh`` are [k, G*H/k, H/k] for k > 1,
            each block by gate and unit.

    Inputs:
        **input**: [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched) or a PackedSequence,
        in the parameters' dtype (under autocast in any) and on their device.

        **hx**: the initial states in the cell's order, a tuple of [L*D, B, H] ([L*D, H] unbatched),
        or the only one; by default what the cell says, or the learned.

        **lengths**, **mask**, **reset** (keywords): as :class:`fused_rnn.FusedGRU` has them.

        **return_state_sequences** (keyword): return, third, the states beside h of all steps.

    Outputs:
        **output**: h of all steps of the last layer [T, B, D*H], laid out as the input is; the
        final states in the cell's order, a tuple of [L*D, B, H], or the only one; if it is asked
        for, a tuple of the other states of all steps, each laid out as the output.

    Raises:
        TypeError: an argument, of the constructor or of a call, is of a wrong type.
        ValueError: a value, a dtype or a combination of arguments is wrong.
        RuntimeError: a size or a device does not fit, or ``backend`` cannot run the layer.

    Example:
        >>> from fused_rnn import FusedRecurrent
        >>> from fused_rnn.cells import slstm
        >>> layer = FusedRecurrent(slstm, 10, 24, num_layers=2, heads=4)
        >>> output, (h, c, n, m) = layer(torch.randn(5, 3, 10))
        >>> output.shape, m.shape, layer.weight_hh_l1.shape
        (torch.Size([5, 3, 24]), torch.Size([2, 3, 24]), torch.Size([4, 24, 6]))
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
        recompute: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        learn_h0: bool = False,
        clip_recurrent_grad: float | None = None,
        heads: int = 1,
    ) -> None:
        if not isinstance(cell, Cell):
            raise TypeError(f"cell should be made by fused_rnn.cell, got {type(cell).__name__}")
        super().__init__(
            cell,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            recompute=recompute,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            learn_h0=learn_h0,
            clip_recurrent_grad=clip_recurrent_grad,
            heads=heads,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | States | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
        return_state_sequences: bool = False,
    ) -> Any:
        """Return ``output`` [T, B, D*H], laid out as the input is, and the final states.

        Args:
            input: [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched) or packed.
            hx: initial states [L*D, B, H], a tuple or the only one; by default as the cell says.
            lengths: steps of each sequence of a padded batch, int64 or int32 [B].
            reset: bool, as the input is laid out: steps at which a new segment begins.
            mask: bool, as the input is laid out: the steps of each sequence, in place of lengths.
            return_state_sequences: return, third, a tuple of the states beside h of all steps.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: a value, a dtype or a combination of arguments is wrong.
            RuntimeError: a size or a device does not fit, or ``backend`` cannot run the layer.
        """
        alone = len(self._cell.states) == 1
        given: Any = (hx,) if alone and hx is not None else hx
        wanted = return_state_sequences and not alone
        output, states, *others = self._run(input, given, lengths, reset, mask, wanted)
        final = states[0] if alone else states
        return (output, final, tuple(others)) if return_state_sequences else (output, final)

    if TYPE_CHECKING:  # so that a call of the module has the types of forward
        __call__ = forward

    def extra_repr(self) -> str:
        """The cell, and what torch.nn's layers show."""
        return f"{self._cell.name}, {super().extra_repr()}"

"""Checks of what a user passes: torch.nn's, in its order and words, and those of the options."""

import numbers
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.cells import Cell
from fused_rnn.spec.context import readable, tracing
from fused_rnn.spec.layer import Weights
from fused_rnn.spec.precision import autocast_dtype


def check_options(
    recompute: Any, zoneout: Any, recurrent_dropout: Any, learn_h0: Any, clip: Any
) -> None:
    """Raise TypeError or ValueError for what the constructor cannot take."""
    for name, value in (("recompute", recompute), ("learn_h0", learn_h0)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    for name, value in (("zoneout", zoneout), ("recurrent_dropout", recurrent_dropout)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name} should be a number, got: {type(value).__name__}")
        if not 0 <= value < 1:
            raise ValueError(f"{name} should be a number in range [0, 1), got {value}")
    if clip is not None:
        if not isinstance(clip, (int, float)) or isinstance(clip, bool):
            kind = type(clip).__name__
            raise TypeError(f"clip_recurrent_grad should be a number or None, got: {kind}")
        if not clip > 0:
            raise ValueError(f"clip_recurrent_grad should be greater than zero, got {clip}")


def check_heads(heads: Any, hidden_size: int, proj_size: int) -> None:
    """Raise TypeError or ValueError unless the hidden units can be cut into ``heads``."""
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"heads should be of type int, got: {type(heads).__name__}")
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"heads should divide hidden_size={hidden_size}, got {heads}")
    if heads > 1 and proj_size:
        raise ValueError(f"heads={heads} cannot be combined with proj_size={proj_size}")


def check_states(hx: Any, cell: Cell) -> None:
    """Raise unless ``hx`` is a tensor for each state of a cell.

    A single state comes as a tuple of itself.

    Raises:
        RuntimeError: torch.nn's, for another number of states.
        TypeError: they are no tensors.
    """
    names = cell.states
    several = len(names) > 1
    pair = f"a tuple ({', '.join([f'{name}_0' for name in names])}) of tensors"
    if several and not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx should be {pair}, got {type(hx).__name__}")
    if several and len(hx) != len(names):
        if cell.torch is not None:
            raise RuntimeError("lstm expects two hidden states")
        raise RuntimeError(f"hx should be {pair}, got {len(hx)}")
    if not all([isinstance(s, Tensor) for s in hx]):
        kinds = [type(s).__name__ for s in hx]
        if several:
            raise TypeError(f"hx should be {pair}, got {kinds}")
        raise TypeError(f"hx should be a tensor, got {kinds[0]}")


def check_kind(name: str, tensor: Tensor, like: Tensor, autocast: bool) -> None:
    """Raise unless the parameter ``name`` has the dtype and device of weight_ih_l0, ``like``.

    Under autocast types may differ, but fp64, which it leaves alone.
    """
    dtypes = tensor.dtype, like.dtype
    if dtypes[0] != dtypes[1] and not (autocast and torch.float64 not in dtypes):
        raise RuntimeError(
            f"The parameters should have one dtype, but {name} has {dtypes[0]} and weight_ih_l0 "
            f"{dtypes[1]}"
        )
    if tensor.device != like.device:
        raise RuntimeError(
            f"The parameters should be on one device, but {name} is on {tensor.device} and "
            f"weight_ih_l0 on {like.device}"
        )


def packed_layout(input: PackedSequence) -> BatchLayout:
    """Where the rows of ``input`` lie.

    Raises:
        RuntimeError: its parts contradict each other.
    """
    layout, N = BatchLayout.packed(input.batch_sizes), input.data.size(0)
    if layout.N != N:
        raise RuntimeError(f"batch_sizes stand for {layout.N} rows, but the data has {N}")
    for name, indices in (
        ("sorted_indices", input.sorted_indices),
        ("unsorted_indices", input.unsorted_indices),
    ):
        if indices is not None and indices.shape != (layout.B,):
            raise RuntimeError(
                f"{name} should be of size {(layout.B,)}, as batch_sizes begin, "
                f"got {tuple(indices.shape)}"
            )
    return layout


def check_lengths(lengths: Tensor, x: Tensor, batched: bool, name: str) -> None:
    """Raise unless ``lengths`` [B], given as the argument ``name``, fits the input ``x`` [T, B, I].

    On a GPU its values are not looked at, which would wait for it.
    """
    T, B, _ = x.shape
    if not batched:
        raise ValueError(f"{name}: only for batched input; cut the one sequence instead")
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths should be a tensor of int64 or int32, got {kind}")
    if lengths.shape != (B,):
        raise RuntimeError(f"Expected lengths of size {(B,)}, got {tuple(lengths.shape)}")
    if lengths.device != x.device:
        raise RuntimeError(
            "Input and lengths are not at the same device, found input tensor at "
            f"{x.device} and lengths at {lengths.device}"
        )
    if B and readable(lengths.device):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > T:
            raise ValueError(f"lengths should be from 0 to {T}, got {low} to {high}")


def lengths_of(mask: Tensor) -> Tensor:
    """How many steps come before the first that ``mask`` [T, B] leaves out, int64 [B].

    On a GPU the steps behind it are not looked at, which would wait for it.

    Raises:
        ValueError: steps that count come behind it.
    """
    step = torch.arange(mask.shape[0], device=mask.device)[:, None]
    lengths = torch.where(mask, mask.shape[0], step).amin(0)
    if readable(mask.device):
        gaps = (mask.sum(0) != lengths).nonzero().flatten().tolist()
        if gaps:
            raise ValueError(
                f"mask should be true up to a step and false from it, not so in {gaps}"
            )
    return lengths


def check_reset(reset: Tensor, x: Tensor, steps: tuple[int, ...], name: str = "reset") -> None:
    """Raise unless ``reset`` is of the size ``steps``, one for each of the input ``x``.

    ``name`` is what it is called in the message.
    """
    if reset.dtype != torch.bool:
        raise TypeError(f"{name} should be a tensor of bool, got {reset.dtype}")
    if reset.shape != steps:
        raise RuntimeError(f"Expected {name} of size {steps}, got {tuple(reset.shape)}")
    if reset.device != x.device:
        raise RuntimeError(
            f"Input and {name} are not at the same device, found input tensor at "
            f"{x.device} and {name} at {reset.device}"
        )


def packed_reset(input: PackedSequence, reset: Tensor | PackedSequence) -> Tensor:
    """``reset`` as [N], checked against the input."""
    if not isinstance(reset, PackedSequence):
        raise TypeError(f"reset should be packed as the input is, got {type(reset).__name__}")
    if not tracing() and not torch.equal(reset.batch_sizes, input.batch_sizes):
        raise RuntimeError(
            f"Expected reset with batch_sizes {input.batch_sizes.tolist()}, "
            f"got {reset.batch_sizes.tolist()}"
        )
    mine, theirs = reset.sorted_indices, input.sorted_indices
    known = mine is not None and theirs is not None and mine.device.type == "cpu"
    alike = torch.equal(mine, theirs) if known and not tracing() else True  # type: ignore[arg-type]
    if (mine is None) != (theirs is None) or not alike:
        raise RuntimeError("Expected reset with the sequences sorted as those of the input")
    check_reset(reset.data, input.data, tuple(input.data.shape[:-1]))
    return reset.data


def check_arguments(
    input_size: int,
    hidden_size: int,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    proj_size: int,
) -> None:
    """torch.nn's checks of the constructor's arguments, in its order and words."""
    number = isinstance(dropout, numbers.Number) and not isinstance(dropout, bool)
    if not number or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] "
            "representing the probability of an element being zeroed"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
            f"expects num_layers greater than 1, but got dropout={dropout} and "
            f"num_layers={num_layers}",
            stacklevel=4,
        )
    types: list[tuple[str, Any, type]] = [
        ("bias", bias, bool),
        ("batch_first", batch_first, bool),
        ("input_size", input_size, int),
        ("hidden_size", hidden_size, int),
    ]
    for name, value, kind in types:
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} should be of type {kind.__name__}, got: {type(value).__name__}"
            )
    for name, value in (
        ("input_size", input_size),
        ("hidden_size", hidden_size),
        ("num_layers", num_layers),
    ):
        if value <= 0:
            raise ValueError(f"{name} must be greater than zero")
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if proj_size >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")


def check_input(
    input: Tensor, weight: Tensor, input_size: int, batch_first: bool, packed: bool
) -> None:
    """Raise torch.nn's error for an input that does not fit.

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, or packed [N, I].
        weight: weight_ih_l0.
        input_size: I.
        batch_first: whether B comes before T.
        packed: whether the input is the data of a PackedSequence.
    """
    if input.dtype != weight.dtype and (
        autocast_dtype(input) is None or weight.dtype == torch.float64
    ):
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), "
            f"or convert model: model.to({input.dtype})"
        )
    dims = 2 if packed else 3
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if input_size != input.size(-1):
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {input.size(-1)}"
        )
    if input.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{input.device} and parameter tensor at {weight.device}"
        )
    if input.size(1 if dims == 3 and batch_first else 0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def check_parameters(input: Tensor, names: list[str], weights: list[list[Weights]]) -> None:
    """Raise RuntimeError unless the parameters are of one kind; ``input`` tells of autocast."""
    like = weights[0][0].w_ih
    dtype, device = like.dtype, like.device
    tensors = [t for layer in weights for w in layer for t in w if t is not None]
    if all([t.dtype == dtype and t.device == device for t in tensors]):
        return
    for name, tensor in zip(names, tensors, strict=True):
        check_kind(name, tensor, like, autocast_dtype(input) is not None)


def check_initial(
    input: Tensor, states: tuple[Tensor, ...], rows: int, B: int, widths: list[int]
) -> None:
    """Raise torch.nn's error unless the initial states [L*D, B, .] go with the input.

    Args:
        input: any tensor of the input's dtype and device.
        states: h, or h and c.
        rows: L*D.
        B: sequences.
        widths: of the states.
    """
    names = [f"hidden[{i}]" for i in range(len(states))] if len(states) > 1 else ["hidden"]
    autocast = autocast_dtype(input) is not None
    for name, state, width in zip(names, states, widths, strict=True):
        expected = (rows, B, width)
        if state.size() != expected:
            raise RuntimeError(f"Expected {name} size {expected}, got {list(state.size())}")
        if state.device != input.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{input.device} and hidden tensor at {state.device}"
            )
        if state.dtype != input.dtype and not (autocast and state.dtype != torch.float64):
            raise RuntimeError(
                "Input and hidden tensors are not the same dtype, found input tensor with "
                f"{input.dtype} and hidden tensor with {state.dtype}"
            )


def check_dims(states: tuple[Tensor, ...], batched: bool) -> None:
    """Raise torch.nn's error unless the states are 3-D, or 2-D for unbatched input."""
    want = 3 if batched else 2
    if all([s.dim() == want for s in states]):
        return
    kind = "batched 3-D" if batched else "unbatched 2-D"
    dims = [f"{s.dim()}-D" for s in states]
    if len(states) > 2:
        raise RuntimeError(
            f"For {kind} input, the states in hx should also be {want}-D "
            f"but got ({', '.join(dims)}) tensors"
        )
    if len(states) == 2:
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {want}-D "
            f"but got ({dims[0]}, {dims[1]}) tensors"
        )
    raise RuntimeError(f"For {kind} input, hx should also be {want}-D but got {dims[0]} tensor")

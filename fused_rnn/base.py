"""What the three layers share: parameters, checks, packing, the stack of layers."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import cells, graphs, native_stack, ops
from fused_rnn.cells import Cell
from fused_rnn.checks import (
    check_arguments,
    check_extras,
    check_kind,
    check_lengths,
    check_reset,
    check_states,
    lengths_of,
    packed_reset,
    packed_rows,
)
from fused_rnn.dispatch import Backend, check_backend
from fused_rnn.functional import rnn_layer
from fused_rnn.ops import TracedRows
from fused_rnn.precision import autocast_dtype
from fused_rnn.problem import Weights
from fused_rnn.rows import Rows

States = tuple[Tensor, ...]  # (h,) or (h, c), each [L*D, B, .]


class FusedRNNBase(nn.Module):
    """The common part of FusedRNN, FusedGRU and FusedLSTM.

    It is no subclass of ``nn.RNNBase``: Dynamo refuses to trace those. So ``isinstance(layer,
    nn.RNNBase)`` is False; what code for torch.nn's layers calls or reads is here all the same.
    """

    __jit_unused_properties__ = (
        "_all_weights",
        "_cell",
        "_directions",
        "_flat_weights",
        "_flat_weights_names",
        "_state_widths",
        "all_weights",
    )

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    backend: Backend
    recompute: bool
    zoneout: float
    recurrent_dropout: float
    learn_h0: bool
    clip_recurrent_grad: float | None

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
        recompute: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        learn_h0: bool = False,
        clip_recurrent_grad: float | None = None,
    ) -> None:
        super().__init__()
        self.dropout = float(dropout)
        check_arguments(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        check_backend(backend)
        check_extras(recompute, zoneout, recurrent_dropout, learn_h0, clip_recurrent_grad)
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.backend = backend
        self.recompute = recompute
        self.zoneout = float(zoneout)
        self.recurrent_dropout = float(recurrent_dropout)
        self.learn_h0 = learn_h0
        self.clip_recurrent_grad = clip_recurrent_grad
        self._make_layout()

        for name, size in zip(*self._order[:2], strict=True):
            parameter = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        if learn_h0:
            for name, width in zip(("h_0", "c_0"), self._state_widths, strict=False):
                shape = (num_layers * self._directions, width)
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name, parameter)
        self.reset_parameters()

    @property
    def _cell(self) -> Cell:
        return _CELLS[self.mode]

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _weights(self) -> list[list[Weights]]:
        """The parameters by layer and direction, read afresh: nothing is cached past a change.

        Each is read once: a parametrization computes it, and may draw random numbers, at each read.

        Raises:
            RuntimeError: one was replaced by a tensor of another size.
        """
        found: list[list[Weights]] = []
        own = self._parameters.get
        for directions in self._layout:
            mine = []
            for entries in directions:
                tensors: list[Any] = []
                for entry in entries:
                    # Sooner than by __getattr__; what is computed is no parameter.
                    tensor: Tensor | None = None if entry is None else own(entry[0])
                    if entry is not None and (tensor is None or tensor.shape != entry[1]):
                        tensor = self._read(*entry)
                    tensors.append(tensor)
                mine.append(Weights._make(tensors))
            found.append(mine)
        return found

    def _read(self, name: str, size: tuple[int, ...]) -> Tensor:
        tensor: Tensor = getattr(self, name)
        if tensor.shape != size:
            raise RuntimeError(f"Expected {name} of size {size}, got {tuple(tensor.shape)}")
        return tensor

    # What torch.nn's layers keep as lists is read from the layer as it is at the moment.

    @property
    def _all_weights(self) -> list[list[str]]:
        """The names of the parameters of each layer and direction."""
        return [
            [entry[0] for entry in direction if entry is not None]
            for layer in self._layout
            for direction in layer
        ]

    @property
    def _flat_weights_names(self) -> list[str]:
        """The names of all of them, in the order of torch.nn's functions."""
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        """The parameters in the order of their names.

        What code for torch.nn's layers assigns must be just that: the attributes are what counts.

        Raises:
            ValueError: something else is assigned.
        """
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        names, given = self._flat_weights_names, list(weights)
        held = self._parameters | self.__dict__
        known = [held.get(name) for name in names]  # None for what a parametrization computes
        same = [own is None or own is new for own, new in zip(known, given, strict=False)]
        if len(given) != len(names) or not all(same):
            raise ValueError(
                "_flat_weights is read from the layer's attributes: assign to those, as in "
                f"layer.{names[0]} = ..."
            )

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn does.

        Learned initial states begin as zeros.
        """
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name in ("h_0", "c_0"):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Do nothing; for code written for torch.nn. These layers need no flat weight buffer."""

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which calls this: it cannot compile our Python code."""
        raise RuntimeError(
            "torch.jit.script cannot compile a fused layer. Script the model with torch.nn's: "
            "torch.jit.script(fused_rnn.unfuse(model))"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, also of a version that did not know every attribute."""
        super().__setstate__({"proj_size": 0, "backend": "auto"} | EXTRAS | state)
        self._make_layout()

    def _make_layout(self) -> None:
        """Names and sizes of the parameters, by layer and direction and in torch.nn's order."""
        self._layout = _layout_of(
            self._cell.gates,
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self._directions,
            self.bias,
            self.proj_size,
        )
        flat = [e for layer in self._layout for d in layer for e in d if e is not None]
        # What a call reads first: names and sizes, rows and widths of the states, the cell's name.
        self._order = (
            [name for name, _ in flat],
            [torch.Size(size) for _, size in flat],
            self.num_layers * self._directions,
            self._state_widths,
            self._cell.name,
        )

    def extra_repr(self) -> str:
        """torch.nn's, with what else is not as by default."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults: dict[str, object] = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0,
            "bidirectional": False,
            "backend": "auto",
            **EXTRAS,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value!r}" if name == "backend" else f"{name}={value}")
        return ", ".join(parts)

    # ---- checks ---------------------------------------------------------------------------------

    def check_input(
        self, input: Tensor, batch_sizes: Tensor | None, weight: Tensor | None = None
    ) -> None:
        """Raise torch.nn's error for an input [T, B, I] or packed [N, I] that does not fit.

        ``weight`` is weight_ih_l0 where the caller has read it already.
        """
        like: Any = self.weight_ih_l0 if weight is None else weight
        if input.dtype != like.dtype and (
            autocast_dtype(input) is None or like.dtype == torch.float64
        ):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({like.dtype}). "
                f"Convert input: input.to({like.dtype}), "
                f"or convert model: model.to({input.dtype})"
            )
        dims = 2 if batch_sizes is not None else 3
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )
        if input.device != like.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {like.device}"
            )
        if input.size(1 if dims == 3 and self.batch_first else 0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _check_parameters(self, input: Tensor, weights: list[list[Weights]]) -> None:
        """Raise RuntimeError unless the parameters are of one kind; ``input`` tells of autocast."""
        like = weights[0][0].w_ih
        dtype, device = like.dtype, like.device
        for names, layer in zip(self._layout, weights, strict=True):
            for entries, tensors in zip(names, layer, strict=True):
                for entry, tensor in zip(entries, tensors, strict=True):
                    if entry is None or tensor is None:
                        continue
                    if tensor.dtype != dtype or tensor.device != device:
                        check_kind(entry[0], tensor, like, autocast_dtype(input) is not None)

    def check_hidden_size(
        self,
        hx: Tensor,
        expected: tuple[int, int, int],
        msg: str = "Expected hidden size {}, got {}",
    ) -> None:
        """Raise torch.nn's error unless ``hx`` has the expected size."""
        if hx.size() != expected:
            raise RuntimeError(msg.format(expected, list(hx.size())))

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Raise torch.nn's error unless the input and the initial states fit.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, or packed [N, I].
            hidden: h [L*D, B, H]; of an LSTM a pair of h [L*D, B, R] and c [L*D, B, H].
            batch_sizes: of a packed input, int64 [T].

        Raises:
            RuntimeError: a size, the number of axes or a device does not fit.
            ValueError: the dtype does not.
        """
        self.check_input(input, batch_sizes)
        self.check_hidden_size(hidden, self.get_expected_hidden_size(input, batch_sizes))

    def get_expected_hidden_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """The size of h for an input as in :meth:`check_forward_args`."""
        if batch_sizes is not None:
            B = int(batch_sizes[0])
        else:
            B = input.size(0 if self.batch_first else 1)
        return self.num_layers * self._directions, B, self.proj_size or self.hidden_size

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The states ``hx`` with their sequences in the order of ``permutation``, int64 [B]."""
        return hx if permutation is None else hx.index_select(1, permutation)

    def _check_states(self, input: Tensor, states: States, B: int) -> None:
        names = ["hidden[0]", "hidden[1]"] if len(states) == 2 else ["hidden"]
        widths = [self.proj_size or self.hidden_size, self.hidden_size]
        autocast = autocast_dtype(input) is not None
        for name, state, width in zip(names, states, widths, strict=False):
            expected = (self.num_layers * self._directions, B, width)
            self.check_hidden_size(state, expected, f"Expected {name} size {{}}, got {{}}")
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

    def _check_dims(self, states: States, batched: bool) -> None:
        """Raise torch.nn's error unless the states are 3-D, or 2-D for unbatched input."""
        want = 3 if batched else 2
        if all(s.dim() == want for s in states):
            return
        kind = "batched 3-D" if batched else "unbatched 2-D"
        dims = [f"{s.dim()}-D" for s in states]
        if len(states) == 2:
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {want}-D "
                f"but got ({dims[0]}, {dims[1]}) tensors"
            )
        raise RuntimeError(f"For {kind} input, hx should also be {want}-D but got {dims[0]} tensor")

    # ---- the stack of layers --------------------------------------------------------------------

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: States | None,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_cell_sequence: bool = False,
        mask: Tensor | None = None,
        stack: Callable[..., tuple[tuple[Tensor, ...], States]] | None = None,
    ) -> tuple[Any, ...]:
        """``output``, the final states, and c of all steps if it is asked for.

        ``stack`` runs the layers in place of :meth:`_stack`, as :func:`fused_rnn.explain` has it.
        """
        if graphs.recording(input):
            keywords = {"lengths": lengths, "reset": reset, "mask": mask}
            return graphs.record(self, input, hx, keywords, return_cell_sequence)
        extras = lengths is not None or reset is not None or mask is not None
        if not (extras or return_cell_sequence or stack or ops.tracing()):
            call = native_stack.prepare(self, input, hx)
            if call is not None:
                return native_stack.run(self, input, call)
        stack = stack or self._stack
        if not isinstance(input, (Tensor, PackedSequence)):
            kind = type(input).__name__
            raise TypeError(f"input should be a tensor or a PackedSequence, got {kind}")
        if hx is not None:
            check_states(hx, self._cell.has_c)
        weights = self._weights()
        w_ih = weights[0][0].w_ih
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            self.check_input(data, batch_sizes, w_ih)
            self._check_parameters(data, weights)
            again = None if reset is None else packed_reset(input, reset)
            if lengths is not None or mask is not None:
                name = "mask" if lengths is None else "lengths"
                raise ValueError(
                    f"{name}: only for padded input; a PackedSequence has lengths itself"
                )
            traced = ops.tracing()
            rows = TracedRows.packed(input, hx) if traced else packed_rows(input)
            if hx is not None:
                self._check_states(data, hx, rows.B)
                if sorted_indices is not None:
                    hx = tuple(s.index_select(1, sorted_indices) for s in hx)
            learned = self._learned(hx, again, w_ih) if self.learn_h0 else None
            states = self._initial(data, rows.B, learned) if hx is None else hx
            from_zero = hx is None and learned is None
            found, states = stack(
                data, states, rows, weights, learned, None, again, return_cell_sequence, from_zero
            )
            if unsorted_indices is not None:
                states = tuple(s.index_select(1, unsorted_indices) for s in states)
            packed = [
                PackedSequence(s, batch_sizes, sorted_indices, unsorted_indices) for s in found
            ]
            return packed[0], states, *packed[1:]

        if input.dim() not in (2, 3):
            suffix = " tensor instead" if self.mode.startswith("RNN") else " instead"
            name = type(self).__name__.removeprefix("Fused")
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{suffix}")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            self._check_dims(hx, batched)
        if not batched:
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else tuple(s.unsqueeze(1) for s in hx)
        self.check_input(input, None, w_ih)
        self._check_parameters(input, weights)
        x = input.transpose(0, 1) if self.batch_first else input
        T, B, _ = x.shape
        if mask is not None:
            if lengths is not None:
                raise ValueError("lengths and mask say the same: give one of them")
            lengths = lengths_of(self._padded_reset(mask, x, batched, "mask"))
        if lengths is not None:
            check_lengths(lengths, x, batched, "lengths" if mask is None else "mask")
        again = None if reset is None else self._padded_reset(reset, x, batched)
        if hx is not None:
            self._check_states(x, hx, B)
        learned = self._learned(hx, again, w_ih) if self.learn_h0 else None
        states = self._initial(x, B, learned) if hx is None else hx
        traced = ops.tracing()
        if not traced and again is not None:
            again = again.reshape(T * B)
        from_zero = hx is None and learned is None
        how = (weights, learned, lengths, again, return_cell_sequence, from_zero)
        if traced:  # the operators take the batch as it is
            found, states = stack(x, states, TracedRows(B), *how)
        else:
            flat = x.reshape(T * B, x.shape[-1])
            found, states = stack(flat, states, Rows(T, B), *how)
            found = tuple([s.view(T, B, s.shape[-1]) for s in found])
        if self.batch_first:
            found = tuple([s.transpose(0, 1) for s in found])
        if not batched:
            found = tuple([s.squeeze(batch_dim) for s in found])
            states = tuple([s.squeeze(1) for s in states])
        return found[0], states, *found[1:]

    def _padded_reset(
        self, reset: Tensor | PackedSequence, x: Tensor, batched: bool, name: str = "reset"
    ) -> Tensor:
        """``reset``, or ``mask``, as [T, B], checked against the input ``x`` [T, B, I]."""
        if not isinstance(reset, Tensor):
            raise TypeError(f"{name} should be a bool tensor, as input, got {type(reset).__name__}")
        T, B, _ = x.shape
        check_reset(reset, x, ((B, T) if self.batch_first else (T, B)) if batched else (T,), name)
        if not batched:
            return reset.unsqueeze(-1)
        return reset.transpose(0, 1) if self.batch_first else reset

    @property
    def _state_widths(self) -> list[int]:
        carried = self.proj_size or self.hidden_size
        return [carried, self.hidden_size] if self._cell.has_c else [carried]

    def _initial(self, x: Tensor, B: int, learned: States | None) -> States:
        if learned is not None:
            return tuple([s[:, None].expand(-1, B, -1).to(x.dtype) for s in learned])
        count, widths = self.num_layers * self._directions, self._state_widths
        if len(widths) == 2 and widths[0] == widths[1]:  # one call for both
            return x.new_zeros(2, count, B, widths[0]).unbind()
        return tuple([x.new_zeros(count, B, width) for width in widths])

    def _learned(self, hx: States | None, reset: Tensor | None, like: Tensor) -> States | None:
        """The learned initial states [L*D, .] if this call needs any; read once, as weights are."""
        if hx is not None and reset is None:
            return None
        rows = self.num_layers * self._directions
        names = zip(("h_0", "c_0"), self._state_widths, strict=False)
        found = []
        for name, width in names:
            found.append(self._read(name, (rows, width)))
            check_kind(name, found[-1], like, autocast_dtype(like) is not None)
        return tuple(found)

    def _stack(
        self,
        x: Tensor,
        states: States,
        rows: Rows | TracedRows,
        weights: list[list[Weights]],
        learned: States | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        cells: bool,
        from_zero: bool,
    ) -> tuple[tuple[Tensor, ...], States]:
        """All layers, bottom up: ``x`` [N, I] to out [N, D*R] and the final states.

        With ``cells`` c of all steps of the last layer [N, D*H] stands behind out.
        """
        D, cell = self._directions, self._cell
        finals: list[States] = []
        for layer in range(self.num_layers):
            mine = states
            if self.num_layers > 1:
                mine = tuple(s[layer * D : (layer + 1) * D] for s in states)
            c0 = mine[1] if cell.has_c else None
            restart: Any = None
            if learned is not None and reset is not None:
                first = [s[layer * D : (layer + 1) * D].to(x.dtype) for s in learned]
                restart = (first[0], first[1] if cell.has_c else None)
            out = rnn_layer(
                cell,
                x,
                mine[0],
                c0,
                weights[layer],
                rows,
                self.backend,
                self.recompute,
                from_zero=from_zero,
                lengths=lengths,
                reset=reset,
                restart=restart,
                zoneout=self.zoneout,
                recurrent_dropout=self.recurrent_dropout,
                clip_recurrent_grad=self.clip_recurrent_grad,
                return_cell_sequence=cells and layer == self.num_layers - 1,
                training=self.training,
            )
            x = out.out
            finals.append((out.h_n,) if out.c_n is None else (out.h_n, out.c_n))
            if self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        found = (x,) if out.c_seq is None else (x, out.c_seq)
        if self.num_layers == 1:
            return found, finals[0]
        return found, tuple(torch.cat(same) for same in zip(*finals, strict=True))


_Entry = tuple[str, tuple[int, ...]]  # the name of a parameter, and its size


def _layout_of(
    gates: int, I: int, H: int, layers: int, directions: int, bias: bool, projection: int
) -> list[list[list[_Entry | None]]]:
    """By layer and direction, the entries of :class:`fused_rnn.problem.Weights`."""
    rows, carried, width = gates * H, projection or H, I
    found = []
    for layer in range(layers):
        mine = []
        for suffix in ("", "_reverse")[:directions]:
            sizes = (rows, width), (rows, carried), (rows,), (rows,), (carried, H)
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            there = (True, True, bias, bias, projection > 0)
            entries = [
                (f"{kind}_l{layer}{suffix}", size) if here else None
                for kind, size, here in zip(kinds, sizes, there, strict=True)
            ]
            mine.append(entries)
        found.append(mine)
        width = carried * directions
    return found


_CELLS = {
    "RNN_TANH": cells.RNN_TANH,
    "RNN_RELU": cells.RNN_RELU,
    "GRU": cells.GRU,
    "LSTM": cells.LSTM,
}

# What torch.nn's layers do not have, with its defaults.
EXTRAS: dict[str, object] = {
    "recompute": False,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "learn_h0": False,
    "clip_recurrent_grad": None,
}

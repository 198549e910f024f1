"""The parameters of a recurrent module, by torch.nn's names, and what it was constructed with."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_rnn.cells.builtin import CELLS
from fused_rnn.engines.dispatch import Backend, check_backend
from fused_rnn.layers.checks import check_arguments, check_heads, check_input, check_options
from fused_rnn.ops import cudnn
from fused_rnn.spec.cells import Cell
from fused_rnn.spec.context import transformed
from fused_rnn.spec.layer import Weights
from fused_rnn.spec.names import entries_of, present

States = tuple[Tensor, ...]  # (h,) or (h, c), each [L*D, B, .]

# What torch.nn's layers do not have, with its defaults.
OPTIONS: dict[str, object] = {
    "recompute": False,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "learn_h0": False,
    "clip_recurrent_grad": None,
    "heads": 1,
}


class Sizes(NamedTuple):
    """What a call reads first of a module.

    Attributes:
        names: of the parameters, in torch.nn's order.
        sizes: of the parameters.
        states: rows of the states, L*D.
        widths: of the states h and c, or of h alone.
    """

    names: list[str]
    sizes: list[torch.Size]
    states: int
    widths: list[int]


class RecurrentModule(nn.Module):
    """A stack of recurrent layers without its call.

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
    heads: int
    _flat_memory: tuple[Tensor, list[int]] | None = None

    def __init__(
        self,
        mode: str | Cell,
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
        heads: int = 1,
    ) -> None:
        super().__init__()
        self.dropout = float(dropout)
        check_arguments(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        check_backend(backend)
        check_options(recompute, zoneout, recurrent_dropout, learn_h0, clip_recurrent_grad)
        check_heads(heads, hidden_size, proj_size)
        self.mode = mode if isinstance(mode, str) else mode.name
        if isinstance(mode, Cell):
            self.cell = mode
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
        self.heads = heads
        self._name_parameters()

        shapes: list[tuple[str, tuple[int, ...]]] = [*zip(*self._sizes[:2], strict=True)]
        if learn_h0:
            rows, widths = self._sizes.states, self._sizes.widths
            shapes += [(n, (rows, w)) for n, w in zip(self._initial_names, widths, strict=True)]
        for name, shape in shapes:
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()
        self.flatten_parameters()

    @property
    def _cell(self) -> Cell:
        cell: Cell | None = self.__dict__.get("cell")
        return CELLS[self.mode.lower()] if cell is None else cell

    @property
    def _initial_names(self) -> list[str]:
        """The names of the learned initial states."""
        return [f"{state}_0" for state in self._cell.states]

    @property
    def _directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def _state_widths(self) -> list[int]:
        carried = self.proj_size or self.hidden_size
        return [carried] + [self.hidden_size] * (len(self._cell.states) - 1)

    def _weights(self) -> list[list[Weights]]:
        """The parameters by layer and direction, read afresh: nothing is cached past a change.

        Each is read once: a parametrization computes it, and may draw random numbers, at each read.

        Raises:
            RuntimeError: one was replaced by a tensor of another size.
        """
        layers: list[list[Weights]] = []
        own = self._parameters.get
        for directions in self._entries:
            mine = []
            for *entries, vectors in directions:
                tensors: list[Any] = []
                for entry in entries:
                    # Sooner than by __getattr__; what is computed is no parameter.
                    tensor: Tensor | None = None if entry is None else own(entry[0])
                    if entry is not None and (tensor is None or tensor.shape != entry[1]):
                        tensor = self.read_parameter(*entry)
                    tensors.append(tensor)
                if vectors:
                    tensors.append(torch.stack([self.read_parameter(*v) for v in vectors]))
                mine.append(Weights(*tensors))
            layers.append(mine)
        return layers

    def read_parameter(self, name: str, size: tuple[int, ...]) -> Tensor:
        """The parameter ``name``, be it computed by a parametrization.

        Raises:
            RuntimeError: it is not of this size.
        """
        tensor: Tensor = getattr(self, name)
        if tensor.shape != size:
            raise RuntimeError(f"Expected {name} of size {size}, got {tuple(tensor.shape)}")
        return tensor

    # What torch.nn's layers keep as lists is read from the layer as it is at the moment.

    @property
    def _all_weights(self) -> list[list[str]]:
        """The names of the parameters of each layer and direction."""
        return [
            [name for name, _ in present(direction)]
            for layer in self._entries
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

        Learned initial states begin as zeros, or as the cell says; its own parameters, too, if it
        says so.
        """
        bound, cell = 1.0 / math.sqrt(self.hidden_size), self._cell
        constants: dict[str, Any] = dict(zip(self._initial_names, cell.initial, strict=True))
        for *_, vectors in [entries for layer in self._entries for entries in layer]:
            constants |= {n: c for (n, _), c in zip(vectors, cell.begin, strict=True)}
        for name, parameter in self.named_parameters():
            constant = constants.get(name)
            if constant is None:
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.constant_(parameter, constant)

    def flatten_parameters(self) -> None:
        """Move the parameters into one piece of memory, for cuDNN; what each is, stays.

        As torch.nn's: done by itself when the layer is made, moved or fused, of no effect but on a
        GPU with cuDNN, in fp16, fp32 or fp64, outside of tracers and transforms.
        """
        if torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack():
            return
        self.__dict__.pop("_flat_memory", None)
        weights = [self._parameters.get(name) for name in self._sizes.names]
        if self.heads == 1 and self._cell.torch and all([p is not None for p in weights]):
            sizes = self.hidden_size, self.proj_size, self.num_layers
            stack = cudnn.Stack(self._cell, *sizes, self.bidirectional, self.batch_first)
            if flat := cudnn.flatten(stack, self.input_size, weights):
                self._flat_memory = flat

    def flat_memory(self, weights: list[Tensor]) -> Tensor | None:
        """The piece of memory that holds ``weights``, if they are where it has them."""
        memory, places = self._flat_memory or (None, [])
        return memory if [p.data_ptr() for p in weights if p.is_contiguous()] == places else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the parameters, as every module does."""
        super()._apply(fn, recurse)
        self.flatten_parameters()
        return self

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which calls this: it cannot compile our Python code."""
        raise RuntimeError(
            "torch.jit.script cannot compile a fused layer. Script the model with torch.nn's: "
            "torch.jit.script(fused_rnn.unfuse(model))"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, also of a version that did not know every attribute."""
        state = {name: value for name, value in state.items() if name not in _FORMER}
        super().__setstate__({"proj_size": 0, "backend": "auto"} | OPTIONS | state)
        self._name_parameters()

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: they have memory of their own."""
        return {name: held for name, held in self.__dict__.items() if name != "_flat_memory"}

    def _name_parameters(self) -> None:
        """Names and sizes of the parameters, by layer and direction and in torch.nn's order."""
        self._entries = entries_of(
            self._cell,
            self.input_size,
            self.hidden_size,
            self.proj_size,
            self.num_layers,
            self._directions,
            self.bias,
            self.heads,
        )
        flat = [e for layer in self._entries for d in layer for e in present(d)]
        names, sizes = [name for name, _ in flat], [torch.Size(size) for _, size in flat]
        self._sizes = Sizes(names, sizes, self.num_layers * self._directions, self._state_widths)

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
            **OPTIONS,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value!r}" if name == "backend" else f"{name}={value}")
        return ", ".join(parts)

    # ---- what code for torch.nn's layers calls --------------------------------------------------

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise torch.nn's error for an input that does not fit.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, or packed [N, I].
            batch_sizes: of a packed input, int64 [T].

        Raises:
            RuntimeError: a size, the number of axes or the device does not fit.
            ValueError: the dtype does not.
        """
        like: Any = self.weight_ih_l0
        check_input(input, like, self.input_size, self.batch_first, batch_sizes is not None)

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
        """The size [L*D, B, R] of h.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, or packed [N, I].
            batch_sizes: of a packed input, int64 [T]; else None.
        """
        if batch_sizes is not None:
            B = int(batch_sizes[0])
        else:
            B = input.size(0 if self.batch_first else 1)
        return self.num_layers * self._directions, B, self.proj_size or self.hidden_size

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The states ``hx`` with their sequences in the order of ``permutation``, int64 [B]."""
        if permutation is None:
            return hx
        if isinstance(hx, tuple):
            return tuple([s.index_select(1, permutation) for s in hx])
        return hx.index_select(1, permutation)


_FORMER = frozenset({"_layout", "_order"})  # what older versions kept in a module

"""One recurrent layer as its engines see it: what it is, its inputs, outputs and gradients.

Shapes: T steps, B sequences, N rows in all, D directions, I inputs, H hidden units, G gates, K
states beside h, P parameters of a unit, and R = proj_size or H rows in the carried h. "c" stands
for all states beside h, [.., K*H], one after the other: that of the LSTM, where there is one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.cells import Cell


class Weights(NamedTuple):
    """The parameters of one direction.

    Attributes:
        w_ih: [G*H, I].
        w_hh: [G*H, R]; with k > 1 heads [k, G*H/k, H/k], the rows of a head by gate and unit.
        b_ih: [G*H], or None without biases.
        b_hh: [G*H], or None without biases.
        w_hr: [R, H], or None without a projection.
        vectors: [P, H], the cell's own parameters, or None for a cell without.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    vectors: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """What a layer does beyond torch.nn's, as far as no tensor of :class:`OptionTensors` tells.

    Attributes:
        zoned: whether a step keeps a part of the old state.
        zoneout: how much, where no masks say it unit by unit.
        clip: bound of the gradient that a step passes to the state before it, or None.
        cells: whether c of all steps is an output.
    """

    zoned: bool = False
    zoneout: float = 0.0
    clip: float | None = None
    cells: bool = False


class OptionTensors(NamedTuple):
    """The tensors of a layer with :class:`Options`; each may be absent.

    Attributes:
        lengths: int64 [B], steps of each sequence of a uniform batch.
        reset: bool [N], rows at which a new segment begins, which knows nothing of the old one.
        restart_h: [D, R], the h that it begins with; zeros if absent.
        restart_c: [D, K*H], the c that it begins with; zeros if absent.
        zone_h: bool [N, D*R], units that keep their h in a step.
        zone_c: bool [N, D*K*H], units that keep their c in a step.
        drop: [D, B, R], factors of h on its way into the recurrent product.
    """

    lengths: Tensor | None = None
    reset: Tensor | None = None
    restart_h: Tensor | None = None
    restart_c: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    drop: Tensor | None = None


NO_TENSORS = OptionTensors()
_WEIGHTS, _OPTIONS = len(Weights._fields), len(OptionTensors._fields)  # of them in a flat row


@dataclass(frozen=True)
class LayerSpec:
    """What an engine must know of a layer beside its tensors.

    Attributes:
        cell: the cell.
        layout: where the rows of each time step lie.
        directions: 1, or 2 with a second one that sweeps in reverse.
        hidden_size: H.
        projected: whether h is projected.
        recompute: save only the states for backward, and compute the gates a second time.
        options: None for what torch.nn's layers can do; then no tensor of :class:`OptionTensors`
            is there.
        from_zero: the initial h is zeros, with which no product is needed; False says nothing.
        heads: blocks on the diagonal of the recurrent weights, outside of which they are zero.
    """

    cell: Cell
    layout: BatchLayout
    directions: int
    hidden_size: int
    projected: bool = False
    recompute: bool = False
    options: Options | None = None
    from_zero: bool = False
    heads: int = 1


Flat = tuple[Tensor | None, ...]


class LayerInputs(NamedTuple):
    """The tensors of one layer.

    Attributes:
        x: rows [N, I] in order of time, see :class:`fused_rnn.spec.batch.BatchLayout`.
        h0: initial hidden state [D, B, R].
        c0: initial states beside h [D, B, K*H], or None for a cell without.
        weights: the parameters of each direction.
        options: the tensors of its options.
    """

    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: tuple[Weights, ...]
    options: OptionTensors = NO_TENSORS

    def flatten(self) -> Flat:
        """All of them in one row, as autograd and tracers want them."""
        return (self.x, self.h0, self.c0, *chain.from_iterable(self.weights), *self.options)

    @classmethod
    def restore(cls, flat: Sequence[Any]) -> "LayerInputs":
        """The inverse of :meth:`flatten`."""
        end = len(flat) - _OPTIONS
        weights = tuple([Weights(*flat[i : i + _WEIGHTS]) for i in range(3, end, _WEIGHTS)])
        return cls(flat[0], flat[1], flat[2], weights, OptionTensors(*flat[end:]))

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerInputs":
        """``function`` of each tensor that is there."""
        return LayerInputs.restore([t if t is None else function(t) for t in self.flatten()])


class WeightNeeds(NamedTuple):
    """Which gradients of :class:`Weights` are wanted."""

    w_ih: bool
    w_hh: bool
    b_ih: bool
    b_hh: bool
    w_hr: bool
    vectors: bool = False


class Needs(NamedTuple):
    """Which gradients of :class:`LayerInputs` are wanted."""

    x: bool
    h0: bool
    c0: bool
    weights: tuple[WeightNeeds, ...]
    restart_h: bool = False
    restart_c: bool = False

    def flatten(self) -> tuple[bool, ...]:
        """In the order of :meth:`LayerInputs.flatten`."""
        options = (False, False, self.restart_h, self.restart_c, False, False, False)
        return (self.x, self.h0, self.c0, *chain.from_iterable(self.weights), *options)

    @classmethod
    def restore(cls, flat: Sequence[bool]) -> "Needs":
        """The inverse of :meth:`flatten`."""
        end = len(flat) - _OPTIONS
        weights = tuple([WeightNeeds(*flat[i : i + _WEIGHTS]) for i in range(3, end, _WEIGHTS)])
        return cls(flat[0], flat[1], flat[2], weights, flat[end + 2], flat[end + 3])


class WeightGrads(NamedTuple):
    """The gradients of :class:`Weights`; None where none is wanted, or it is zero."""

    w_ih: Tensor | None = None
    w_hh: Tensor | None = None
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    vectors: Tensor | None = None


class InputGrads(NamedTuple):
    """The gradients of :class:`LayerInputs`; None where none is wanted, or it is zero."""

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: tuple[WeightGrads, ...]
    restart_h: Tensor | None = None
    restart_c: Tensor | None = None

    def flatten(self) -> Flat:
        """In the order of :meth:`LayerInputs.flatten`."""
        options = (None, None, self.restart_h, self.restart_c, None, None, None)
        return (self.x, self.h0, self.c0, *chain.from_iterable(self.weights), *options)

    @classmethod
    def restore(cls, flat: Flat) -> "InputGrads":
        """The inverse of :meth:`flatten`."""
        end = len(flat) - _OPTIONS
        weights = tuple([WeightGrads(*flat[i : i + _WEIGHTS]) for i in range(3, end, _WEIGHTS)])
        return cls(flat[0], flat[1], flat[2], weights, flat[end + 2], flat[end + 3])


class Outputs(NamedTuple):
    """What a layer returns.

    Attributes:
        out: [N, D*R].
        h_n: [D, B, R].
        c_n: [D, B, K*H], or None for a cell without c.
        c_seq: c after every step [N, D*K*H], if the options ask for it.
    """

    out: Tensor
    h_n: Tensor
    c_n: Tensor | None
    c_seq: Tensor | None = None


class OutputGrads(NamedTuple):
    """The gradients of :class:`Outputs`; None stands for zero."""

    out: Tensor | None
    h_n: Tensor | None = None
    c_n: Tensor | None = None
    c_seq: Tensor | None = None


Saved = tuple[Tensor | None, ...]
Specs = tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]  # shapes and types of `Saved`


class Engine(Protocol):
    """An implementation of one layer with a backward of its own."""

    def forward(self, spec: LayerSpec, inputs: LayerInputs, save: bool) -> tuple[Outputs, Saved]:
        """Run the layer; with ``save`` also return what backward needs beside inputs and ``out``.

        The other outputs are the caller's, who may overwrite them: what backward needs of them is
        saved as a copy.
        """
        ...

    def saved_specs(self, spec: LayerSpec, inputs: LayerInputs) -> Specs | None:
        """Shapes and types of what forward saves.

        None if those are no plain tensors: backward can then do without, and takes ``()``.
        Nothing of ``spec.layout`` may be read, nor T and B in the shapes of ``inputs`` compared:
        a tracer asks, to whom they are symbols.
        """
        ...

    def backward(
        self,
        spec: LayerSpec,
        inputs: LayerInputs,
        out: Tensor,
        saved: Saved,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        """Gradients of the inputs that ``needs`` marks (None for the others).

        ``out`` is that of :class:`Outputs`. Nothing passed in is modified.
        """
        ...

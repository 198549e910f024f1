"""The contract between the autograd layer and the backends: one recurrent layer, all directions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_rnn.cells import Cell
from fused_rnn.rows import Rows


class Weights(NamedTuple):
    """The parameters of one direction, with ``R = proj_size or H`` rows in the carried h.

    Shapes: ``w_ih`` [G*H, I], ``w_hh`` [G*H, R], ``b_ih`` and ``b_hh`` [G*H], ``w_hr`` [R, H].
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


class Outputs(NamedTuple):
    """``out`` [N, D*R], ``h_n`` [D, B, R], ``c_n`` [D, B, H] or None, ``c_seq`` [N, D*H] or None.

    ``c_seq`` is c after every step, for a layer whose extras ask for it.
    """

    out: Tensor
    h_n: Tensor
    c_n: Tensor | None
    c_seq: Tensor | None = None


@dataclass(frozen=True)
class Extras:
    """What torch.nn's layers lack, as far as it is not in :class:`Masks`.

    Attributes:
        zoned: whether a step keeps a part of the old state,
        zoneout: how much, where no masks say it unit by unit.
        clip: bound of the gradient that a step passes to the state before it, or None.
        cells: whether c of all steps is an output.
    """

    zoned: bool = False
    zoneout: float = 0.0
    clip: float | None = None
    cells: bool = False


class Masks(NamedTuple):
    """The tensors of a layer with :class:`Extras`, behind its parameters; each may be absent.

    ``lengths`` int64 [B]: steps of each sequence of a uniform batch.
    ``reset`` bool [N]: rows at which a new stretch begins, which knows nothing of the old one.
    ``restart_h`` [D, R], ``restart_c`` [D, H]: the state that it begins with; absent for zeros.
    ``zone_h`` bool [N, D*R], ``zone_c`` bool [N, D*H]: units that a step leaves as they are.
    ``drop`` [D, B, R]: factors of h on its way into the recurrent product.
    """

    lengths: Tensor | None = None
    reset: Tensor | None = None
    restart_h: Tensor | None = None
    restart_c: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    drop: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What a backend must know of a layer beside its tensors.

    With ``recompute`` only the states are saved for backward, not the gates. ``extras`` is None for
    what torch.nn's layers can do; else :class:`Masks` stand behind the parameters. ``from_zero``
    says that the initial states are zeros, with which no product is needed; False says nothing.
    """

    cell: Cell
    rows: Rows
    directions: int
    recompute: bool = False
    extras: Extras | None = None
    from_zero: bool = False

    def masks(self, inputs: "Saved") -> Masks:
        """The masks among ``inputs`` as in :class:`Engine`."""
        if self.extras is None:
            return Masks()
        return Masks(*inputs[3 + self.directions * len(Weights._fields) :])

    def unflatten(self, flat: Sequence[Tensor | None]) -> Iterator[Weights]:
        """Group the parameters of all directions, as they pass through autograd, by direction."""
        k = len(Weights._fields)
        for d in range(self.directions):
            yield Weights(*flat[d * k : (d + 1) * k])  # type: ignore[arg-type]


Saved = tuple[Tensor | None, ...]
OutputGrads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Grads = tuple[Tensor | None, ...]
Specs = tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]  # shapes and types of `Saved`


class Engine(Protocol):
    """An implementation of one layer with a hand-written backward.

    ``inputs`` is ``(x [N, I], h0 [D, B, R], c0 [D, B, H] | None, *weights of each direction)``,
    and the :class:`Masks` behind them if the layer has extras.
    """

    def forward(self, layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
        """Run the layer; with ``save`` also return what backward needs beside inputs and ``out``.

        The other outputs are the caller's, who may overwrite them: what backward needs of them is
        saved as a copy.
        """
        ...

    def saved_specs(self, layer: Layer, inputs: Saved) -> Specs | None:
        """Shapes and types of what forward saves.

        None if those are no plain tensors: backward can then do without, and takes ``()``.
        Nothing of ``layer.rows`` may be read, nor T and B in the shapes of ``inputs`` compared:
        a tracer asks, to whom they are symbols.
        """
        ...

    def backward(
        self,
        layer: Layer,
        inputs: Saved,
        out: Tensor,
        saved: Saved,
        grads: OutputGrads,
        needs: tuple[bool, ...],
    ) -> Grads:
        """Gradients of the inputs that ``needs`` marks (None for the others).

        ``out`` is that of :class:`Outputs`; ``grads`` belongs to the outputs, None standing for
        zero. Nothing passed in is modified.
        """
        ...

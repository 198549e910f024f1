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
    """``out`` [N, D*R], ``h_n`` [D, B, R], ``c_n`` [D, B, H] or None."""

    out: Tensor
    h_n: Tensor
    c_n: Tensor | None


@dataclass(frozen=True)
class Layer:
    """What a backend must know of a layer beside its tensors.

    With ``recompute`` only the states are saved for backward, not the gates.
    """

    cell: Cell
    rows: Rows
    directions: int
    recompute: bool = False

    def unflatten(self, flat: Sequence[Tensor | None]) -> Iterator[Weights]:
        """Group the parameters of all directions, as they pass through autograd, by direction."""
        k = len(Weights._fields)
        for d in range(self.directions):
            yield Weights(*flat[d * k : (d + 1) * k])  # type: ignore[arg-type]


Saved = tuple[Tensor | None, ...]
Grads = tuple[Tensor | None, ...]
Specs = tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]  # shapes and types of `Saved`


class Engine(Protocol):
    """An implementation of one layer with a hand-written backward.

    ``inputs`` is ``(x [N, I], h0 [D, B, R], c0 [D, B, H] | None, *weights of each direction)``.
    """

    def forward(self, layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
        """Run the layer; with ``save`` also return what backward needs beside in- and outputs."""
        ...

    def saved_specs(self, layer: Layer, inputs: Saved) -> Specs | None:
        """Shapes and types of what forward saves, or None if only forward can tell.

        Nothing of ``layer.rows`` may be read, nor T and B in the shapes of ``inputs`` compared:
        a tracer asks, to whom they are symbols.
        """
        ...

    def backward(
        self,
        layer: Layer,
        inputs: Saved,
        outputs: Outputs,
        saved: Saved,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        needs: tuple[bool, ...],
    ) -> Grads:
        """Gradients of the inputs that ``needs`` marks (None for the others).

        ``grads`` belongs to the outputs, None standing for zero. Nothing passed in is modified.
        """
        ...

"""What the kernels know of a cell: where its gates lie, and its Triton functions. Plain Python.

The kernels have two layouts. One gate lies alone, a number for each unit. Otherwise a unit has four
slots side by side in the gate buffer, and a gate's input part and its recurrent part each have one.
They share it, so that the recurrent product is added where the input part lies, unless a step needs
the last gate's recurrent part apart: its input part is in slot 2 then, and its recurrent part in
slot 3 (the reset gate of a GRU multiplies the recurrent part of n alone).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

PRODUCTS = {1: (0,), 3: (0, 1, 3), 4: (0, 1, 2, 3)}  # slots of the recurrent products there are


class CellFunctions(NamedTuple):
    """The Triton functions of a cell, over tuples of fp32 tiles [BLOCK_H, BLOCK_B].

    States come in their order, h first. ``params`` are the cell's own parameters, [BLOCK_H, 1]
    each; a cell without gets an empty tuple. H are the units that there are; FAST allows
    approximations. `fused_rnn.show` prints those of a cell.

    Attributes:
        step: ``(pre, state, params, H, FAST) -> (saved, new)``. ``pre`` are its S slots before the
            activation, input and recurrent part added; ``saved`` S tiles that the reverse sweep
            reads back in their place.
        factors: ``(saved, now, before, params, H, FAST) -> tuple``. A step's adjoint is linear in
            the gradients; these are its coefficients, and whatever else it needs that no gradient
            enters: the reverse sweep forms them while the tensor cores are busy. ``now`` are the
            states beside h after the step, ``before`` all states before it, of which h only counts
            if the cell `needs_h`.
        adjoint: ``(k, grads, none, H) -> (slots, direct, dparams)``. ``k`` are the factors,
            ``grads`` the gradients of the new states, ``none`` a tile of zeros. ``slots`` are the
            gradients of the S slots: those that belong to a row of the recurrent weights go through
            the product. ``direct`` is what reaches the states before without passing it (``none``
            where nothing does), ``dparams`` this step's gradients of the parameters.
        others: ``(saved, before, params, H, FAST) -> tuple``: the states beside h as the step makes
            them, before zoneout takes a part back. Without it, a cell with such states has no
            kernels for zoneout.
    """

    step: Any
    factors: Any
    adjoint: Any
    others: Any = None


MOST_STATES = 4


@dataclass(frozen=True, eq=False)
class KernelCell:
    """A cell as the kernels run it.

    Attributes:
        name: what errors and remembered plans call it.
        states: 1 to 4, h and those beside it.
        x_slots: the slot of each gate's input part, in the order of the weights.
        h_slots: the slot of each gate's recurrent part; see above for what is possible.
        functions: returns the Triton functions; called when a kernel is to run, so that nothing
            else imports Triton.
        activate: ``(slots, before, vectors)``, turns the slots [N, H, S] of pre-activations into
            what the step saves, in place and in PyTorch: for layers that compute their gates a
            second time. ``before`` has the states [N, H] before each row's step, ``vectors`` the
            parameters [P, H], or is None.
        parameters: numbers that each unit has of its own, beside the weights.
        needs_h: whether `factors` reads the h before a step.
        keeps_gates: whether a step saves its slots. A cell of one gate may do without, if the slot
            that it would save is the new h.
        factors: how many tiles `factors` returns; the planner counts registers by it.
        masks_padding: keep units that only fill up a tile at zero. Their slots, states and
            parameters begin with zeros; a cell of which steps of zeros stay finite, and their
            factors, does without.
        whole: whether a step needs all units of a head in one program.

    Raises:
        ValueError: the kernels have no such slots.
    """

    name: str
    states: int
    x_slots: tuple[int, ...]
    h_slots: tuple[int, ...]
    functions: Callable[[], CellFunctions]
    activate: Callable[[Tensor, Sequence[Tensor], Tensor | None], Any]
    parameters: int = 0
    needs_h: bool = True
    keeps_gates: bool = True
    factors: int = 6
    masks_padding: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        x, h = self.x_slots, self.h_slots
        fits = self.splits_last_gate or x == h
        fits = fits and set(h) <= set(self.product) and len(set(h)) == len(h)
        fits = fits and (self.gates == 1) == (len(h) == 1) and 1 <= self.states <= MOST_STATES
        if not fits:
            raise ValueError(
                f"the kernels cannot run {len(h)} gates with x_slots={x}, h_slots={h} and "
                f"{self.states} states"
            )
        if self.gates > 1 and not self.keeps_gates:
            raise ValueError("only a cell of one gate can do without saved gates")

    @cached_property
    def splits_last_gate(self) -> bool:
        """Whether the last gate's recurrent part has a slot of its own."""
        alike = self.x_slots[:-1] == self.h_slots[:-1]
        return alike and (self.x_slots[-1:], self.h_slots[-1:]) == ((2,), (3,))

    @cached_property
    def gates(self) -> int:
        """Gates of the recurrent product: 1, 3 or 4; those that the cell lacks are zero."""
        return 1 if self.h_slots == (0,) else 3 if self.splits_last_gate else 4

    @cached_property
    def product(self) -> tuple[int, ...]:
        """Their slots."""
        return PRODUCTS[self.gates]

    @cached_property
    def slots(self) -> int:
        """Slots of a unit in the gate buffer: 1 or 4."""
        return 1 if self.gates == 1 else 4

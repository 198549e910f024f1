"""What the kernels know of a cell: where its gates lie, and its Triton functions. Plain Python.

The kernels have two layouts. One gate lies alone, a number for each unit. Otherwise a unit has four
slots side by side in the gate buffer, and a gate's input part and its recurrent part each have one.
They share it, so that the recurrent product is added where the input part lies, unless a step needs
the last gate's recurrent part apart: its input part is in slot 2 then, and its recurrent part in
slot 3 (the reset gate of a GRU multiplies the recurrent part of n alone).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

PRODUCTS = {1: (0,), 3: (0, 1, 3), 4: (0, 1, 2, 3)}  # slots of the recurrent products there are


class CellFunctions(NamedTuple):
    """The Triton functions of a cell, see `cells.py`.

    Attributes:
        step: a time step.
        factors: coefficients of its adjoint, from saved values.
        adjoint: its adjoint.
        cell_state: c after a step, from what it saved and c before; None for a cell without c.
            Without one, a cell with c has no kernels for zoneout.
    """

    step: Any
    factors: Any
    adjoint: Any
    cell_state: Any = None


@dataclass(frozen=True, eq=False)
class KernelCell:
    """A cell as the kernels run it.

    Attributes:
        name: what errors and remembered plans call it.
        states: 1, or 2 with c.
        x_slots: the slot of each gate's input part, in the order of the weights.
        h_slots: the slot of each gate's recurrent part; see above for what is possible.
        functions: returns the Triton functions; called when a kernel is to run, so that nothing
            else imports Triton.
        activate: turns the slots [N, H, S] of pre-activations into what the step saves, in place
            and in PyTorch: for layers that compute their gates a second time.

    Raises:
        ValueError: the kernels have no such slots.
    """

    name: str
    states: int
    x_slots: tuple[int, ...]
    h_slots: tuple[int, ...]
    functions: Callable[[], CellFunctions]
    activate: Callable[[Tensor], Any]

    def __post_init__(self) -> None:
        x, h = self.x_slots, self.h_slots
        fits = self.splits_last_gate or x == h
        fits = fits and set(h) <= set(self.product) and len(set(h)) == len(h)
        if not fits or (self.gates == 1) != (len(h) == 1) or self.states not in (1, 2):
            raise ValueError(
                f"the kernels cannot run {len(h)} gates with x_slots={x}, h_slots={h} and "
                f"{self.states} states"
            )

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

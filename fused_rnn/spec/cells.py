"""What a cell is: its gates, states and parameters, and one time step.

A gate owns ``H`` rows of the weights; ``G * H`` rows make ``weight_ih`` and ``weight_hh``. What a
step gets of a gate is a slot: the sum of its input and recurrent part, or, for a gate whose parts
are apart, one slot for each.
"""

import importlib
import pickle
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.kernels.cell import KernelCell


class TorchFunctions(NamedTuple):
    """PyTorch's own functions for a cell.

    Attributes:
        layer: of a layer, as ``torch._VF.lstm``.
        step: of a single step, as ``torch.lstm_cell``.
        cudnn_mode: cuDNN's number for the cell.
    """

    layer: Callable[..., Any]
    step: Callable[..., Any]
    cudnn_mode: int


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell: all that the package knows of it. :func:`fused_rnn.cell` makes one.

    Attributes:
        name: what reasons and errors call it.
        gates: their names, in the order of their rows in the weights.
        states: their names, h first.
        step: ``(gates, state)`` or ``(gates, state, parameters)``, records of tensors [B, H] (of
            parameters [H]), to the new states, or the only one. It is the definition of the cell:
            the eager loop runs it as it stands, and every engine is tested against it.
        parameters: names of its own parameters, each one number for every unit.
        apart: the gates whose input and recurrent part the step gets apart.
        initial: what each state begins with where nothing is given.
        begin: what each parameter is set to at first; drawn as the weights are where it is None.
        pointwise: whether the step treats every element alone, layer norms aside, so that sweeps
            can be derived.
        mixes_units: whether a unit depends on the others of its head within a step.
        torch: PyTorch's own functions for it, or None.
        key: its name, and for a user's cell a mark of what it computes: no two cells share it.
        place: where a pickle finds it, "module:name".
        kernels_of: makes what the Triton kernels need of the cell; raises ValueError with the
            reason if they cannot run it.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    step: Callable[..., Any]
    parameters: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    initial: tuple[float, ...] = ()
    begin: tuple[float | None, ...] = ()
    pointwise: bool = True
    mixes_units: bool = False
    torch: TorchFunctions | None = None
    key: str = ""
    place: str = ""
    kernels_of: "Callable[[Cell], KernelCell] | None" = None

    @property
    def blocks(self) -> int:
        """Blocks of ``H`` rows in the weights."""
        return len(self.gates)

    @property
    def has_c(self) -> bool:
        """Whether there are states beside h."""
        return len(self.states) > 1

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """What a step gets of the gates, in their order: "n", or "n_x" and "n_h" if apart."""
        parts = [(g + "_x", g + "_h") if g in self.apart else (g,) for g in self.gates]
        return tuple([name for part in parts for name in part])

    @cached_property
    def records(self) -> tuple[type, ...]:
        """The types of the step's arguments."""
        kinds = (("Gates", self.slots), ("State", self.states), ("Parameters", self.parameters))
        return tuple([namedtuple(name, fields) for name, fields in kinds if fields])

    def call(
        self, slots: Sequence[Any], states: Sequence[Any], parameters: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """The new states after one step, always a tuple.

        Args:
            slots: of the names in :attr:`slots`, [B, H].
            states: of the names in :attr:`states`, [B, H].
            parameters: of the names in :attr:`parameters`, [H].

        Raises:
            ValueError: the step returns another number of states.
        """
        given = (slots, states, parameters) if self.parameters else (slots, states)
        made = [record(*part) for record, part in zip(self.records, given, strict=True)]
        new = self.step(*made)
        if isinstance(new, Tensor):
            new = (new,)
        if not isinstance(new, tuple) or len(new) != len(self.states):
            got = len(new) if isinstance(new, tuple) else type(new).__name__
            raise ValueError(
                f"the step of {self.name} should return the new states {self.states}, got {got}"
            )
        return new

    def one_step(
        self,
        gx: Tensor,
        gh: Tensor,
        states: Sequence[Tensor],
        vectors: Tensor | None = None,
        heads: int = 1,
    ) -> tuple[Tensor, ...]:
        """The new states [B, H] after one step.

        Args:
            gx: the input's part of the gates, ``x W_ih^T + b_ih`` [B, G*H].
            gh: the recurrent part, ``h W_hh^T + b_hh`` [B, G*H].
            states: [B, H] each.
            vectors: the parameters [P, H], or None for a cell without.
            heads: that lie side by side in each [B, H].
        """
        if not self.apart:
            slots: Sequence[Tensor] = (gx + gh).chunk(self.blocks, -1)
        else:
            parts = zip(gx.chunk(self.blocks, -1), gh.chunk(self.blocks, -1), strict=True)
            both = [
                (x, h) if gate in self.apart else (x + h,)
                for gate, (x, h) in zip(self.gates, parts, strict=True)
            ]
            slots = [slot for part in both for slot in part]
        own = () if vectors is None else vectors.unbind()
        if heads == 1 or not self.mixes_units:
            return self.call(slots, states, own)
        by_part = [[t.chunk(heads, -1) for t in given] for given in (slots, states, own)]
        new = [self.call(*[[t[head] for t in given] for given in by_part]) for head in range(heads)]
        return tuple([torch.cat(state, -1) for state in zip(*new, strict=True)])

    @cached_property
    def _kernels(self) -> KernelCell | str:
        if self.kernels_of is None:
            return f"there are no kernels for {self.name}"
        try:
            return self.kernels_of(self)
        except ValueError as reason:
            return str(reason)

    @property
    def kernels(self) -> KernelCell | None:
        """How the Triton kernels run it, or None."""
        return None if isinstance(self._kernels, str) else self._kernels

    @property
    def no_kernels(self) -> str | None:
        """Why they do not, or None."""
        return self._kernels if isinstance(self._kernels, str) else None

    # ---- a cell is one thing, wherever it is named ----------------------------------------------

    def __repr__(self) -> str:
        return f"<cell {self.name}: gates {self.gates}, states {self.states}>"

    def __deepcopy__(self, memo: Any) -> "Cell":
        return self

    def __copy__(self) -> "Cell":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it by name, as functions are."""
        try:
            found = _find(self.place)
        except (ImportError, AttributeError, ValueError):
            found = None
        if found is not self:
            raise pickle.PicklingError(
                f"a cell is pickled by its name, but {self.place} is not the cell {self.name}: "
                "define it at the top of a module, under the name of its step"
            )
        return restored, (self.place, self.key)


def _find(place: str) -> Any:
    """What stands in a module under a dotted name."""
    module, _, name = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def restored(place: str, key: str) -> Cell:
    """The cell of a pickle.

    Raises:
        pickle.UnpicklingError: there is none at its place, or it computes something else.
    """
    try:
        found = _find(place)
    except (ImportError, AttributeError) as error:
        raise pickle.UnpicklingError(f"the cell {place} is not there: {error}") from error
    if not isinstance(found, Cell) or found.key != key:
        raise pickle.UnpicklingError(f"{place} is no longer the cell that was pickled, {key}")
    return found


CELLS: dict[str, Cell] = {}  # by their keys


def cell_of(key: str) -> Cell:
    """The cell of an operator's arguments.

    Raises:
        RuntimeError: it has not been defined in this process.
    """
    if key not in CELLS:
        raise RuntimeError(f"there is no cell {key}: import the module that defines it")
    return CELLS[key]

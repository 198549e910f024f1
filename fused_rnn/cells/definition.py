"""How a cell is written: a step in PyTorch, and the names of what it takes."""

import hashlib
import keyword
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fused_rnn.derive.derivation import derivation
from fused_rnn.derive.kernels import kernel_cell
from fused_rnn.spec.cells import CELLS, Cell, TorchFunctions

MOST_STATES = 4
TAKEN = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")  # names of parameters


def cell(
    *,
    gates: str | Sequence[str],
    states: str | Sequence[str],
    parameters: str | Sequence[str] | Mapping[str, float | None] = (),
    apart: str | Sequence[str] = (),
    initial: Mapping[str, float] | None = None,
    pointwise: bool = True,
) -> Callable[[Callable[..., Any]], Cell]:
    """Make a recurrent cell of its step; to be used as a decorator.

    The step computes one time step for all sequences: ``step(gates, state)``, or ``step(gates,
    state, p)`` for a cell with parameters, returns the new states in order, or the only one. Its
    arguments are records: ``gates.i`` [B, H] is the pre-activation of a gate, ``W_ih x + b_ih +
    W_hh h + b_hh``; ``state.c`` [B, H] a state before the step; ``p.alpha`` [H] a parameter. Both
    sweeps are derived from it: :func:`fused_rnn.show` prints them, docs/cells.md explains.

    Args:
        gates: names of the gates, in the order of their H rows of ``weight_ih`` and ``weight_hh``;
            a string is a name for each letter.
        states: names of the states, one to four, the first one h, which is put out and goes into
            the recurrent product.
        parameters: names of the cell's own parameters, vectors [H] of the layer. A mapping says
            what each is set to at first; None, as without, is U(-1/sqrt(H), 1/sqrt(H)).
        apart: gates whose two parts the step gets, for "n" as ``gates.n_x`` and ``gates.n_h``.
        initial: what a state begins with where no initial state is given; by default 0.
        pointwise: whether each element of the new states depends on the same element of what the
            step takes. If not, only the eager loop runs the cell: nothing can be derived.

    Returns:
        a decorator, which returns the :class:`fused_rnn.spec.cells.Cell`

    Raises:
        TypeError: a name is no string.
        ValueError: a name is no identifier, or taken, or there are too many states; or the step
            does something that is not pointwise, whose line is named.

    Example:
        >>> import torch
        >>> from fused_rnn import FusedRecurrent, cell
        >>> @cell(gates="fg", states="h")
        ... def minimal(gates, state):
        ...     return torch.lerp(state.h, torch.tanh(gates.g), torch.sigmoid(gates.f))
        >>> layer = FusedRecurrent(minimal, 3, 5)
        >>> output, h_n = layer(torch.randn(7, 2, 3))
        >>> output.shape, h_n.shape, layer.weight_hh_l0.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]), torch.Size([10, 5]))
    """

    def decorate(step: Callable[..., Any]) -> Cell:
        if not callable(step):
            raise TypeError(f"a cell is made of its step, a function, got {type(step).__name__}")
        name = getattr(step, "__name__", type(step).__name__)
        options: dict[str, Any] = {"apart": apart, "initial": initial, "pointwise": pointwise}
        return define(name, step, gates, states, parameters, **options)

    return decorate


def define(
    name: str,
    step: Callable[..., Any],
    gates: str | Sequence[str],
    states: str | Sequence[str],
    parameters: str | Sequence[str] | Mapping[str, float | None] = (),
    *,
    apart: str | Sequence[str] = (),
    initial: Mapping[str, float] | None = None,
    pointwise: bool = True,
    torch: TorchFunctions | None = None,
) -> Cell:
    """:func:`cell` as a function; torch.nn's cells, which have ``torch``, are derived when used."""
    names = _names("gates", gates), _names("states", states), _names("parameters", parameters)
    split = _names("apart", apart)
    _check(name, *names, split, initial or {})
    kind = step if hasattr(step, "__qualname__") else type(step)  # an object that can be called
    place = f"{kind.__module__}:{kind.__qualname__}"
    parts: dict[str, Any] = {
        "name": name,
        "gates": names[0],
        "states": names[1],
        "step": step,
        "parameters": names[2],
        "apart": split,
        "initial": tuple([float((initial or {}).get(s, 0.0)) for s in names[1]]),
        "begin": tuple([_begin(n, parameters) for n in names[2]]),
        "pointwise": pointwise,
    }
    if torch is None:
        draft = Cell(**parts)
        parts["mixes_units"] = not pointwise or derivation(draft).mixes_units
        key = f"{name}@{_mark(draft, place)}"
        while key in CELLS and not pointwise and CELLS[key].step is not step:
            key += "'"  # defined again: nobody can tell whether it is the same
    else:
        key, place = name, f"{kind.__module__}:{name.upper()}"
    made = Cell(**parts, torch=torch, key=key, place=place, kernels_of=kernel_cell)
    CELLS[made.key] = made
    return made


def _begin(name: str, parameters: Any) -> float | None:
    value = parameters[name] if isinstance(parameters, Mapping) else None
    return None if value is None else float(value)


def _mark(cell: Cell, place: str) -> str:
    """What tells a cell from others of its name: a hash of what it computes, or of its place."""
    computed = derivation(cell).text() if cell.pointwise else place
    told = (cell.gates, cell.states, cell.parameters, cell.apart, cell.initial, computed)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _names(what: str, given: Iterable[str]) -> tuple[str, ...]:
    names = tuple(given)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{what} should be names, got {type(name).__name__}")
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(f"{what}: {name!r} is no name of an attribute")
    return names


def _check(
    name: str,
    gates: tuple[str, ...],
    states: tuple[str, ...],
    parameters: tuple[str, ...],
    apart: tuple[str, ...],
    initial: Mapping[str, float],
) -> None:
    if not gates:
        raise ValueError(f"the cell {name} should have a gate at least")
    if not 1 <= len(states) <= MOST_STATES:
        raise ValueError(
            f"the cell {name} should have 1 to {MOST_STATES} states, got {len(states)}"
        )
    slots = [part for g in gates for part in ((g + "_x", g + "_h") if g in apart else (g,))]
    for what, names in (("gates", slots), ("states", states), ("parameters", parameters)):
        twice = sorted({n for n in names if list(names).count(n) > 1})
        if twice:
            raise ValueError(f"the {what} of the cell {name} should differ, got {twice} twice")
    unknown = sorted({*apart} - {*gates}), sorted({*initial} - {*states})
    if unknown[0]:
        raise ValueError(f"apart: the cell {name} has no gates {unknown[0]}")
    if unknown[1]:
        raise ValueError(f"initial: the cell {name} has no states {unknown[1]}")
    taken = sorted({*parameters} & {*TAKEN})
    if taken:
        raise ValueError(f"parameters: {taken} are names of a layer's weights")


def surrogate(value: Tensor, smooth: Tensor) -> Tensor:
    """``value`` on the way forward, with the derivative of ``smooth`` on the way back.

    For steps that have no useful derivative, as the spike of a neuron: the sweeps compute no more
    than ``value``, and differentiate ``smooth``. (E. O. Neftci, H. Mostafa, F. Zenke, "Surrogate
    gradient learning in spiking neural networks", IEEE Signal Processing Magazine 36, 2019.)

    Args:
        value: [B, H], what is computed.
        smooth: [B, H], finite, what is differentiated.

    Example:
        >>> import torch
        >>> from fused_rnn import surrogate
        >>> v = torch.tensor([0.5, 2.0], requires_grad=True)
        >>> spike = surrogate((v > 1).to(v.dtype), torch.sigmoid(4 * (v - 1)))
        >>> spike.tolist()
        [0.0, 1.0]
        >>> torch.autograd.grad(spike.sum(), v)[0].tolist() == [0.0, 0.0]
        False
    """
    return value.detach() + (smooth - smooth.detach())

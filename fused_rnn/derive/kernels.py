"""What the Triton kernels need of a cell, from its derivation: its slots and its functions."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from fused_rnn.derive.derivation import Derivation, derivation
from fused_rnn.derive.expressions import Expression
from fused_rnn.derive.linear import Form, Sum
from fused_rnn.derive.source import Writer, load, number
from fused_rnn.kernels.cell import CellFunctions, KernelCell
from fused_rnn.spec.cells import Cell

MOST_SLOTS = 4  # of a unit in the kernels
SPLIT = (2, 3)  # the slots of the last gate's input and recurrent part, where they are apart


def kernel_cell(cell: Cell) -> KernelCell:
    """How the kernels run it.

    Raises:
        ValueError: they cannot, and why.
    """
    x_slots, h_slots = _slots(cell)
    places = _places(cell)
    derived = derivation(cell)
    return KernelCell(
        cell.key,
        states=len(cell.states),
        x_slots=x_slots,
        h_slots=h_slots,
        functions=lambda: functions(cell),
        activate=_activation(cell, derived, places),
        parameters=len(cell.parameters),
        needs_h=derived.needs_h,
        keeps_gates=derived.keeps_slots,
        factors=len(derived.factors),
        masks_padding=not derived.rests_at_zero,
        whole=derived.mixes_units,
    )


def _slots(cell: Cell) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The slots of each gate's input part, and of its recurrent part."""
    if not cell.pointwise:
        raise ValueError(f"the step of {cell.name} is not pointwise")
    G = len(cell.gates)
    if cell.apart:
        others = cell.gates[:-1]
        if cell.apart != cell.gates[-1:] or not 1 <= len(others) <= SPLIT[0]:
            raise ValueError(
                f"the kernels can hold the parts of the last of two or three gates apart, not "
                f"those of {cell.apart} of {cell.gates}"
            )
        return tuple(range(G - 1)) + SPLIT[:1], tuple(range(G - 1)) + SPLIT[1:]
    if G > MOST_SLOTS:
        raise ValueError(f"the kernels hold up to {MOST_SLOTS} gates, {cell.name} has {G}")
    return tuple(range(G)), tuple(range(G))


def _places(cell: Cell) -> tuple[int, ...]:
    """The kernels' slot of each of the cell's slots."""
    parts = zip(cell.gates, *_slots(cell), strict=True)
    both = [(x, h) if gate in cell.apart else (x,) for gate, x, h in parts]
    return tuple([place for part in both for place in part])


def source(cell: Cell) -> str:
    """The text of its Triton functions.

    Raises:
        ValueError: the kernels cannot run it, and why.
    """
    places = _places(cell)
    return triton_source(cell.name, derivation(cell), places, _kernel_slots(places))


def _kernel_slots(places: tuple[int, ...]) -> int:
    return 1 if len(places) == 1 else MOST_SLOTS


@cache
def functions(cell: Cell) -> CellFunctions:
    """Its Triton functions, made when a kernel is to run: nothing else imports Triton."""
    import triton
    import triton.language as tl

    from fused_rnn.kernels.functions import expm1, layer_center, layer_norm, layer_rstd, log1p
    from fused_rnn.kernels.tiles import sigmoid, tanh

    used = (expm1, layer_center, layer_norm, layer_rstd, log1p, sigmoid, tanh)
    space = {"triton": triton, "tl": tl} | {f.__name__: f for f in used}
    made = load(cell.name, source(cell), space)
    parts = [made[f"{cell.name}_{part}"] for part in ("step", "factors", "adjoint", "others")]
    return CellFunctions(*parts)


def _activation(
    cell: Cell, d: Derivation, places: tuple[int, ...]
) -> Callable[[Tensor, Sequence[Tensor], Tensor | None], None]:
    """``activate`` of :class:`fused_rnn.kernels.cell.KernelCell`."""

    @cache
    def made() -> Any:
        import torch

        writer = Writer("torch", d.inputs())
        writer.plan(d.saved)
        saved = [writer.write(e) for e in d.saved]
        names = [*d.slots, *d.states, *d.parameters, "one"]
        lines = "\n".join(f"    {line}" for line in writer.lines)
        text = f"def saved({', '.join(names)}):\n{lines}\n    return {', '.join(saved)},\n"
        return load(cell.name, text, {"torch": torch})["saved"]

    def activate(slots: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
        given = [slots[..., place] for place in places]
        own = [] if vectors is None else list(vectors)
        saved = made()(*given, *before, *own, slots.new_ones(()))
        for place, new in zip(places, saved, strict=True):
            slots[..., place] = new

    return activate


# ---- the text of the functions -------------------------------------------------------------------


def triton_source(name: str, d: Derivation, places: tuple[int, ...], S: int) -> str:
    """The text of the four functions, which are called ``{name}_step`` and so on.

    Args:
        name: an identifier.
        d: the derivation.
        places: the kernels' slot of each of its slots.
        S: slots of the kernels, 1 or 4.
    """
    parts = [
        _step(name, d, places, S),
        _factors(name, d, places),
        _adjoint(name, d, places, S),
        _others(name, d, places),
    ]
    return "\n\n\n".join(parts) + "\n"


def _step(name: str, d: Derivation, places: tuple[int, ...], S: int) -> str:
    writer = Writer("triton", d.inputs(), map(d.leaf, d.parameters))
    saved = [writer.write(e) for e in d.saved]
    # A state of parameters, or numbers, alone is no tile yet.
    new = [
        f"tl.zeros_like(pre[0]) + {writer.write(e)}" if writer.is_narrow(e) else writer.write(e)
        for e in d.new
    ]
    by_place = dict(zip(places, saved, strict=True))
    # A slot that the cell has no use for holds what another one does: nothing is computed for it.
    slots = [by_place.get(i, saved[0]) for i in range(S)]
    head = f"def {name}_step(pre, state, params, H: tl.constexpr, FAST: tl.constexpr):"
    reads = [
        *_reads("pre", d.slots, places),
        *_reads("state", d.states),
        *_reads("params", d.parameters),
    ]
    return _function(head, reads, writer.lines, f"{_tuple(slots)}, {_tuple(new)}")


def _factors(name: str, d: Derivation, places: tuple[int, ...]) -> str:
    writer = Writer("triton", d.bound_saved() | d.bound_states())
    names = [writer.write(e) for e in d.factors]
    head = f"def {name}_factors(saved, now, before, params, H: tl.constexpr, FAST: tl.constexpr):"
    return _function(head, _known_reads(d, places), writer.lines, _tuple(names))


def _others(name: str, d: Derivation, places: tuple[int, ...]) -> str:
    known = {d.leaf(s): s for s in d.states} | d.bound_saved()
    writer = Writer("triton", known, map(d.leaf, d.parameters))
    names = [
        f"tl.zeros_like(saved[0]) + {writer.write(e)}" if writer.is_narrow(e) else writer.write(e)
        for e in d.new[1:]
    ]
    head = f"def {name}_others(saved, before, params, H: tl.constexpr, FAST: tl.constexpr):"
    return _function(head, _known_reads(d, places), writer.lines, _tuple(names))


def _adjoint(name: str, d: Derivation, places: tuple[int, ...], S: int) -> str:
    at = {factor: f"k[{i}]" for i, factor in enumerate(d.factors)}
    lines = [f"{s.name} = {_centered(s, at)}" for s in d.adjoint.sums]
    results = [_sum(form, at) for form in d.adjoint.results]
    slots, states = results[: len(d.slots)], results[len(d.slots) :][: len(d.states)]
    by_place = dict(zip(places, slots, strict=True))
    dslots = [by_place.get(i, "none") for i in range(S)]
    dparams = results[len(d.slots) + len(d.states) :]
    reads = [f"d{i} = grads[{i}]" for i in range(len(d.states))]
    head = f"def {name}_adjoint(k, grads, none, H: tl.constexpr):"
    return _function(head, reads, lines, f"{_tuple(dslots)}, {_tuple(states)}, {_tuple(dparams)}")


def _centered(one: Sum, at: dict[Expression, str]) -> str:
    text = _sum(one.form, at)
    return text if one.y is None else f"layer_center({text}, {at[one.y]}, H)"


def _sum(form: Form, at: dict[Expression, str]) -> str:
    """The text of a form; "none" for zero."""
    terms = []
    for base, factor in form.items():
        value = factor.value
        if value is None:
            terms.append(f"{base} * {at[factor]}")
        elif value == 1:
            terms.append(base)
        elif value != 0:
            terms.append(f"{base} * {number(value)}")
    return " + ".join(terms) or "none"


def _known_reads(d: Derivation, places: tuple[int, ...]) -> list[str]:
    others = [f"new_{s.removeprefix('state_')}" for s in d.states[1:]]
    return [
        *_reads("saved", d.slots, places),
        *_reads("now", others),
        *_reads("before", d.states),
        *_reads("params", d.parameters),
    ]


def _reads(
    tuple_: str, names: tuple[str, ...] | list[str], places: tuple[int, ...] | None = None
) -> list[str]:
    at = places or range(len(names))
    return [f"{name} = {tuple_}[{i}]" for name, i in zip(names, at, strict=True)]


def _function(head: str, reads: list[str], lines: list[str], returns: str) -> str:
    """A jitted function, without the reads of what it does not use."""
    rest = " ".join([*lines, returns]).replace("(", " ").replace(")", " ").replace(",", " ")
    words = set(rest.replace("-", " ").replace("~", " ").split())
    body = [r for r in reads if r.split(" = ")[0] in words] + lines
    return "\n".join(
        ["@triton.jit", head, *(f"    {line}" for line in body), f"    return {returns}"]
    )


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"

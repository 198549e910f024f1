"""What the sweeps of a cell compute, derived from its step in PyTorch."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property

from fused_rnn.derive.expressions import Expression, Expressions, reachable
from fused_rnn.derive.linear import Adjoint, linear
from fused_rnn.derive.operations import MIXING, value_of
from fused_rnn.derive.trace import trace
from fused_rnn.spec.cells import Cell

ACTIVATIONS = ("sigmoid", "tanh", "relu")  # whose value tells their derivative
Bound = dict[Expression, str]  # what is known by a name, and need not be computed


@dataclass(frozen=True, eq=False)
class Derivation:
    """A cell's step and its adjoint, taken apart.

    Attributes:
        slots: names of the pre-activations, "gate_i" and so on, in the order of
            :attr:`fused_rnn.spec.cells.Cell.slots`.
        states: names of the states, "state_h" first.
        parameters: names of the parameters of a unit, "own_p" and so on.
        make: in which all of it is written.
        new: the new states, in terms of slots, states and parameters.
        saved: what a step saves in the place of each slot.
        factors: all that the adjoint multiplies gradients by, constants aside.
        adjoint: of the slots, the states and the parameters.
    """

    slots: tuple[str, ...]
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    make: Expressions
    new: list[Expression]
    saved: list[Expression]
    factors: list[Expression]
    adjoint: Adjoint

    # ---- what is known when ---------------------------------------------------------------------

    def leaf(self, name: str) -> Expression:
        """The input of that name."""
        return self.make.leaf(name)

    def bound_saved(self) -> Bound:
        """What the reverse sweep reads: the saved slots and the parameters, by the slots' names."""
        known = {self.leaf(p): p for p in self.parameters}
        for name, expression in zip(self.slots, self.saved, strict=True):
            known.setdefault(expression, name)
        return known

    def bound_states(self) -> Bound:
        """The states before the step, and those beside h after it, as "new_c"."""
        known = {self.leaf(s): s for s in self.states}
        for name, expression in zip(self.states[1:], self.new[1:], strict=True):
            known.setdefault(expression, name.replace("state_", "new_", 1))
        return known

    def inputs(self) -> Bound:
        """The inputs of the step itself."""
        return {self.leaf(name): name for name in (*self.slots, *self.states, *self.parameters)}

    # ---- what follows from it -------------------------------------------------------------------

    @cached_property
    def needs_h(self) -> bool:
        """Whether the factors need h before the step."""
        known = self.bound_saved() | self.bound_states()
        needed = _unbound(self.factors, set(known) - {self.leaf(self.states[0])})
        return self.leaf(self.states[0]) in needed

    @cached_property
    def keeps_slots(self) -> bool:
        """Whether the slots must be saved: those of a cell whose one slot is its h need not."""
        return self.saved != [self.new[0]]

    @cached_property
    def mixes_units(self) -> bool:
        """Whether a unit depends on the others of its head, beside the recurrent product."""
        return any(node.op in MIXING for node in reachable([*self.new, *self.factors]))

    @cached_property
    def rests_at_zero(self) -> bool:
        """Whether zeros stay zeros in every step, and on the way back all is finite for zeros.

        If not, the kernels must clear the units that only fill up a tile, and load as zeros.
        """
        step = _values(self.new, dict.fromkeys(self.inputs(), 0.0))
        back = _values(self.factors, dict.fromkeys(self.bound_saved() | self.bound_states(), 0.0))
        return step == [0.0] * len(step) and all(map(math.isfinite, back))

    def text(self) -> str:
        """All that is computed, way back included: the same text for the same computation."""
        numbers: dict[Expression, int] = {}
        lines = []
        for node in reachable([*self.new, *self.factors]):
            numbers[node] = len(numbers)
            given = node.args if not node.operands else [numbers[o] for o in node.operands]
            lines.append(f"{node.op} {given}")
        for form in self.adjoint.forms:
            terms = [
                (base, f.value if f.value is not None else numbers[f]) for base, f in form.items()
            ]
            lines.append(f"{terms}")
        lines += [f"{s.name} {numbers[s.y]}" for s in self.adjoint.sums if s.y is not None]
        return "\n".join([*lines, f"{[numbers[n] for n in self.new]}"])


@cache
def derivation(cell: Cell) -> Derivation:
    """That of a cell, made once.

    In a thread of its own: a tracer, a transform or autocast that is at work here is not there.
    """
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(derive, cell).result()


def derive(cell: Cell) -> Derivation:
    """Trace the step of a cell, and take it apart.

    Raises:
        ValueError: it does something that is not pointwise, or that has no rule; or it returns
            another number of states.
    """
    slots = tuple([f"gate_{name}" for name in cell.slots])
    states = tuple([f"state_{name}" for name in cell.states])
    parameters = tuple([f"own_{name}" for name in cell.parameters])
    ends = len(slots), len(slots) + len(states)

    def step(*inputs: object) -> tuple[object, ...]:
        return cell.call(inputs[: ends[0]], inputs[ends[0] : ends[1]], inputs[ends[1] :])

    make, new, gradients = trace(step, (*slots, *states, *parameters), cell.step)  # type: ignore[arg-type]
    adjoint = linear(make, gradients, len(states))
    factors = _factors(adjoint)
    saved = _saved(make, slots, states, parameters, new, factors)
    return Derivation(slots, states, parameters, make, new, saved, factors, adjoint)


def _values(roots: list[Expression], known: dict[Expression, float]) -> list[float]:
    """What ``roots`` are, given the values of what they are made of."""
    values = dict(known)

    def value(node: Expression) -> float:
        if node not in values:
            number, operands = node.value, [value(o) for o in node.operands]
            values[node] = value_of(node.op, *operands) if number is None else number
        return float(values[node])

    return [value(root) for root in roots]


def _factors(adjoint: Adjoint) -> list[Expression]:
    """Those that are no constants, each once; and what was normalised."""
    forms = adjoint.results + [s.form for s in adjoint.sums]
    factors = [f for form in forms for f in form.values() if f.value is None]
    return list(dict.fromkeys(factors + adjoint.normalised))


def _unbound(roots: list[Expression], bound: set[Expression]) -> set[Expression]:
    """The leaves that are needed to compute ``roots`` from what is ``bound``."""
    needed: set[Expression] = set()
    seen: set[Expression] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in bound or node in seen:
            continue
        seen.add(node)
        if node.op == "leaf":
            needed.add(node)
        stack.extend(node.operands)
    return needed


def _saved(
    make: Expressions,
    slots: tuple[str, ...],
    states: tuple[str, ...],
    parameters: tuple[str, ...],
    new: list[Expression],
    factors: list[Expression],
) -> list[Expression]:
    """In the place of each slot, its activation where nothing else of it is needed, or itself."""
    users: dict[Expression, list[Expression]] = {}
    for node in reachable(new):
        for operand in set(node.operands):
            users.setdefault(operand, []).append(node)
    counts = Counter(new)
    saved = [make.leaf(name) for name in slots]
    for i, name in enumerate(slots):
        node = raw = make.leaf(name)
        while len(users.get(node, [])) == 1 and not counts[node]:
            (node,) = users[node]
            if node.op in ACTIVATIONS:
                others = [*saved[:i], node, *saved[i + 1 :]]
                known = {*others, *map(make.leaf, (*states, *parameters)), *new[1:]}
                # With zoneout what a step makes of the states is not what follows it.
                alone = known - set(new[1:])
                if raw not in _unbound(factors, known) | _unbound(new[1:], alone):
                    saved[i] = node
                break
            if node.op not in ("add", "sub"):
                break
    return saved

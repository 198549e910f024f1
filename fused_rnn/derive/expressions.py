"""Pointwise expressions: each distinct one exists once, constants are folded as they are made."""

import math
from collections.abc import Iterable, Iterator

from fused_rnn.derive.operations import OPERATIONS, value_of


class Expression:
    """A node of a graph without circles; equal nodes are the same object.

    Attributes:
        op: an entry of :data:`fused_rnn.derive.operations.OPERATIONS`, "leaf" or "constant".
        args: its operands; of a leaf its name, of a constant its value.
    """

    __slots__ = ("args", "op")

    def __init__(self, op: str, args: tuple[object, ...]) -> None:
        self.op, self.args = op, args

    def __repr__(self) -> str:
        if self.op in ("leaf", "constant"):
            return str(self.args[0])
        return f"{self.op}({', '.join(map(repr, self.args))})"

    @property
    def operands(self) -> "tuple[Expression, ...]":
        """The expressions that it is made of."""
        return () if self.op in ("leaf", "constant") else self.args  # type: ignore[return-value]

    @property
    def value(self) -> float | None:
        """That of a constant, else None."""
        return self.args[0] if self.op == "constant" else None  # type: ignore[return-value]

    @property
    def is_condition(self) -> bool:
        """Whether it is true or false, not a number."""
        return self.op in OPERATIONS and OPERATIONS[self.op].condition


class Expressions:
    """The expressions of one derivation."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Expression] = {}
        self.zero, self.one = self.constant(0.0), self.constant(1.0)

    def leaf(self, name: str) -> Expression:
        """An input."""
        return self._once("leaf", (name,))

    def constant(self, value: float) -> Expression:
        """A number."""
        return self._once("constant", (float(value),))

    def make(self, op: str, *args: Expression) -> Expression:
        """``op`` of the operands, or what is equal to it and simpler."""
        values = [a.value for a in args]
        numbers = [v for v in values if v is not None]
        if len(numbers) == len(args) and op != "where":
            folded = value_of(op, *numbers)
            if not isinstance(folded, bool):
                return self.constant(folded)
        simpler = self._simpler(op, args, values)
        return self._once(op, args) if simpler is None else simpler

    def _once(self, op: str, args: tuple[object, ...]) -> Expression:
        # -0.0 and 0.0 are equal, and differ.
        key = (op, repr(args[0])) if op == "constant" else (op, *args)
        if key not in self._known:
            self._known[key] = Expression(op, args)
        return self._known[key]

    def _simpler(
        self, op: str, args: tuple[Expression, ...], values: list[float | None]
    ) -> Expression | None:
        """A part, or another expression, that equals ``op`` of ``args`` for all finite numbers."""
        if op in ("add", "mul") and values[0] is not None and values[1] is None:  # constants last
            return self.make(op, args[1], args[0])
        if op == "add":
            return args[0] if values[1] == 0 else None
        if op == "sub":
            if values[1] == 0:
                return args[0]
            if args[0] is args[1]:
                return self.zero
            return self.make("neg", args[1]) if values[0] == 0 else None
        if op == "mul":
            if values[1] == 0:
                return self.zero
            if values[1] == -1:
                return self.make("neg", args[0])
            return args[0] if values[1] == 1 else None
        if op == "div":
            if values[0] == 0:
                return self.zero
            # A power of two divides without rounding, so its inverse multiplies to the same.
            if values[1] and math.frexp(values[1])[0] in (0.5, -0.5):
                return self.make("mul", args[0], self.constant(1 / values[1]))
            return None
        if op == "neg" and args[0].op == "neg":
            return args[0].operands[0]
        if op == "where":
            known = _truth(args[0])
            if args[1] is args[2] or known is not None:
                return args[2] if known is False else args[1]
        return None


def _truth(condition: Expression) -> bool | None:
    """That of a condition of constants, None of another one."""
    operands = [_truth(o) if o.is_condition else o.value for o in condition.operands]
    known = [o for o in operands if o is not None]
    return bool(value_of(condition.op, *known)) if len(known) == len(operands) else None


def reachable(roots: Iterable[Expression]) -> Iterator[Expression]:
    """All that ``roots`` are made of, each once, operands before what is made of them."""
    seen: set[Expression] = set()

    def visit(node: Expression) -> Iterator[Expression]:
        if node in seen:
            return
        seen.add(node)
        for operand in node.operands:
            yield from visit(operand)
        yield node

    for root in roots:
        yield from visit(root)

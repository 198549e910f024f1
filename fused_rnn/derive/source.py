"""Expressions to straight-line code, and code to functions."""

import copy
import hashlib
import linecache
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fused_rnn.derive.expressions import Expression, reachable
from fused_rnn.derive.operations import OPERATIONS

Syntax = Literal["triton", "torch"]


class Writer:
    """Lines that compute expressions, each once and only if it is needed.

    Attributes:
        lines: so far.
    """

    def __init__(
        self, syntax: Syntax, bound: Mapping[Expression, str], narrow: Iterable[Expression] = ()
    ) -> None:
        self.lines: list[str] = []
        self._narrow = set(narrow)  # inputs [H]: what is made of them alone fills no [n, H]
        self._syntax = syntax
        self._names = dict(bound)
        self._uses: Counter[Expression] = Counter()
        self._count = 0
        self._temporary: set[str] = set()

    def branch(self) -> "Writer":
        """One that goes on from here by itself, with lines of its own."""
        other = copy.copy(self)
        other.lines, other._names, other._uses = [], dict(self._names), self._uses.copy()
        return other

    def name(self, expression: Expression) -> str | None:
        """Of an expression that is known."""
        return self._names.get(expression)

    def bind(self, expression: Expression, name: str) -> None:
        """Let ``expression`` be known as ``name``."""
        self._names[expression] = name

    def plan(self, roots: Iterable[Expression]) -> None:
        """Say what will be written: PyTorch's fused calls take in what is used once."""
        roots = list(roots)
        self._uses.update(roots)
        for node in self._missing(roots):
            self._uses.update(node.operands)

    def write(self, root: Expression, out: str | None = None, fresh: bool = False) -> str:
        """The name, or number, of ``root`` after lines that compute it.

        Args:
            root: what is to be computed.
            out: the name of a tensor that takes the result; by default a new one.
            fresh: whether nothing in ``out`` is needed, so that it may hold parts of it before.
        """
        if self._syntax == "torch" and root not in self._names and root.value is None:
            return self._write_torch(root, out, fresh)
        for node in self._missing([root]):
            text = OPERATIONS[node.op].triton.format(*map(self._known, node.operands))
            self._line(node, text)
        return self._known(root)

    def _write_torch(self, root: Expression, out: str | None, fresh: bool) -> str:
        fused = self._fused(root)
        operands = fused[1] if fused else root.operands
        inside = self._within(operands, out, fresh)
        for operand in operands:
            if operand is not inside:
                self.write(operand)
        if inside is not None:  # the last, so that nothing else is computed once it is overwritten
            self.write(inside, out, fresh)
        text = fused[0].format(*map(self._known, operands)) if fused else self._torch(root)
        if out is not None and self.is_narrow(root):
            self.lines.append(f"{out}.copy_({text})")
            self._names[root] = out
            return out
        for operand in operands:
            self._uses[operand] -= 1
        if out is None and not root.is_condition:
            out = self._free(operands, text)
        if out is None:
            return self._line(root, text)
        self.lines.append(into(text, out))
        self._names[root] = out
        return out

    def _free(self, operands: tuple[Expression, ...], text: str) -> str | None:
        """A temporary among the operands that nothing needs any more, to hold the result."""
        if ".copy_(" in into(text, ""):
            return None
        for operand in operands:
            name = self._names.get(operand, "")
            mine = name in self._temporary and not operand.is_condition
            if mine and self._uses[operand] <= 0 and not self.is_narrow(operand):
                return name
        return None

    def _within(
        self, operands: tuple[Expression, ...], out: str | None, fresh: bool
    ) -> Expression | None:
        """The operand that can be computed in ``out``, to be overwritten by what is made of it."""
        if out is None:
            return None
        for operand in operands:
            if operand in self._names or operand.value is not None or operand.is_condition:
                continue
            takes = any(self._names.get(o) == out for o in operand.operands)
            alone = operands.count(operand) == 1 and self._uses[operand] == 1
            if alone and (fresh or takes) and not self.is_narrow(operand):
                return operand
        return None

    def is_narrow(self, root: Expression) -> bool:
        """Whether it is made of parameters alone."""
        leaves = [node for node in reachable([root]) if node.op == "leaf"]
        return all(leaf in self._narrow for leaf in leaves)

    def _missing(self, roots: list[Expression]) -> list[Expression]:
        """What has to be computed for ``roots``, operands first."""
        order: list[Expression] = []
        seen: set[Expression] = set()

        def visit(node: Expression) -> None:
            if node in self._names or node in seen or node.value is not None:
                return
            seen.add(node)
            for operand in node.operands:
                visit(operand)
            if node.op == "leaf":
                raise KeyError(f"{node} is not known here")
            order.append(node)

        for root in roots:
            visit(root)
        return order

    def _known(self, node: Expression) -> str:
        return self._names[node] if node.value is None else number(node.value)

    def _line(self, node: Expression, text: str) -> str:
        name = f"v{self._count}"
        self._count += 1
        self._temporary.add(name)
        self.lines.append(f"{name} = {text}")
        self._names[node] = name
        return name

    def _fused(self, node: Expression) -> tuple[str, tuple[Expression, ...]] | None:
        """One call of PyTorch for a sum with a product, and its operands."""
        if node.op == "mul":
            for x, rest in (node.operands, node.operands[::-1]):
                one_less = rest.op == "sub" and rest.operands[0].value == 1
                if one_less and self._once(rest) and not (self.is_narrow(x) or x.value):
                    y = rest.operands[1]  # x (1 - y) = x - x y
                    if y is x:
                        return "torch.addcmul({0}, {0}, {0}, value=-1)", (x,)
                    if y.value is None and y.op != "mul":  # else 1 - y takes one call itself
                        return "torch.addcmul({0}, {0}, {1}, value=-1)", (x, y)
        if node.op not in ("add", "sub"):
            return None
        for first, second in ((0, 1), (1, 0)) if node.op == "add" else ((0, 1),):
            other, product = node.operands[first], node.operands[second]
            if affine := self._affine(node, other, product):
                return affine
            if product.op == "mul" and self._once(product) and other.value in (None, 1):
                a, b = product.operands
                if other.value == 1:
                    sign = "" if node.op == "add" else ", value=-1"
                    if b.value is None:
                        return f"torch.addcmul(one, {{0}}, {{1}}{sign})", (a, b)
                    continue
                sign = "" if node.op == "add" else "-"
                if b.value is not None:
                    return f"torch.add({{0}}, {{1}}, alpha={sign}{number(b.value)})", (other, a)
                value = "" if node.op == "add" else ", value=-1"
                return f"torch.addcmul({{0}}, {{1}}, {{2}}{value})", (other, a, b)
        return None

    def _affine(
        self, node: Expression, bias: Expression, product: Expression
    ) -> tuple[str, tuple[Expression, ...]] | None:
        """A layer norm with its weight and bias, vectors [H], and its operands."""
        if node.op != "add" or product.op != "mul" or not self._once(product):
            return None
        for norm, weight in (product.operands, product.operands[::-1]):
            if norm.op == "layer_norm" and self._once(norm):
                x, eps = norm.operands
                narrow = all([v.value is None and self.is_narrow(v) for v in (weight, bias)])
                if narrow and not self.is_narrow(x) and eps.value is not None:
                    text = f"layer_norm({{0}}, {number(eps.value)}, {{1}}, {{2}})"
                    return text, (x, weight, bias)
        return None

    def _once(self, node: Expression) -> bool:
        """Whether it is computed for one thing alone."""
        return node not in self._names and self._uses[node] == 1

    def _torch(self, node: Expression) -> str:
        operands = node.operands
        texts = [self._known(o) for o in operands]
        numbers = [o.value for o in operands]
        if node.op == "where" and None not in numbers[1:]:
            if numbers[1:] == [1.0, 0.0]:
                return f"{texts[0]}.to(one.dtype)"
            return f"torch.where({texts[0]}, one * {texts[1]}, one * {texts[2]})"
        if node.op in ("maximum", "minimum") and numbers != [None, None]:
            constant = numbers.index(next(n for n in numbers if n is not None))
            bound = "min" if node.op == "maximum" else "max"
            return f"torch.clamp({texts[1 - constant]}, {bound}={texts[constant]})"
        if node.op == "lerp" and numbers[:2] != [None, None]:
            return f"{texts[0]} + {texts[2]} * ({texts[1]} - {texts[0]})"
        if node.op in ("add", "sub", "mul", "div"):
            if numbers[0] is not None and node.op == "sub":
                return f"torch.rsub({texts[1]}, {texts[0]})"
            if numbers[0] is None:
                return f"torch.{node.op}({texts[0]}, {texts[1]})"
        return OPERATIONS[node.op].torch.format(*texts)


def number(value: float) -> str:
    """Its text, in PyTorch and in Triton."""
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def into(text: str, out: str) -> str:
    """The line that puts a result into a tensor that is there: a method of it where one does."""
    name, _, rest = text.partition("(")
    function, operands = name.removeprefix("torch."), rest[:-1].split(", ")
    if function in ("where", "rsub", "nn.functional.logsigmoid") or not (
        name != function and rest.endswith(")")
    ):
        return f"{out}.copy_({text})"
    if function == "mul" and operands[1] == out and operands[0] != out:
        operands.reverse()
    if operands[0] == out and function not in ("maximum", "minimum"):
        return f"{out}.{function}_({', '.join(operands[1:])})"
    return f"{out}.copy_({text})" if function == "relu" else f"{text[:-1]}, out={out})"


def load(name: str, text: str, space: dict[str, Any]) -> dict[str, Any]:
    """Run generated code, and return what it defines.

    It is known to :mod:`linecache` under a name that tells its content, so that errors show its
    lines and Triton finds them. Nothing is read from, or written to, a file.

    Args:
        name: what it is for.
        text: of the code.
        space: names that it uses.
    """
    mark = hashlib.sha256(text.encode()).hexdigest()[:12]
    file = f"<fused_rnn {name} {mark}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    defined = {"__name__": f"fused_rnn.derived.{name}", **space}
    exec(compile(text, file, "exec"), defined)
    return defined

"""The adjoint of a step, as sums of products of gradients and factors.

What depends on the gradients of the new states is linear in them. Written as sums of (gradient,
factor), whose factors depend on saved values alone, a sweep forms all factors of a step before the
gradients are known, and what is left to do then is a few multiplications and additions.
"""

from collections import Counter
from typing import NamedTuple

from fused_rnn.derive.expressions import Expression, Expressions, reachable

MOST_MULTIPLIED = 64  # of a product that is looked into
Form = dict[str, Expression]  # the sum over (name of a gradient: its factor)


class Sum(NamedTuple):
    """A gradient that is computed before others are made of it.

    Attributes:
        name: the base that it is from then on.
        form: what is added up.
        y: what was normalised, if the sum is to be centered: p - mean(p) - y mean(p y) over the
            units; or None.
    """

    name: str
    form: Form
    y: Expression | None = None


class Adjoint(NamedTuple):
    """The gradients of a step's inputs.

    Attributes:
        sums: gradients that are used several times, or that all units have a part in; in order.
        results: the gradients of the inputs; an empty form is zero.
    """

    sums: list[Sum]
    results: list[Form]

    @property
    def forms(self) -> list[Form]:
        """All of them."""
        return [s.form for s in self.sums] + self.results

    @property
    def normalised(self) -> list[Expression]:
        """What sums are centered with."""
        return [s.y for s in self.sums if s.y is not None]


def linear(make: Expressions, gradients: list[Expression], states: int) -> Adjoint:
    """Split ``gradients``, which are linear in the leaves "d0" to "d{states - 1}".

    Raises:
        ValueError: they are not linear, as PyTorch's own derivatives always are.
    """
    roots = {make.leaf(f"d{i}") for i in range(states)}
    order = list(reachable(gradients))
    depends = set(roots)
    for node in order:
        if any(operand in depends for operand in node.operands):
            depends.add(node)
    users = Counter(o for node in order if node in depends for o in node.operands)
    users.update(gradients)
    forms: dict[Expression, Form] = {}
    sums: list[Sum] = []

    def base(form: Form, y: Expression | None = None) -> Form:
        """A sum that others are made of, as a base of theirs."""
        sums.append(Sum(f"p{len(sums)}", form, y))
        return {sums[-1].name: make.one}

    for node in order:
        if node not in depends:
            continue
        if node in roots:
            form = {str(node): make.one}
        elif node.op == "layer_center" and node.operands[1] not in depends:
            form = base(forms[node.operands[0]], node.operands[1])
        else:
            form = _form(make, node, forms)
        forms[node] = base(form) if users[node] > 1 and len(form) > 1 else form
    results = [forms.get(g, {}) for g in gradients]
    if any(g not in depends and g.value != 0 for g in gradients):
        raise ValueError("a gradient does not depend on those of the new states")
    return _shared(make, Adjoint(sums, results))


def _shared(make: Expressions, adjoint: Adjoint) -> Adjoint:
    """The same, a factor made of another one where that is a part of its product.

    As a GRU's: with dq = dn r, that of the reset gate, dn q r (1 - r), is dq q (1 - r).
    """
    known: dict[Expression, Counter[Expression]] = {}
    products = {f: _product(f, known) for form in adjoint.forms for f in form.values()}
    order = sorted(products, key=lambda f: products[f].total())
    made: dict[Expression, Expression] = {}
    for factor in order:
        terms, best = products[factor], None
        for other in made:
            part = products[other]
            if 1 < part.total() < terms.total() and part <= terms:
                best = other
        made[factor] = factor
        if best is not None:
            product = made[best]
            for term in (terms - products[best]).elements():
                product = make.make("mul", product, term)
            made[factor] = product
    share = lambda form: {base: made[f] for base, f in form.items()}  # noqa: E731
    return Adjoint(
        [s._replace(form=share(s.form)) for s in adjoint.sums], list(map(share, adjoint.results))
    )


def _product(
    factor: Expression, known: dict[Expression, Counter[Expression]]
) -> Counter[Expression]:
    """What is multiplied to be ``factor``; those of its parts become ``known``."""
    if factor not in known:
        known[factor] = Counter([factor])
        if factor.op == "mul":
            a, b = (_product(operand, known) for operand in factor.operands)
            if (a + b).total() <= MOST_MULTIPLIED:
                known[factor] = a + b
    return known[factor]


def _form(make: Expressions, node: Expression, forms: dict[Expression, Form]) -> Form:
    """Of a node, whose operands have theirs."""
    args = node.operands
    linear = [arg in forms for arg in args]
    if node.op == "neg":
        return {base: make.make("neg", f) for base, f in forms[args[0]].items()}
    if node.op in ("mul", "div") and sum(linear) == 1 and (linear[0] or node.op == "mul"):
        mine, other = (args[0], args[1]) if linear[0] else (args[1], args[0])
        return {base: make.make(node.op, f, other) for base, f in forms[mine].items()}
    if node.op in ("add", "sub") and all(
        there or arg.value == 0 for there, arg in zip(linear, args, strict=True)
    ):
        signs = ("add", node.op)
        form: Form = {}
        for sign, arg in zip(signs, args, strict=True):
            for base, f in forms.get(arg, {}).items():
                form[base] = make.make(sign, form.get(base, make.zero), f)
        return form
    if node.op == "where" and not linear[0]:
        condition, *sides = args
        if all(there or side.value == 0 for there, side in zip(linear[1:], sides, strict=True)):
            both = [forms.get(side, {}) for side in sides]
            bases = list(dict.fromkeys([*both[0], *both[1]]))
            chosen = [[form.get(base, make.zero) for form in both] for base in bases]
            return {
                base: make.make("where", condition, *pair)
                for base, pair in zip(bases, chosen, strict=True)
            }
    raise ValueError(f"the derivative is not linear in the gradient: {node.op}")

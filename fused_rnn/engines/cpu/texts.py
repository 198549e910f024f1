"""The text of what the sweeps of a cell call on a CPU, from its derivation."""

import re
from collections import Counter
from collections.abc import Container, Iterator
from itertools import groupby

from fused_rnn.derive.derivation import ACTIVATIONS, Bound, Derivation
from fused_rnn.derive.expressions import Expression, reachable
from fused_rnn.derive.linear import Form
from fused_rnn.derive.source import Writer, into, number


class Parts:
    """A derivation, its slots in the order of a buffer, and what its calls can share."""

    def __init__(self, d: Derivation, order: tuple[int, ...]) -> None:
        self.d = d
        self.slots = [d.slots[i] for i in order]
        self.saved = [d.saved[i] for i in order]
        self.states, self.own = list(d.states), list(d.parameters)
        self.new_states = [s.replace("state_", "new_", 1) for s in d.states[1:]]
        n = len(order)
        results = d.adjoint.results
        self.slot_forms = [results[i] for i in order]
        self.state_forms = results[n : n + len(d.states)]
        self.own_forms = results[n + len(d.states) :]
        self.activations = list(self._activations())
        uses = Counter(f for form in d.adjoint.forms for f in form.values())
        uses.update(d.adjoint.normalised)
        # Slots whose gradient is one product: the buffer holds the factor until it is multiplied.
        narrow = self.writer({}).is_narrow
        self.scaled = [
            len(form) == 1
            and all(f.value is None and uses[f] == 1 and not narrow(f) for f in form.values())
            for form in self.slot_forms
        ]
        self.products = list(self._products())
        # The others whose gradient is not zero.
        pairs = zip(self.slot_forms, self.scaled, strict=True)
        self.apart = [i for i, (form, scaled) in enumerate(pairs) if form and not scaled]
        held = [
            f
            for form, s in zip(self.slot_forms, self.scaled, strict=True)
            if s
            for f in form.values()
        ]
        self.factors = [f for f in d.factors if f not in held]

    def writer(self, bound: Bound) -> Writer:
        """For PyTorch calls on what is known."""
        return Writer("torch", bound, [self.d.leaf(name) for name in self.own])

    def _activations(self) -> Iterator[tuple[int, int, str]]:
        names = []
        for slot, saved in zip(self.slots, self.saved, strict=True):
            direct = saved.op in ACTIVATIONS and saved.operands == (self.d.leaf(slot),)
            names.append(saved.op if direct else "")
        for name, run in groupby(range(len(names)), lambda i: names[i]):
            places = list(run)
            if name:
                yield places[0], places[-1] + 1, name

    def _products(self) -> Iterator[tuple[int, int, str]]:
        """First place, end, and the gradient that multiplies them."""
        bases = [
            next(iter(f)) if s else "" for f, s in zip(self.slot_forms, self.scaled, strict=True)
        ]
        for base, run in groupby(range(len(bases)), lambda i: bases[i]):
            places = list(run)
            if base:
                yield places[0], places[-1] + 1, base


def _function(name: str, arguments: list[str], lines: list[str]) -> str:
    """The text of a function; what it unpacks and does not use, it does not unpack."""
    words = set(re.findall(r"\w+", " ".join(line for line in lines if not line.endswith(UNPACKED))))
    body: list[str] = []
    for line in lines:
        if not line.endswith(UNPACKED):
            body.append(line)
            continue
        names, _, from_ = line.removesuffix(UNPACKED).rpartition(", = ")
        used = [(i, n) for i, n in enumerate(names.split(", ")) if n in words]
        if len(used) == names.count(", ") + 1:
            body.append(f"{names}, = {from_}")
        else:
            body += [f"{n} = {from_}[{i}]" for i, n in used]
    indented = [f"    {line}" for line in body or ["pass"]]
    return "\n".join([f"def {name}({', '.join(arguments)}):", *indented])


UNPACKED = "  # unpacked"  # marks such a line until the function is whole


def _unpack(names: list[str], tuple_: str) -> list[str]:
    return [f"{', '.join(names)}, = {tuple_}{UNPACKED}"] if names else []


def _activate(parts: Parts, writer: Writer) -> list[str]:
    """Lines that activate slots in place, several at once, which are ``groups`` of the buffer."""
    lines = []
    for i, (first, end, name) in enumerate(parts.activations):
        lines.append(f"groups[{i}].{name}_()")
        for place in range(first, end):
            writer.bind(parts.saved[place], parts.slots[place])
    return lines


def _write_all(
    writer: Writer, targets: list[tuple[Expression, str]], fresh: Container[str]
) -> None:
    """Write each expression into its tensor, those first of which others are made.

    ``fresh`` names the tensors that hold nothing yet.
    """
    by_expression: dict[Expression, list[str]] = {}
    for expression, out in targets:
        by_expression.setdefault(expression, []).append(out)
    for expression in reachable(by_expression):
        outs = by_expression.get(expression, [])
        for out in outs:
            known = writer.name(expression)
            if expression.value is not None:
                writer.lines.append(f"{out}.fill_({number(expression.value)})")
            elif known is None:
                writer.write(expression, out, out in fresh)
            elif known != out:
                writer.lines.append(f"{out}.copy_({known})")


def _slot_targets(parts: Parts, writer: Writer) -> list[tuple[Expression, str]]:
    """What is saved in the place of a slot and is not an activation of it alone."""
    return [
        (saved, slot)
        for slot, saved in zip(parts.slots, parts.saved, strict=True)
        if writer.name(saved) != slot
    ]


def step_text(parts: Parts) -> str:
    """``step(slots, groups, states, outs, own, one)``: one time step.

    ``slots`` are [n, H] each, with the recurrent product, and leave as what is saved; ``groups``
    are those of ``activations``; ``states`` before the step, h first; ``outs`` are filled: the new
    states, h first, or for None in its place a new tensor. Returns h.
    """
    d = parts.d
    writer = parts.writer(d.inputs())
    writer.lines = [
        *_unpack(parts.slots, "slots"),
        *_unpack(parts.states, "states"),
        *_unpack(["out_h", *parts.new_states], "outs"),
        *_unpack(parts.own, "own"),
    ]
    writer.plan([*parts.saved, *d.new])
    writer.lines += _activate(parts, writer)
    targets = _slot_targets(parts, writer)
    targets += list(zip(d.new[1:], parts.new_states, strict=True))
    if d.keeps_slots:
        _write_all(writer, targets, parts.new_states)
        projected = writer.branch()
        projected.lines.append(f"return {projected.write(d.new[0])}")
        writer.lines += ["if out_h is None:", *[f"    {line}" for line in projected.lines]]
        _write_all(writer, [(d.new[0], "out_h")], ["out_h"])
        writer.lines.append("return out_h")
    else:
        _write_all(writer, targets, parts.new_states)
        writer.lines.append(f"return {parts.slots[0]}")
    return _function("step", ["slots", "groups", "states", "outs", "own", "one"], writer.lines)


def rebuild_text(parts: Parts) -> str:
    """``rebuild(slots, groups, states, own, one)``: turn pre-activations into what is saved."""
    writer = parts.writer(parts.d.inputs())
    writer.lines = [
        *_unpack(parts.slots, "slots"),
        *_unpack(parts.states, "states"),
        *_unpack(parts.own, "own"),
    ]
    writer.plan(parts.saved)
    writer.lines += _activate(parts, writer)
    _write_all(writer, _slot_targets(parts, writer), ())
    return _function("rebuild", ["slots", "groups", "states", "own", "one"], writer.lines)


def _reads(parts: Parts) -> list[str]:
    return [
        *_unpack(parts.slots, "saved"),
        *_unpack(parts.states, "states"),
        *_unpack(parts.new_states, "now"),
        *_unpack(parts.own, "own"),
    ]


def coefficients_text(parts: Parts) -> str:
    """``coefficients(d, saved, states, now, own, one)``: all that gradients are multiplied by.

    ``d`` [n, H] for each slot are filled where ``adjoint`` multiplies in place; the other factors
    are returned. ``states`` are those before the steps, ``now`` those beside h after them.
    """
    names = [f"d_{slot}" for slot in parts.slots]
    writer = parts.writer(parts.d.bound_saved() | parts.d.bound_states())
    writer.lines = [*_unpack(names, "d"), *_reads(parts)]
    held = []
    for name, form, scaled in zip(names, parts.slot_forms, parts.scaled, strict=True):
        if scaled:
            held += [(factor, name) for factor in form.values()]
        elif not form:
            writer.lines.append(f"{name}.zero_()")
    writer.plan([*[factor for factor, _ in held], *parts.factors])
    _write_all(writer, held, names)
    written = [writer.write(factor) for factor in parts.factors]
    writer.lines.append(f"return ({', '.join(written)}{',' if len(written) == 1 else ''})")
    return _function("coefficients", ["d", "saved", "states", "now", "own", "one"], writer.lines)


def adjoint_text(parts: Parts) -> str:
    """``adjoint(grads, d, groups, factors, target, own_grads)``: one step back.

    ``grads`` are the gradients of the new states, h first; those beside h leave as the gradients of
    the states before. ``d`` are those slots that no product of ``groups`` makes, and leave as their
    gradients; ``groups`` are those of ``products``. What reaches h directly is added to ``target``,
    and each parameter's gradient to its part of ``own_grads``, all [n, H].
    """
    at = {factor: f"k{i}" for i, factor in enumerate(parts.factors)}
    states = [f"d{i}" for i in range(len(parts.states))]
    names = [f"d_{parts.slots[i]}" for i in parts.apart]
    own = [f"d_{name}" for name in parts.own]
    lines = [
        *_unpack(states, "grads"),
        *_unpack(names, "d"),
        *_unpack(list(at.values()), "factors"),
        *_unpack(own, "own_grads"),
    ]
    aliases: dict[str, str] = {}  # of sums that take the place of a gradient
    for name, form, y in parts.d.adjoint.sums:
        place = next((s for s in states[1:] if _only_in(parts, s, form)), None)
        if y is not None:
            lines.append(f"{name} = layer_center({_sum(form, at)}, {at[y]})")
        elif place is None:
            lines.append(_assign(name, form, at))
        else:
            rest = {base: factor for base, factor in form.items() if base != place}
            lines += [_add(place, base, factor, at) for base, factor in rest.items()]
            lines.append(f"{name} = {place}")
            aliases[name] = place
    for i, (first, end, base) in enumerate(parts.products):
        lines.append(f"groups[{i}].mul_({base if end - first == 1 else f'{base}.unsqueeze(1)'})")
    for name, i in zip(names, parts.apart, strict=True):
        lines.append(_assign(name, parts.slot_forms[i], at, inside=True))
    for target, form in (("target", parts.state_forms[0]), *zip(own, parts.own_forms, strict=True)):
        lines += [_add(target, base, factor, at) for base, factor in form.items()]
    # A gradient is overwritten once no later one is made of it.
    mine = [{aliases.get(b, b): f for b, f in form.items()} for form in parts.state_forms[1:]]
    forms = dict(zip(states[1:], mine, strict=True))
    waiting = []
    for i, (name, form) in enumerate(forms.items()):
        later = list(forms.values())[i + 1 :]
        if any(name in other for other in later):
            lines += [_assign(f"new_{name}", form, at)] if form else []
            waiting.append(f"{name}.copy_(new_{name})" if form else f"{name}.zero_()")
        elif form != {name: parts.d.make.one}:
            lines.append(_assign(name, form, at, inside=True))
    lines += waiting
    arguments = ["grads", "d", "groups", "factors", "target", "own_grads"]
    return _function("adjoint", arguments, lines)


def _only_in(parts: Parts, gradient: str, form: Form) -> bool:
    """Whether a gradient is a term of ``form`` as it is, and of no other."""
    users = [f for f in parts.d.adjoint.forms if gradient in f]
    return len(users) == 1 and users[0] is form and form[gradient].value == 1


def hidden_text(parts: Parts) -> str:
    """``hidden(saved, states, now, own, one)``: h after the steps, of what backward has."""
    writer = parts.writer(parts.d.bound_saved() | parts.d.bound_states())
    writer.lines = _reads(parts)
    writer.plan([parts.d.new[0]])
    writer.lines.append(f"return {writer.write(parts.d.new[0])}")
    return _function("hidden", ["saved", "states", "now", "own", "one"], writer.lines)


def _assign(name: str, form: Form, at: dict[Expression, str], inside: bool = False) -> str:
    """The line that makes ``name`` of a form, as a new tensor or ``inside`` one that is there."""
    if not inside:
        return f"{name} = {_sum(form, at)}"
    return into(_sum(form, at), name) if form else f"{name}.zero_()"


def _sum(form: Form, at: dict[Expression, str]) -> str:
    """The text of a form."""
    terms = sorted(form.items(), key=lambda term: term[1].value != 1)  # a sum begins with it
    text = ""
    for base, factor in terms:
        if not text:
            text = base if factor.value == 1 else f"torch.mul({base}, {_number(factor, at)})"
        elif factor.value is None:
            text = f"torch.addcmul({text}, {base}, {at[factor]})"
        else:
            text = f"torch.add({text}, {base}, alpha={number(factor.value)})"
    return text


def _add(target: str, base: str, factor: Expression, at: dict[Expression, str]) -> str:
    """The line that adds a term to ``target``."""
    if factor.value is None:
        return f"{target}.addcmul_({base}, {at[factor]})"
    return f"{target}.add_({base}, alpha={number(factor.value)})"


def _number(factor: Expression, at: dict[Expression, str]) -> str:
    return at[factor] if factor.value is None else number(factor.value)

"""A cell's step and its pull-back, as PyTorch runs them, to expressions.

The step runs once on small tensors, and autograd goes back through it, while a dispatch mode looks
on: so PyTorch's own derivatives are the ones that are recorded, and those of a user's
``torch.autograd.Function``, too.
"""

import linecache
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn.derive.aten import RULES, RULES_OF_SEVERAL, Operand, decompositions
from fused_rnn.derive.expressions import Expression, Expressions

SHAPE = (2, 3)  # of the tensors that the step runs on: [sequences, units]


class Trace(NamedTuple):
    """What a step computes.

    Attributes:
        expressions: in which all of it is written.
        new: the new states.
        gradients: of the step's inputs, in terms of those of the new states, which are the leaves
            "d0", "d1", ...; in the order of the inputs.
    """

    expressions: Expressions
    new: list[Expression]
    gradients: list[Expression]


def trace(step: Callable[..., Sequence[Tensor]], names: Sequence[str], source: Any) -> Trace:
    """Run ``step`` on one tensor for each of ``names``, and autograd back through it.

    Args:
        step: returns the new states.
        names: of its inputs, which become leaves.
        source: the function of the user, whose lines errors name.

    Raises:
        ValueError: the step does something that is not pointwise, or that has no rule.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    recorder = _Recorder(source)
    make = recorder.expressions

    def fresh(name: str) -> Tensor:
        tensor = torch.rand(SHAPE, generator=generator, dtype=torch.float64, device="cpu")
        recorder.know(tensor, make.leaf(name))
        return tensor

    inputs = [fresh(name).requires_grad_() for name in names]
    with torch.enable_grad(), recorder:
        new = list(step(*[t.clone() for t in inputs]))  # what works in place, meets no leaf
    shapes = [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in new]
    if any(shape != SHAPE for shape in shapes):
        raise ValueError(
            f"the step of {recorder.name} should return its new states, each of the size {SHAPE} "
            f"of its inputs, got {shapes}"
        )
    states = [recorder.expression_of(s) for s in new]
    grads = [fresh(f"d{i}") for i in range(len(new))]
    differentiable = [(s, g) for s, g in zip(new, grads, strict=True) if s.requires_grad]
    pulled: Sequence[Tensor | None] = [None] * len(inputs)
    if differentiable:
        with recorder.backwards():
            pulled = torch.autograd.grad(
                [s for s, _ in differentiable],
                inputs,
                [g for _, g in differentiable],
                allow_unused=True,
            )
    return Trace(
        make, states, [make.zero if g is None else recorder.expression_of(g) for g in pulled]
    )


class StepError(ValueError):
    """What a step may not do, and where it does it."""


class _Recorder(TorchDispatchMode):
    """Notes what each operation computes, while it runs."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.expressions = Expressions()
        self.name = getattr(source, "__name__", repr(source))
        self._file = getattr(getattr(source, "__code__", None), "co_filename", None)
        self._known: dict[int, tuple[Tensor, Expression]] = {}  # tensors live as long as their id
        self._decompositions = decompositions()
        self._backwards = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to: PyTorch would import Dynamo, which takes seconds. No tracer gets here."""
        return False

    def backwards(self) -> "_Recorder":
        """The same for autograd's own pass, which may work in place."""
        self._backwards = True
        return self

    def know(self, tensor: Tensor, expression: Expression) -> None:
        """Let ``tensor`` hold ``expression``."""
        self._known[id(tensor)] = tensor, expression

    def expression_of(self, value: Any) -> Expression:
        """What a tensor, or a number, holds."""
        if not isinstance(value, Tensor):
            return self.expressions.constant(value)
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        if value.requires_grad:
            raise self._error("a tensor from outside the step has a gradient: make it a parameter")
        if value.numel() == 1:  # a constant of the user's
            with torch.utils._python_dispatch._disable_current_modes():
                return self.expressions.constant(float(value))
        raise self._error(f"a tensor of the size {tuple(value.shape)} comes from outside the step")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._decompositions:
            with self:
                return self._decompositions[func](*args, **kwargs)
        packet = func.overloadpacket.__name__
        if packet in ("_local_scalar_dense", "is_nonzero", "item"):
            if self.expression_of(args[0]).value is None:
                raise self._error("the step may not depend on the values of its tensors")
            return func(*args, **kwargs)
        in_place = packet.endswith("_") and not packet.endswith("__")
        if in_place and not self._backwards:
            raise self._error(f"{packet} works in place, and a step may not")
        operands = [Operand(a, self.expression_of) for a in args]
        try:
            if packet in RULES_OF_SEVERAL:
                return self._several(RULES_OF_SEVERAL[packet](self.expressions, operands))
            rule = RULES.get(packet.removesuffix("_") if in_place else packet)
            if rule is None:
                raise ValueError(f"there is no rule for aten.{packet}")
            made = rule(self.expressions, operands, kwargs)
        except StepError:
            raise
        except ValueError as reason:
            raise self._error(str(reason)) from reason
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or tuple(result.shape) not in (SHAPE, ()):
            raise self._error(f"aten.{packet} is not pointwise")
        # Under a name of its own: an operation may return the tensor that it was given.
        self.know(result, made)
        return result

    def _several(self, made: tuple[Expression | None, ...]) -> tuple[Tensor, ...]:
        """Tensors that hold several results; their values do not matter."""
        results = [torch.zeros(SHAPE, dtype=torch.float64, device="cpu") for _ in made]
        for result, expression in zip(results, made, strict=True):
            if expression is not None:
                self.know(result, expression)
        return tuple(results)

    def _error(self, what: str) -> "StepError":
        """With the line of the user's file that is being run."""
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_filename != self._file:
            frame = frame.f_back  # type: ignore[assignment]
        place = f"the step of {self.name}"
        if self._backwards:
            place = f"the derivative of {place}"
        elif frame is not None:
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            place += f', line {frame.f_lineno} of {frame.f_code.co_filename}, "{text}"'
        return StepError(
            f"{place}: {what}. A step is pointwise in its gates, states and parameters, "
            "layer_norm over the units aside; "
            "docs/cells.md lists the operations"
        )

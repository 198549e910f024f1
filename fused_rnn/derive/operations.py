"""The operations that a cell's step may be made of: what they are in Python, PyTorch and Triton.

Numbers are fp32 in Triton, whatever the type of the layer; conditions are what comparisons give.
All act on each element alone, but for the last three, which see all units of a head.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class Operation(NamedTuple):
    """One operation.

    Attributes:
        evaluate: of Python numbers, to fold constants.
        triton: its text in Triton, operands in braces.
        torch: its text in PyTorch.
        condition: whether the result is true or false.
        method: the name of the method that does it in place on a tensor, if there is one.
    """

    evaluate: Callable[..., float]
    triton: str
    torch: str
    condition: bool = False
    method: str | None = None


def value_of(op: str, *operands: float) -> float:
    """An operation of numbers; NaN where Python's raises, as of sin(inf)."""
    try:
        return OPERATIONS[op].evaluate(*operands)
    except (ValueError, OverflowError, ZeroDivisionError):
        return math.nan


def _unary(name: str, triton: str, evaluate: Callable[[float], float]) -> Operation:
    return Operation(evaluate, triton, f"torch.{name}({{0}})", method=f"{name}_")


def _comparison(sign: str, evaluate: Callable[[float, float], bool]) -> Operation:
    return Operation(evaluate, f"{{0}} {sign} {{1}}", f"{{0}} {sign} {{1}}", condition=True)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


OPERATIONS = {
    "add": Operation(lambda a, b: a + b, "{0} + {1}", "{0} + {1}"),
    "sub": Operation(lambda a, b: a - b, "{0} - {1}", "{0} - {1}"),
    "mul": Operation(lambda a, b: a * b, "{0} * {1}", "{0} * {1}"),
    "div": Operation(lambda a, b: a / b if b else math.nan, "{0} / {1}", "{0} / {1}"),
    "neg": Operation(lambda a: -a, "-{0}", "-{0}"),
    "lerp": Operation(
        lambda a, b, w: a + w * (b - a), "{0} + {2} * ({1} - {0})", "torch.lerp({0}, {1}, {2})"
    ),
    "sigmoid": _unary("sigmoid", "sigmoid({0}, FAST)", _sigmoid),
    "tanh": _unary("tanh", "tanh({0}, FAST)", math.tanh),
    # Written so that a NaN stays one, as in PyTorch.
    "relu": _unary("relu", "tl.where({0} <= 0, 0.0, {0})", lambda a: max(a, 0.0)),
    "exp": _unary("exp", "tl.exp({0})", lambda a: math.exp(a) if a < 700 else math.inf),
    "log": _unary("log", "tl.log({0})", lambda a: math.log(a) if a > 0 else math.nan),
    "log1p": _unary("log1p", "log1p({0})", lambda a: math.log1p(a) if a > -1 else math.nan),
    "expm1": _unary("expm1", "expm1({0})", lambda a: math.expm1(a) if a < 700 else math.inf),
    # min(x, 0) - log(1 + exp(-|x|)): neither end overflows.
    "logsigmoid": Operation(
        lambda a: min(a, 0.0) - math.log1p(math.exp(-abs(a))),
        "tl.where({0} < 0, {0}, 0.0) - log1p(tl.exp(-tl.abs({0})))",
        "torch.nn.functional.logsigmoid({0})",
    ),
    "sqrt": _unary("sqrt", "tl.sqrt({0})", lambda a: math.sqrt(a) if a >= 0 else math.nan),
    "rsqrt": _unary("rsqrt", "tl.rsqrt({0})", lambda a: a**-0.5 if a > 0 else math.nan),
    "sin": _unary("sin", "tl.sin({0})", math.sin),
    "cos": _unary("cos", "tl.cos({0})", math.cos),
    "erf": _unary("erf", "tl.erf({0})", math.erf),
    "abs": _unary("abs", "tl.abs({0})", abs),
    "sign": _unary(
        "sign",
        "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
        lambda a: float((a > 0) - (a < 0)),
    ),
    "floor": _unary("floor", "tl.floor({0})", lambda a: float(math.floor(a))),
    "maximum": Operation(
        max,
        "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "torch.maximum({0}, {1})",
    ),
    "minimum": Operation(
        min,
        "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "torch.minimum({0}, {1})",
    ),
    "where": Operation(
        lambda c, a, b: a if c else b, "tl.where({0}, {1}, {2})", "torch.where({0}, {1}, {2})"
    ),
    "lt": _comparison("<", lambda a, b: a < b),
    "le": _comparison("<=", lambda a, b: a <= b),
    "gt": _comparison(">", lambda a, b: a > b),
    "ge": _comparison(">=", lambda a, b: a >= b),
    "eq": _comparison("==", lambda a, b: a == b),
    "ne": _comparison("!=", lambda a, b: a != b),
    "and": Operation(lambda a, b: a and b, "{0} & {1}", "{0} & {1}", condition=True),
    "or": Operation(lambda a, b: a or b, "{0} | {1}", "{0} | {1}", condition=True),
    "not": Operation(lambda a: not a, "{0} == 0", "~{0}", condition=True),
    # y = (x - mean) rstd, with rstd = 1 / sqrt(variance + eps); and d - mean(d) - y mean(d y), that
    # is dx / rstd for the gradient d of y. A constant is its own mean.
    "layer_norm": Operation(lambda x, eps: 0.0, "layer_norm({0}, {1}, H)", "layer_norm({0}, {1})"),
    "layer_rstd": Operation(
        lambda x, eps: eps**-0.5 if eps > 0 else math.inf,
        "layer_rstd({0}, {1}, H)",
        "layer_rstd({0}, {1})",
    ),
    "layer_center": Operation(
        lambda d, y: 0.0, "layer_center({0}, {1}, H)", "layer_center({0}, {1})"
    ),
}
MIXING = ("layer_norm", "layer_rstd", "layer_center")

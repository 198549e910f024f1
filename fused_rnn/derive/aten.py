"""What each aten operation is as an expression."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fused_rnn.derive.expressions import Expression, Expressions, reachable


class Operand(NamedTuple):
    """An argument of an operation."""

    value: Any
    expression_of: Callable[[Any], Expression]

    @property
    def expression(self) -> Expression:
        """What it holds."""
        return self.expression_of(self.value)


Rule = Callable[[Expressions, list[Operand], dict[str, Any]], Expression]
# Of an operation with several results; None for one that is not asked for, or has no rule.
Rules = Callable[[Expressions, list[Operand]], tuple[Expression | None, ...]]


@lru_cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's own for what is more than one operation."""
    from torch._decomp import get_decompositions

    aten = torch.ops.aten
    return get_decompositions(
        [
            aten.elu,
            aten.elu_backward,
            aten.gelu,
            aten.gelu_backward,
            aten.hardsigmoid,
            aten.hardsigmoid_backward,
            aten.hardswish,
            aten.hardswish_backward,
            aten.hardtanh,
            aten.hardtanh_backward,
            aten.leaky_relu,
            aten.leaky_relu_backward,
            aten.mish,
            aten.mish_backward,
            aten.sigmoid_backward,
            aten.silu,
            aten.silu_backward,
            aten.softplus,
            aten.softplus_backward,
            aten.tanh_backward,
            aten.threshold,
            aten.threshold_backward,
        ]
    )


def _plain(op: str) -> Rule:
    return lambda make, args, _: make.make(op, *[a.expression for a in args])


def _same(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    return args[0].expression


def _cast(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    """A condition becomes 0 or 1; a number stays what it is: all are fp32 in the kernels."""
    return _number(make, args[0].expression)


def _number(make: Expressions, x: Expression) -> Expression:
    return make.make("where", x, make.one, make.zero) if x.is_condition else x


def _scaled(make: Expressions, args: list[Operand], kwargs: dict[str, Any]) -> list[Expression]:
    """Both operands, the second one multiplied by ``alpha``."""
    a, b = (_number(make, x.expression) for x in args[:2])
    alpha = args[2].value if len(args) > 2 else kwargs.get("alpha", 1)
    return [a, make.make("mul", b, make.constant(alpha))]


def _add(make: Expressions, args: list[Operand], kwargs: dict[str, Any]) -> Expression:
    return make.make("add", *_scaled(make, args, kwargs))


def _sub(make: Expressions, args: list[Operand], kwargs: dict[str, Any]) -> Expression:
    return make.make("sub", *_scaled(make, args, kwargs))


def _rsub(make: Expressions, args: list[Operand], kwargs: dict[str, Any]) -> Expression:
    a, b = (_number(make, x.expression) for x in args[:2])
    alpha = args[2].value if len(args) > 2 else kwargs.get("alpha", 1)
    return make.make("sub", b, make.make("mul", a, make.constant(alpha)))


def _mul(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    return make.make("mul", *[_number(make, a.expression) for a in args])


def _div(make: Expressions, args: list[Operand], kwargs: dict[str, Any]) -> Expression:
    if kwargs.get("rounding_mode") is not None:
        raise ValueError("a division that rounds has no rule")
    return make.make("div", *[_number(make, a.expression) for a in args[:2]])


def _fused(op: str) -> Rule:
    """Addcmul and addcdiv."""

    def rule(make: Expressions, args: list[Operand], kwargs: dict[str, Any]) -> Expression:
        a, b, c = (x.expression for x in args[:3])
        value = make.constant(kwargs.get("value", 1))
        return make.make("add", a, make.make("mul", make.make(op, b, c), value))

    return rule


def _power(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    """Of whole and half exponents, by products and roots; of others by exp and log."""
    base, exponent = args[0].expression, args[1].expression
    value = exponent.value
    if value is None or abs(value) > 8 or not (2 * value).is_integer():
        return make.make("exp", make.make("mul", exponent, make.make("log", base)))
    result = make.one
    for _i in range(int(abs(value))):
        result = make.make("mul", result, base)
    if not value.is_integer():
        result = make.make("mul", result, make.make("sqrt", base))
    return make.make("div", make.one, result) if value < 0 else result


def _clamp(make: Expressions, args: list[Operand], kwargs: dict[str, Any]) -> Expression:
    low = args[1].value if len(args) > 1 else kwargs.get("min")
    high = args[2].value if len(args) > 2 else kwargs.get("max")
    of, x = args[0].expression_of, args[0].expression
    if low is not None:
        x = make.make("maximum", x, of(low))
    return x if high is None else make.make("minimum", x, of(high))


def _one_sided(op: str) -> Rule:
    """clamp_min and clamp_max."""
    return lambda make, args, _: make.make(op, args[0].expression, args[1].expression)


def _where(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    condition, a, b = (x.expression for x in args)
    return make.make("where", condition, _number(make, a), _number(make, b))


def _masked_fill(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    x, mask, value = (a.expression for a in args)
    return make.make("where", mask, value, x)


def _filled(value: float) -> Rule:
    return lambda make, args, kwargs: make.constant(value)


def _full(make: Expressions, args: list[Operand], kwargs: dict[str, Any]) -> Expression:
    value = args[1].value if len(args) > 1 else kwargs["fill_value"]
    return make.constant(value)


def _reciprocal(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    return make.make("div", make.one, args[0].expression)


def _logic(op: str) -> Rule:
    """Of conditions; a number counts as true where it is not 0."""

    def rule(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
        operands = [a.expression for a in args]
        conditions = [x if x.is_condition else make.make("ne", x, make.zero) for x in operands]
        return make.make(op, *conditions)

    return rule


def _logsigmoid_backward(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    grad, x = (a.expression for a in args[:2])
    return make.make("mul", grad, make.make("sigmoid", make.make("neg", x)))


def _square(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    x = args[0].expression
    return make.make("mul", x, x)


def _scalar(make: Expressions, args: list[Operand], _: dict[str, Any]) -> Expression:
    return make.constant(args[0].value)


# By the name of the operation, without the "_" of those that work in place.
RULES: dict[str, Rule] = {
    **{
        op: _plain(op)
        for op in [
            "neg",
            "exp",
            "log",
            "log1p",
            "expm1",
            "sqrt",
            "rsqrt",
            "sin",
            "cos",
            "erf",
            "abs",
            "floor",
            "sigmoid",
            "tanh",
            "relu",
            "maximum",
            "minimum",
            "lerp",
            "lt",
            "le",
            "gt",
            "ge",
            "eq",
            "ne",
        ]
    },
    **dict.fromkeys(
        [
            "detach",
            "alias",
            "clone",
            "view",
            "view_as",
            "expand",
            "positive",
            "contiguous",
            "lift_fresh",
            "lift",
            "conj_physical",
            "_unsafe_view",
            "reshape",
        ],
        _same,
    ),
    **dict.fromkeys(("_to_copy", "to", "convert_element_type"), _cast),
    **dict.fromkeys(
        ("zeros_like", "new_zeros", "zeros", "_efficientzerotensor", "empty_like"), _filled(0.0)
    ),
    "fill": _full,
    **dict.fromkeys(("ones_like", "new_ones", "ones"), _filled(1.0)),
    **dict.fromkeys(("full_like", "full"), _full),
    **dict.fromkeys(("sgn", "sign"), _plain("sign")),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _logic("and")),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logic("or")),
    **dict.fromkeys(("logical_not", "bitwise_not"), _logic("not")),
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "true_divide": _div,
    "reciprocal": _reciprocal,
    "square": _square,
    "log_sigmoid_backward": _logsigmoid_backward,
    "pow": _power,
    "addcmul": _fused("mul"),
    "addcdiv": _fused("div"),
    "clamp": _clamp,
    "clamp_min": _one_sided("maximum"),
    "clamp_max": _one_sided("minimum"),
    "where": _where,
    "masked_fill": _masked_fill,
    "scalar_tensor": _scalar,
}


def _log_sigmoid(make: Expressions, args: list[Operand]) -> tuple[Expression, Expression]:
    """The second result is a buffer that backward ignores."""
    return make.make("logsigmoid", args[0].expression), make.zero


def _layer_norm(make: Expressions, args: list[Operand]) -> tuple[Expression | None, ...]:
    """Of (x, normalized_shape, weight, bias, eps): y, the mean, which has no rule, and rstd."""
    x, shape, weight, bias, eps = args
    if list(shape.value) != list(x.value.shape[-1:]):
        raise ValueError(
            "layer_norm in a step is over the units of a head: normalized_shape should be "
            "x.shape[-1:]"
        )
    for vector in (weight, bias):
        if vector.value is not None and not _is_vector(vector.expression):
            raise ValueError("the weight and bias of layer_norm are vectors [H]: parameters")
    operands = x.expression, make.constant(eps.value)
    y = make.make("layer_norm", *operands)
    if weight.value is not None:
        y = make.make("mul", y, weight.expression)
    if bias.value is not None:
        y = make.make("add", y, bias.expression)
    return y, None, make.make("layer_rstd", *operands)


def _is_vector(x: Expression) -> bool:
    """Whether it is made of parameters alone."""
    leaves = [node for node in reachable([x]) if node.op == "leaf"]
    return bool(leaves) and all(str(leaf).startswith("own_") for leaf in leaves)


def _layer_norm_backward(make: Expressions, args: list[Operand]) -> tuple[Expression | None, ...]:
    """Of (dy, x, normalized_shape, mean, rstd, weight, bias, mask): dx, dweight and dbias."""
    dy, _, _, _, rstd, weight, _, mask = args
    d, scale = dy.expression, rstd.expression
    dx, y = make.zero, make.zero
    if scale.value is None:  # else what was normalised is a constant
        y = make.make("layer_norm", *scale.operands)  # of the operands of rstd, x and eps
        given = d if weight.value is None else make.make("mul", d, weight.expression)
        dx = make.make("mul", make.make("layer_center", given, y), scale)
    results = dx, make.make("mul", d, y), d
    return tuple([r if asked else None for r, asked in zip(results, mask.value, strict=True)])


RULES_OF_SEVERAL: dict[str, Rules] = {
    "log_sigmoid_forward": _log_sigmoid,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
}

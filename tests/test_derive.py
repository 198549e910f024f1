"""What is derived from a cell's step: it equals autograd, and what cannot be derived says so."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from derived_helpers import assert_equal, peephole
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_rnn import FusedRecurrent, cell, explain, show, surrogate
from fused_rnn.cells.builtin import CELLS, GRU, LSTM
from fused_rnn.derive.derivation import derivation
from fused_rnn.derive.kernels import source
from fused_rnn.spec.cells import Cell

# ---- random steps -------------------------------------------------------------------------------

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": F.silu,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "elu": F.elu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "abs": torch.abs,
    "neg": torch.neg,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp of -x^2": lambda x: torch.exp(-x * x),
    "log1p": lambda x: torch.log1p(x * x),
    "expm1": lambda x: torch.expm1(-x.abs()),
    "sqrt": lambda x: torch.sqrt(x * x + 0.5),
    "rsqrt": lambda x: torch.rsqrt(x * x + 0.5),
    "reciprocal": lambda x: torch.reciprocal(x * x + 1),
    "square": torch.square,
    "cube": lambda x: x**3,
    "power": lambda x: (x * x + 0.5) ** 1.5,
    "clamp": lambda x: x.clamp(-0.7, 0.4),
    "scaled": lambda x: 0.3 * x - 1,
    "from one": lambda x: 1 - x,
    "over": lambda x: 2 / (1 + x * x),
    "step": lambda x: (x > 0.1).to(x.dtype) * x,
    "surrogate": lambda x: surrogate((x > 0).to(x.dtype), torch.sigmoid(x)),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a / (1 + b * b),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, 0.5 * b),
    "lerp": lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
}


@st.composite
def steps(draw: Any) -> Cell:
    """A cell of random operations, whose states stay below one."""
    gates = draw(st.integers(1, 4))
    states = draw(st.integers(1, 4))
    parameters = draw(st.integers(0, 2))
    apart = draw(st.booleans())
    names = [f"g{i}" for i in range(gates)]
    split = names[-1:] if apart else []
    operations = draw(
        st.lists(
            st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 99), st.integers(0, 99)),
            min_size=1,
            max_size=10,
        )
    )
    ends = draw(st.lists(st.integers(0, 99), min_size=states, max_size=states))

    def step(gates: Any, state: Any, p: Any = ()) -> tuple[Tensor, ...]:
        values = [*gates, *state, *[v + 0 * state[0] for v in p]]
        for name, i, j in operations:
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(UNARY[name](a) if name in UNARY else BINARY[name](a, b))
        return tuple([torch.tanh(values[-1 - end % len(values)]) for end in ends])

    return cell(
        gates=names,
        states=["h", "c", "n", "m"][:states],
        parameters=[f"p{i}" for i in range(parameters)],
        apart=split,
    )(step)


@given(made=steps())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_steps(made: Cell) -> None:
    assert_equal(made)


@pytest.mark.slow
@given(made=steps())
@settings(max_examples=1000, deadline=None)
def test_many_random_steps(made: Cell) -> None:
    assert_equal(made)
    assert_equal(made, recompute=True, bidirectional=True, num_layers=2)


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_each_operation(name: str) -> None:
    def step(gates: Any, state: Any) -> Tensor:
        x = gates.a + 0.5 * state.h
        y = UNARY[name](x) if name in UNARY else BINARY[name](x, gates.b - state.h)
        return torch.tanh(y)

    assert_equal(cell(gates="ab", states="h")(step))


def test_a_function_of_the_users_own() -> None:
    """Its backward is what is recorded, whatever the derivative is."""

    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            ctx.save_for_backward(v)
            return (v > 0).to(v.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (v,) = ctx.saved_tensors
            return grad / (1 + v.abs()) ** 2

    @cell(gates="a", states="hv")
    def lif(gates: Any, state: Any) -> tuple[Tensor, Tensor]:
        v = 0.8 * state.v * (1 - state.h) + gates.a
        return Spike.apply(v - 0.3), v

    assert_equal(lif)


# ---- the derived text ---------------------------------------------------------------------------


def test_the_lstm_as_by_hand() -> None:
    """Six factors, dc added up once, gates saved activated, c read and not recomputed."""
    text = source(LSTM)
    assert derivation(LSTM).needs_h is False
    assert "p0 = d1 + d0 * k[5]\n    return (p0 * k[0], p0 * k[1], p0 * k[2], d0 * k[3]), " in text
    assert " = tanh(new_c, FAST)" in text.partition("def lstm_factors")[2]
    assert len(derivation(LSTM).factors) == 6


def test_the_gru_as_by_hand() -> None:
    text = source(GRU)
    assert (
        "return (v0, v1, v4, gate_n_h), (v5,)" in text
    )  # r, z, n activated, W_hn h + b_hn as it is
    assert "(d0 * k[0], d0 * k[1], d0 * k[2], d0 * k[3]), (d0 * k[4],), ()" in text


@pytest.mark.parametrize("name", ["rnn_tanh", "rnn_relu"])
def test_a_cell_that_is_its_output_saves_no_gate(name: str) -> None:
    assert not derivation(CELLS[name]).keeps_slots
    assert not CELLS[name].kernels.keeps_gates  # type: ignore[union-attr]


def test_constants_are_folded_and_dead_code_is_gone() -> None:
    @cell(gates="ab", states="h")
    def folded(gates: Any, state: Any) -> Tensor:
        unused = torch.exp(gates.b)
        assert unused is not None
        one = torch.ones_like(gates.a) * 2 - 1
        return gates.a * one + 0 * state.h - (state.h - state.h)

    text = show(folded)
    assert "tl.exp" not in text
    assert "state_h" not in text.partition("factors")[0]
    assert "return (gate_a, gate_a, gate_a, gate_a), (gate_a,)" in text.replace("gate_b", "gate_a")


def test_show_prints_what_the_kernels_call(capsys: Any) -> None:
    print(show(peephole))
    shown = capsys.readouterr().out
    for function in ("step", "factors", "adjoint", "others"):
        assert f"def peephole_{function}(" in shown
    compile(shown, "shown", "exec")
    with pytest.raises(TypeError, match="a cell is needed, got function"):
        show(lambda gates, state: state)  # type: ignore[arg-type]


def test_padded_units_are_cleared_where_zeros_do_not_stay() -> None:
    assert derivation(LSTM).rests_at_zero
    assert derivation(peephole).rests_at_zero

    @cell(gates="a", states="h")
    def inverse(gates: Any, state: Any) -> Tensor:
        return 1 / (gates.a + 3 + state.h)

    assert not derivation(inverse).rests_at_zero
    assert_equal(inverse)


# ---- what a step may not do ---------------------------------------------------------------------


def mean(gates: Any, state: Any) -> Tensor:
    centred = gates.a * 1
    return centred - centred.mean(-1, keepdim=True)


def product(gates: Any, state: Any) -> Tensor:
    return torch.tanh(torch.mm(gates.a, state.h))


def index(gates: Any, state: Any) -> Tensor:
    return torch.cat([gates.a[:, :1], state.h[:, 1:]], -1)


def branch(gates: Any, state: Any) -> Tensor:
    if gates.a.sum() > 0:
        return gates.a
    return state.h


def value(gates: Any, state: Any) -> Tensor:
    return gates.a * float(state.h[0, 0])


def in_place(gates: Any, state: Any) -> Tensor:
    return gates.a.clone().mul_(2)


def in_place_of_a_gate(gates: Any, state: Any) -> Tensor:
    return gates.a.add_(1)


def rounded(gates: Any, state: Any) -> Tensor:
    return torch.div(gates.a, 2, rounding_mode="floor")


def random(gates: Any, state: Any) -> Tensor:
    return F.dropout(gates.a, 0.5)


WRONG = {
    mean: ("there is no rule for aten.mean", "centred - centred.mean(-1, keepdim=True)"),
    product: ("there is no rule for aten.mm", "torch.mm(gates.a, state.h)"),
    index: ("there is no rule for aten.slice", "torch.cat([gates.a[:, :1], state.h[:, 1:]], -1)"),
    branch: ("there is no rule for aten.sum", "if gates.a.sum() > 0:"),
    value: ("there is no rule for aten.select", "return gates.a * float(state.h[0, 0])"),
    in_place: ("mul_ works in place, and a step may not", "return gates.a.clone().mul_(2)"),
    in_place_of_a_gate: ("add_ works in place, and a step may not", "return gates.a.add_(1)"),
    rounded: ("a division that rounds has no rule", "torch.div(gates.a, 2, rounding_mode"),
    random: ("bernoulli_ works in place", "return F.dropout(gates.a, 0.5)"),
}


@pytest.mark.parametrize("step", WRONG, ids=lambda s: s.__name__)
def test_what_is_not_pointwise_is_named_with_its_line(step: Callable[..., Any]) -> None:
    what, line = WRONG[step]
    with pytest.raises(ValueError, match=what) as error:
        cell(gates="a", states="h")(step)
    message = str(error.value)
    assert f"the step of {step.__name__}, line " in message
    assert line in message
    assert __file__ in message


def test_a_value_is_not_asked_for() -> None:
    def asks(gates: Any, state: Any) -> Tensor:
        return gates.a * torch.tensor(2.0, dtype=gates.a.dtype) * float(torch.tensor(0.5))

    assert_equal(
        cell(gates="a", states="h")(asks)
    )  # constants are no values of a tensor of the step

    def branches(gates: Any, state: Any) -> Tensor:
        return gates.a if bool((gates.a > 0).view(-1)[0]) else state.h

    with pytest.raises(ValueError, match="the step of branches"):
        cell(gates="a", states="h")(branches)


def test_wrong_returns() -> None:
    with pytest.raises(ValueError, match=r"should return the new states \('h', 'c'\), got 1"):
        cell(gates="a", states="hc")(lambda gates, state: gates.a)
    with pytest.raises(ValueError, match=r"should return the new states \('h',\), got 2"):
        cell(gates="a", states="h")(lambda gates, state: (gates.a, gates.a))
    with pytest.raises(ValueError, match=r"got NoneType"):
        cell(gates="a", states="h")(lambda gates, state: None)
    with pytest.raises(ValueError, match=r"each of the size \(2, 3\) of its inputs, got"):
        cell(gates="a", states="h")(lambda gates, state: torch.ones(()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gates": ""}, ValueError, "should have a gate at least"),
        ({"gates": "aa"}, ValueError, r"the gates of the cell step should differ, got \['a'\]"),
        ({"gates": ["a", 1]}, TypeError, "gates should be names, got int"),
        ({"gates": ["1a"]}, ValueError, "gates: '1a' is no name of an attribute"),
        ({"gates": ["if"]}, ValueError, "gates: 'if' is no name of an attribute"),
        ({"states": ""}, ValueError, "should have 1 to 4 states, got 0"),
        ({"states": "hcnmk"}, ValueError, "should have 1 to 4 states, got 5"),
        ({"apart": "z"}, ValueError, r"apart: the cell step has no gates \['z'\]"),
        ({"initial": {"m": 1.0}}, ValueError, r"initial: the cell step has no states \['m'\]"),
        ({"parameters": ["weight_hh"]}, ValueError, r"parameters: \['weight_hh'\] are names of"),
        ({"gates": ["n", "n_x"], "apart": "n"}, ValueError, r"should differ, got \['n_x'\]"),
        ({"gates": ["n", "n_x"], "apart": ["n"]}, ValueError, "should differ"),
    ],
)
def test_wrong_names(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    def step(gates: Any, state: Any, *own: Any) -> Tensor:
        return state.h

    with pytest.raises(error, match=message):
        cell(**({"gates": "a", "states": "h"} | arguments))(step)


def test_a_cell_is_made_of_a_function() -> None:
    with pytest.raises(TypeError, match="a cell is made of its step, a function, got int"):
        cell(gates="a", states="h")(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cell should be made by fused_rnn\.cell, got function"):
        FusedRecurrent(mean, 3, 4)  # type: ignore[arg-type]


# ---- what is not pointwise all the same ---------------------------------------------------------


@cell(gates="a", states="h", pointwise=False)
def competing(gates: Any, state: Any) -> Tensor:
    """Units share a sum: nothing can be derived of it."""
    return torch.softmax(gates.a, -1)


def test_heads_do_not_mix() -> None:
    """A step sees the units of one head, pointwise or not."""
    layer = FusedRecurrent(competing, 3, 6, heads=3)
    output, _ = layer(torch.randn(4, 2, 3))
    torch.testing.assert_close(output.unflatten(-1, (3, 2)).sum(-1), torch.ones(4, 2, 3))


def test_the_eager_loop_runs_what_is_not_pointwise() -> None:
    layer = FusedRecurrent(competing, 3, 6)
    output, h_n = layer(torch.randn(4, 2, 3))
    output.sum().backward()
    assert h_n.shape == (1, 2, 6)
    assert layer.weight_hh_l0.grad is not None
    (told,) = explain(layer, torch.randn(4, 2, 3))
    assert told.backend == "eager"
    assert "whose step is not pointwise" in told.reason
    (there,) = explain(layer, torch.randn(4, 2, 3), 90)
    assert "no fused kernel: the step of competing is not pointwise" in there.reason
    layer.backend = "cpu"
    with pytest.raises(RuntimeError, match="no sweeps can be derived of competing"):
        layer(torch.randn(4, 2, 3))


def test_more_slots_than_the_kernels_have() -> None:
    @cell(gates="abcde", states="h")
    def five(gates: Any, state: Any) -> Tensor:
        return torch.tanh(gates.a + gates.b * gates.c - gates.d) * torch.sigmoid(gates.e)

    assert_equal(five)
    with pytest.raises(ValueError, match="the kernels hold up to 4 gates, five has 5"):
        show(five)
    (there,) = explain(FusedRecurrent(five, 3, 6), torch.randn(4, 2, 3), 90)
    assert there.backend == "eager"
    assert "up to 4 gates" in there.reason

    @cell(gates="ab", states="h", apart="a")
    def first_apart(gates: Any, state: Any) -> Tensor:
        return torch.tanh(gates.a_x + torch.sigmoid(gates.b) * gates.a_h)

    assert_equal(first_apart)
    with pytest.raises(ValueError, match="the parts of the last of two or three gates apart"):
        show(first_apart)


def test_it_is_derived_apart_from_what_goes_on() -> None:
    """The first use of a cell may be in a tracer, a transform, or under autocast."""

    @cell(gates="a", states="h", pointwise=False)
    def later(gates: Any, state: Any) -> Tensor:
        return torch.tanh(gates.a) * state.h

    made = dataclasses.replace(later, pointwise=True)
    with FakeTensorMode(), torch.autocast("cpu"), torch.inference_mode():
        traced = torch.func.vmap(lambda x: x * len(derivation(made).factors))(torch.ones(3))
    assert traced.shape == (3,)
    assert repr(derivation(made).new) == "[mul(tanh(gate_a), state_h)]"
    assert len(derivation(made).factors) == 2

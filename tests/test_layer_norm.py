"""A layer norm over the units within a step: derived as the rest, where one program holds them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from derived_helpers import assert_equal, peephole
from torch import Tensor

from fused_rnn import FusedRecurrent, cell, cells, explain, show
from fused_rnn.derive.derivation import derivation
from fused_rnn.engines.cpu.texts import Parts, step_text


@cell(gates="ab", states="hc", parameters=("gain", "shift"))
def normed(gates: Any, state: Any, p: Any) -> tuple[Tensor, Tensor]:
    """A layer norm of a sum, of a state and of a parameter, with and without gain and shift."""
    units = gates.a.shape[-1:]
    c = 0.5 * state.c + F.layer_norm(gates.a + state.h, units, p.gain, p.shift, eps=0.01)
    h = torch.tanh(F.layer_norm(c, units, bias=p.shift)) * F.layer_norm(gates.b, units)
    return h + F.layer_norm(p.gain, units), c


@pytest.mark.parametrize(
    "options", [{}, {"heads": 2}, {"heads": 3, "bidirectional": True}, {"recompute": True}], ids=str
)
def test_layer_norm(options: dict[str, Any]) -> None:
    assert_equal(normed, **options)


def twice(gates: Any, state: Any, p: Any) -> tuple[Tensor, Tensor]:
    """A norm in a norm, of products, one weight for both; a new state is a norm."""
    units = gates.a.shape[-1:]
    h = F.layer_norm(torch.sigmoid(gates.a) * state.h + torch.tanh(gates.b), units, p.gain)
    c = F.layer_norm(h * state.c + (1 - h) * F.layer_norm(gates.b * gates.a, units, p.gain), units)
    return h, c


def cancelled(gates: Any, state: Any, p: Any) -> tuple[Tensor, Tensor]:
    """What is normalised is a constant, though it is made of gates."""
    units = gates.a.shape[-1:]
    h = torch.tanh(gates.a) + F.layer_norm(gates.a - gates.a, units, p.gain, p.shift)
    return h, F.layer_norm(0 * state.c, units) + gates.b


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("step", [twice, cancelled])
def test_odd_norms(step: Any, options: dict[str, Any]) -> None:
    made = cell(gates="ab", states="hc", parameters=("gain", "shift"))(step)
    assert_equal(made, **options)


def test_layer_norm_is_two_means() -> None:
    """Of the adjoint, one function of all units for each norm that a gradient passes."""
    text = show(normed)
    adjoint = text.partition("def normed_adjoint")[2].partition("@triton.jit")[0]
    assert adjoint.count("layer_center(") == 4
    assert "layer_norm" not in adjoint
    assert derivation(normed).mixes_units
    assert not derivation(peephole).mixes_units


def test_a_layer_norm_of_numbers_is_zero() -> None:
    @cell(gates="a", states="h")
    def still(gates: Any, state: Any) -> Tensor:
        ones = torch.ones_like(gates.a)
        return gates.a - state.h / 2 + F.layer_norm(ones, ones.shape[-1:])

    assert not derivation(still).mixes_units
    assert_equal(still)


def test_weight_and_bias_take_no_call_of_their_own() -> None:
    parts = Parts(derivation(cells.layer_norm_lstm), (0, 1, 2, 3))
    text = step_text(parts)
    for gate in "ifgo":
        assert f"layer_norm(gate_{gate}, 1e-05, own_gain_{gate}, own_shift_{gate})" in text


def test_layer_norm_is_for_one_program() -> None:
    """All units of a head in it: heads fit where one of their width does not."""
    for heads, backend in ((4, "triton"), (1, "eager")):
        layer = FusedRecurrent(cells.layer_norm_lstm, 8, 256, heads=heads, dtype=torch.bfloat16)
        (told,) = explain(layer, torch.randn(4, 2, 8, dtype=torch.bfloat16), 90)
        assert told.backend == backend
    assert "its step takes all units of a head together, in one program" in told.reason, told.reason


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", ["cpu", "eager", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_is_no_number_spoils_its_sequence_alone(
    backend: Any, bad: float, triton_device: str
) -> None:
    torch.manual_seed(0)
    layer = FusedRecurrent(cells.layer_norm_lstm, 3, 5, backend=backend)
    x = torch.randn(4, 2, 3)
    x[1, 0, 0] = bad
    if backend == "triton":
        layer, x = layer.to(triton_device), x.to(triton_device)
    output = layer(x)[0]
    assert output[1:, 0].isnan().all()
    assert output[0].isfinite().all()
    assert output[:, 1].isfinite().all()


def norm_of_the_batch(gates: Any, state: Any) -> Tensor:
    return F.layer_norm(gates.a, gates.a.shape)


def norm_by_a_gate(gates: Any, state: Any) -> Tensor:
    return F.layer_norm(state.h, state.h.shape[-1:], gates.a)


def the_mean(gates: Any, state: Any) -> Tensor:
    made = torch.native_layer_norm(gates.a, gates.a.shape[-1:], None, None, 1e-5)
    return made[0] + made[1]


def constant_weight(gates: Any, state: Any) -> Tensor:
    return F.layer_norm(gates.a, gates.a.shape[-1:], torch.ones_like(gates.a))


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (the_mean, r"made\[0\] \+ made\[1\].*a tensor of the size .*comes from outside"),
        (constant_weight, "the weight and bias of layer_norm are vectors"),
        (norm_of_the_batch, r"layer_norm\(gates.a, gates.a.shape\).*should be x\.shape\[-1:\]"),
        (norm_by_a_gate, r"the weight and bias of layer_norm are vectors \[H\]: parameters"),
    ],
)
def test_other_norms_are_named_with_their_line(step: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        cell(gates="a", states="h")(step)

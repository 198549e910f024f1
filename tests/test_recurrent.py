"""FusedRecurrent: the layer of any cell, its parameters, states and heads; a cell is one thing."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from derived_helpers import assert_equal, peephole
from torch import Tensor

import fused_rnn
from fused_rnn import FusedRecurrent, cell, explain, surrogate
from fused_rnn.cells.builtin import CELLS, LSTM
from fused_rnn.spec.cells import cell_of, restored

# ---- a cell is one thing ------------------------------------------------------------------------


def test_pickle_and_copy() -> None:
    assert pickle.loads(pickle.dumps(peephole)) is peephole
    assert copy.deepcopy(peephole) is peephole
    assert copy.copy(peephole) is peephole
    assert pickle.loads(pickle.dumps(LSTM)) is LSTM
    layer = FusedRecurrent(peephole, 3, 6)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(again(x)[0], layer(x)[0], rtol=0, atol=0)
    assert again.cell is peephole


def test_a_cell_inside_a_function_is_not_pickled() -> None:
    @cell(gates="a", states="h")
    def local(gates: Any, state: Any) -> Tensor:
        return torch.tanh(gates.a)

    with pytest.raises(pickle.PicklingError, match="is not the cell local: define it at the top"):
        pickle.dumps(local)


def test_a_pickle_of_a_cell_that_changed() -> None:
    with pytest.raises(pickle.UnpicklingError, match="is no longer the cell that was pickled"):
        restored("derived_helpers:peephole", "peephole@0")
    with pytest.raises(pickle.UnpicklingError, match="is not there"):
        restored("derived_helpers:gone", "gone@0")
    with pytest.raises(RuntimeError, match="there is no cell gone@0: import the module"):
        cell_of("gone@0")


def test_a_cell_that_is_defined_again() -> None:
    """A layer keeps its cell; the same definition is the same key, another one is another."""

    def first(gates: Any, state: Any) -> Tensor:
        return torch.tanh(gates.a)

    def second(gates: Any, state: Any) -> Tensor:
        return torch.sigmoid(gates.a)

    first.__name__ = second.__name__ = "again"
    one, other = (cell(gates="a", states="h")(step) for step in (first, second))
    same = cell(gates="a", states="h")(first)
    assert one.key == same.key != other.key
    x = torch.randn(4, 2, 3)
    layers = [FusedRecurrent(made, 3, 6) for made in (one, other)]
    layers[1].load_state_dict(layers[0].state_dict())
    compiled = [torch.compile(layer, backend="eager", fullgraph=True) for layer in layers]
    for layer, run in zip(layers, compiled, strict=True):
        torch.testing.assert_close(run(x)[0], layer(x)[0], rtol=0, atol=0)
    assert not torch.allclose(layers[0](x)[0], layers[1](x)[0])


def test_a_cell_without_a_derivation_that_is_defined_again() -> None:
    made = [
        cell(gates="a", states="h", pointwise=False)(lambda gates, state, by=by: gates.a * by)
        for by in (1.0, 2.0)
    ]
    assert made[0].key != made[1].key
    x = torch.randn(3, 2, 3)
    layers = [FusedRecurrent(m, 3, 4) for m in made]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=0, atol=0)


def test_cells_that_differ_in_their_derivatives_alone() -> None:
    def spikes(slope: float) -> Any:
        def spike(gates: Any, state: Any) -> Tensor:
            return surrogate((gates.a > 0).to(gates.a.dtype), torch.sigmoid(slope * gates.a))

        return cell(gates="a", states="h")(spike)

    assert spikes(1.0).key != spikes(4.0).key
    assert spikes(4.0).key == spikes(4.0).key


def test_a_tensor_from_outside_that_would_learn_nothing() -> None:
    gain = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(
        ValueError, match="from outside the step has a gradient: make it a parameter"
    ):
        cell(gates="a", states="h")(lambda gates, state: gain * gates.a)


def test_an_object_that_can_be_called_is_a_step() -> None:
    class Leak:
        def __init__(self, alpha: float) -> None:
            self.alpha = alpha

        def __call__(self, gates: Any, state: Any) -> Tensor:
            return torch.lerp(state.h, torch.tanh(gates.a), self.alpha)

    slow, fast = (cell(gates="a", states="h")(Leak(alpha)) for alpha in (0.1, 0.9))
    assert slow.name == "Leak"
    assert slow.key != fast.key
    assert_equal(slow)


# ---- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
def test_peephole_layers(heads: int, options: dict[str, Any]) -> None:
    assert_equal(peephole, heads=heads, **options)
    assert_equal(peephole, {"lengths": torch.tensor([5, 0, 3, 1])}, heads=heads, **options)


def test_names_and_sizes_of_parameters() -> None:
    layer = FusedRecurrent(peephole, 3, 6, bidirectional=True, heads=2)
    sizes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert sizes["weight_hh_l0_reverse"] == (2, 12, 3)
    assert sizes["weight_ih_l0"] == (24, 3)
    assert sizes["p_f_l0_reverse"] == (6,)
    assert list(layer.state_dict()) == [*layer._flat_weights_names]
    assert "peephole, 3, 6" in repr(layer)
    assert "heads=2" in repr(layer)


def test_heads_are_blocks_of_the_recurrent_weights() -> None:
    for name, dense_type in (("lstm", fused_rnn.FusedLSTM), ("gru", fused_rnn.FusedGRU)):
        heads = dense_type(3, 6, heads=3, dtype=torch.float64)
        dense = dense_type(3, 6, dtype=torch.float64)
        state = heads.state_dict()
        blocks = state["weight_hh_l0"].view(3, -1, 2, 2)
        full = torch.zeros(blocks.shape[1], 6, 6, dtype=torch.float64)
        for k in range(3):
            full[:, 2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = blocks[k]
        dense.load_state_dict(state | {"weight_hh_l0": full.view(-1, 6)})
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        torch.testing.assert_close(heads(x)[0], dense(x)[0], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (4, ValueError, "heads should divide hidden_size=6, got 4"),
        (0, ValueError, "heads should divide hidden_size=6, got 0"),
        (2.0, TypeError, "heads should be of type int, got: float"),
        (True, TypeError, "heads should be of type int, got: bool"),
    ],
)
def test_wrong_heads(heads: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_rnn.FusedLSTM(3, 6, heads=heads)
    with pytest.raises(error, match=message):
        FusedRecurrent(peephole, 3, 6, heads=heads)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_heads_and_what_cannot_have_them() -> None:
    with pytest.raises(ValueError, match="heads=2 cannot be combined with proj_size=3"):
        fused_rnn.FusedLSTM(3, 6, heads=2, proj_size=3)
    layer = fused_rnn.FusedLSTM(3, 6, heads=2)
    with pytest.raises(ValueError, match=r"torch\.nn's layers have no heads"):
        fused_rnn.unfuse(layer)
    with pytest.raises(RuntimeError, match="which has no heads"):
        torch.jit.trace(layer, torch.randn(4, 2, 3))
    with pytest.raises(RuntimeError, match="which has no cell peephole"):
        torch.jit.trace(FusedRecurrent(peephole, 3, 6), torch.randn(4, 2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_torchs_own_cells_in_the_layer_of_any(name: str) -> None:
    """They run as FusedGRU and FusedLSTM do, traced, explained and recorded, too."""
    layer = FusedRecurrent(CELLS[name], 3, 5, num_layers=2)
    twin = {"gru": fused_rnn.FusedGRU, "lstm": fused_rnn.FusedLSTM}[name](3, 5, num_layers=2)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 3)
    found, expected = layer(x), twin(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert str(explain(layer, x)) == str(explain(twin, x))
    sequences = explain(layer, x, return_state_sequences=True)
    assert str(sequences) == str(
        explain(twin, x, **{"return_cell_sequence": True} if name == "lstm" else {})
    )
    torch.jit.TracerWarning.ignore_lib_warnings()  # those of torch.nn's own code
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return self.layer(x, return_state_sequences=True)

    output, _, others = torch.fx.symbolic_trace(Model())(x)
    torch.testing.assert_close(output, expected[0])
    assert len(others) == len(layer.cell.states) - 1


def test_unfuse_leaves_it_with_a_word() -> None:
    model = torch.nn.Sequential(FusedRecurrent(peephole, 3, 5))
    with pytest.warns(
        UserWarning, match="FusedRecurrent '0' has no twin in torch.nn: left as it is"
    ):
        assert isinstance(fused_rnn.unfuse(model)[0], FusedRecurrent)
    assert fused_rnn.fuse(model)[0] is model[0]


def test_states_are_permuted_together() -> None:
    layer = FusedRecurrent(peephole, 3, 5)
    hx = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    order = torch.tensor([2, 0, 1])
    for found, state in zip(layer.permute_hidden(hx, order), hx, strict=True):
        torch.testing.assert_close(found, state[:, order])


def test_initial_states_of_a_cell() -> None:
    @cell(gates="ab", states="hcn", initial={"h": 0.25, "n": -1.0})
    def begins(gates: Any, state: Any) -> tuple[Tensor, ...]:
        c = torch.tanh(gates.a + state.c * state.n)
        return torch.tanh(gates.b + state.h), c, state.n * torch.sigmoid(c)

    layer = FusedRecurrent(begins, 3, 6, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    given = [torch.full((1, 2, 6), v, dtype=torch.float64) for v in (0.25, 0.0, -1.0)]
    torch.testing.assert_close(layer(x)[0], layer(x, tuple(given))[0], rtol=0, atol=0)
    # A reset takes up the same.
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[2] = True
    output, _ = layer(x, reset=reset)
    torch.testing.assert_close(output[2:], layer(x[2:])[0], rtol=0, atol=1e-12)
    learned = FusedRecurrent(begins, 3, 6, learn_h0=True)
    assert learned.h_0.eq(0.25).all()
    assert learned.c_0.eq(0).all()
    assert learned.n_0.eq(-1).all()
    assert_equal(begins)
    assert_equal(begins, learn_h0=True, num_layers=2)
    assert_equal(begins, {"reset": torch.rand(5, 4) > 0.7})


def test_states_in_and_out() -> None:
    @cell(gates="ab", states="hcn")
    def three(gates: Any, state: Any) -> tuple[Tensor, ...]:
        c = torch.tanh(gates.a + state.n)
        return c * gates.b, c, state.c

    layer = FusedRecurrent(three, 3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    _, states, others = layer(x, return_state_sequences=True)
    assert [tuple(s.shape) for s in states] == [(4, 2, 4)] * 3
    assert [tuple(s.shape) for s in others] == [(5, 2, 8)] * 2
    torch.testing.assert_close(others[0][-1, :, :4], states[1][2])
    torch.testing.assert_close(others[1][0, :, 4:], states[2][3])
    with pytest.raises(
        TypeError, match=r"hx should be a tuple \(h_0, c_0, n_0\) of tensors, got Tensor"
    ):
        layer(x, states[0])
    with pytest.raises(RuntimeError, match=r"hx should be a tuple \(h_0, c_0, n_0\) .*, got 2"):
        layer(x, states[:2])
    with pytest.raises(
        RuntimeError, match=r"Expected hidden\[2\] size \(4, 2, 4\), got \[4, 1, 4\]"
    ):
        layer(x, (*states[:2], states[2][:, :1]))
    with pytest.raises(RuntimeError, match=r"the states in hx should also be 3-D"):
        layer(x, tuple(s[0] for s in states))
    one = FusedRecurrent(CELLS["gru"], 3, 4)
    assert one(x, return_state_sequences=True)[2] == ()


def test_begin_of_parameters() -> None:
    @cell(gates="a", states="h", parameters={"tau": 0.3, "gain": None})
    def begins(gates: Any, state: Any, p: Any) -> Tensor:
        return state.h + p.tau * (p.gain * torch.tanh(gates.a) - state.h)

    layer = FusedRecurrent(begins, 3, 16, bidirectional=True)
    assert layer.tau_l0.eq(0.3).all()
    assert layer.tau_l0_reverse.eq(0.3).all()
    bound = 1 / math.sqrt(16)
    assert 0 < layer.gain_l0.abs().max() <= bound
    assert_equal(begins)

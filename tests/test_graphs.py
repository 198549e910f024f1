"""torch.jit.trace, torch.jit.script and torch.fx: what works with torch.nn's layers works here."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import LAYERS, every_layer, states, tensors, twins
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_rnn import FusedGRU, FusedLSTM, Tracer, fuse, unfuse

SIZES = [(6, 4), (2, 3), (1, 1), (9, 5)]  # T, B; the first one is traced
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "deep": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
# torch.jit is deprecated, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _errors_of_tracing() -> Iterator[None]:
    """Our own code is traced without a warning; torch.jit mutes those of torch's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.TracerWarning.ignore_lib_warnings()
        yield


class Model(nn.Module):
    """A layer in the middle of a model."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        output, final = self.rnn(x.tanh())
        return output.relu(), final


class Packed(nn.Module):
    """Packs, runs and pads."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        output, final = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0], final


def inputs(layer: nn.Module, T: int, B: int) -> Tensor:
    x = torch.randn(T, B, 3, dtype=layer.weight_ih_l0.dtype)
    return x.transpose(0, 1) if layer.batch_first else x


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---- torch.jit.trace ----------------------------------------------------------------------------


@every_layer
@every_configuration
def test_a_trace_takes_other_sizes(kind: str, name: str) -> None:
    _, layer = twins(kind, 3, 5, **CONFIGURATIONS[name], dtype=torch.float64)
    model = Model(layer).eval()
    # strict=False is how torch.utils.tensorboard's add_graph traces.
    traced = torch.jit.trace(model, inputs(layer, *SIZES[0]), strict=name != "deep")
    for size in SIZES:
        x = inputs(layer, *size)
        assert_equal(traced(x), model(x))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert sum(k in ("aten::lstm", "aten::gru", f"aten::rnn_{kind}") for k in kinds) == 1


@every_layer
@every_configuration
def test_a_trace_with_states(kind: str, name: str) -> None:
    _, layer = twins(kind, 3, 5, **CONFIGURATIONS[name], dtype=torch.float64)
    layer.eval()

    def arguments(T: int, B: int) -> tuple[Any, ...]:
        hx = states(layer, B)
        return inputs(layer, T, B), hx if len(hx) == 2 else hx[0]

    traced = torch.jit.trace(layer, arguments(*SIZES[0]))
    for size in SIZES:
        given = arguments(*size)
        assert_equal(traced(*given), layer(*given))


@every_layer
def test_a_trace_of_one_sequence(kind: str) -> None:
    _, layer = twins(kind, 3, 5, dtype=torch.float64)
    traced = torch.jit.trace(layer, torch.randn(6, 3, dtype=torch.float64))
    x = torch.randn(4, 3, dtype=torch.float64)
    assert_equal(traced(x), layer(x))


@every_layer
def test_a_trace_of_packed_sequences(kind: str) -> None:
    _, layer = twins(kind, 3, 5, dtype=torch.float64)
    model = Packed(layer)
    example = inputs(layer, 6, 4), torch.tensor([3, 6, 2, 1])
    traced = torch.jit.trace(model, example)
    for lengths in ([3, 4], [2, 2, 5], [1]):
        given = inputs(layer, max(lengths), len(lengths)), torch.tensor(lengths)
        assert_equal(traced(*given), model(*given))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cls", [FusedGRU, FusedLSTM])
def test_learned_initial_states_follow_the_batch(cls: Any, packed: bool) -> None:
    layer = cls(3, 5, 2, bidirectional=True, learn_h0=True, dtype=torch.float64)
    for name in ("h_0", "c_0")[: len(layer._state_widths)]:
        nn.init.normal_(getattr(layer, name))
    model = Packed(layer) if packed else layer

    def arguments(T: int, B: int) -> tuple[Tensor, ...]:
        lengths = (torch.arange(B).flip(0).clamp(1, T).index_fill(0, torch.tensor(0), T),)
        return inputs(layer, T, B), *lengths * packed

    traced = torch.jit.trace(model, arguments(*SIZES[0]))
    for size in SIZES:
        given = arguments(*size)
        assert_equal(traced(*given), model(*given))
    if not packed:
        x = torch.randn(4, 3, dtype=torch.float64)
        assert_equal(torch.jit.trace(layer, x)(x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_a_trace_computes_weights_anew(norm: Any) -> None:
    """And it can be trained: its parameters are the layer's."""
    layer = norm(FusedGRU(3, 5, dtype=torch.float64), "weight_hh_l0")
    traced = torch.jit.trace(layer, inputs(layer, *SIZES[0]))
    names = [name for name, _ in layer.named_parameters()]
    assert [name for name, _ in traced.named_parameters()] == names
    for _ in range(3):
        x = inputs(layer, 4, 2)
        found, expected = traced(x), layer(x)
        assert_equal(found, expected)
        grads = [
            torch.autograd.grad(o[0].square().sum(), [*m.parameters()])
            for o, m in ((found, traced), (expected, layer))
        ]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            for p, g in zip(layer.parameters(), grads[0], strict=True):
                p -= 0.1 * g


@pytest.mark.filterwarnings("ignore:Trace had nondeterministic nodes")
def test_dropout_stays_in_a_trace_of_training() -> None:
    layer = FusedLSTM(3, 5, 2, dropout=0.5)
    x = torch.randn(6, 4, 3)
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.manual_seed(1)
    found = traced(x)[0]
    assert not torch.equal(found, traced(x)[0])


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zoneout": ({"zoneout": 0.1}, {}),
    "recurrent_dropout": ({"recurrent_dropout": 0.1}, {}),
    "clip_recurrent_grad": ({"clip_recurrent_grad": 1.0}, {}),
    "lengths": ({}, {"lengths": torch.tensor([3, 6, 2, 1])}),
    "reset": ({}, {"reset": torch.zeros(6, 4, dtype=torch.bool)}),
    "mask": ({}, {"mask": torch.ones(6, 4, dtype=torch.bool)}),
    "return_cell_sequence": ({}, {"return_cell_sequence": True}),
}


class Call(nn.Module):
    """Calls a layer with keywords."""

    def __init__(self, rnn: nn.Module, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.rnn, self.keywords = rnn, keywords

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x, **self.keywords)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_trace_refuses_what_torch_nn_lacks(name: str) -> None:
    constructor, keywords = OPTIONS[name]
    model = Call(FusedLSTM(3, 5, **constructor), keywords)
    x = torch.randn(6, 4, 3)
    message = f"torch.jit.trace records torch.nn's layer, which has no {name}"
    with pytest.raises(RuntimeError, match=f"{message}$"):
        torch.jit.trace(model, x)


def test_a_trace_takes_what_has_no_effect_in_inference() -> None:
    layer = FusedLSTM(3, 5, recurrent_dropout=0.5, clip_recurrent_grad=1.0, dtype=torch.float64)
    layer.eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, inputs(layer, *SIZES[0]))
        x = inputs(layer, *SIZES[1])
        assert_equal(traced(x), layer(x))


def test_a_trace_raises_torchs_errors() -> None:
    with pytest.raises(RuntimeError, match=r"input\.size\(-1\) must be equal to input_size"):
        torch.jit.trace(FusedGRU(3, 5), torch.randn(6, 4, 7))


def test_tensorboards_graph(tmp_path: Any) -> None:
    tensorboard = pytest.importorskip(
        "torch.utils.tensorboard", reason="the tensorboard package is not installed"
    )
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(Model(FusedGRU(3, 5)), torch.randn(6, 4, 3))


# ---- torch.jit.script ---------------------------------------------------------------------------


@every_layer
def test_script_names_unfuse(kind: str) -> None:
    _, layer = twins(kind, 3, 5)
    model = Model(layer)
    for module in (layer, model):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script\(fused_rnn\.unfuse\(model\)\)"):
            torch.jit.script(module)
    assert model.rnn is layer
    assert type(unfuse(layer)) is LAYERS[kind][0]


def test_an_unfused_layer_can_be_scripted() -> None:
    layer = FusedGRU(3, 5, 2)
    model = nn.Sequential(copy.deepcopy(layer))
    scripted = torch.jit.script(unfuse(model))
    for size in SIZES:
        x = inputs(layer, *size)
        torch.testing.assert_close(scripted(x), layer(x))


# ---- torch.fx -----------------------------------------------------------------------------------


@every_layer
def test_fx_makes_one_node(kind: str) -> None:
    plain, _ = twins(kind, 3, 5, 2, dtype=torch.float64)
    model = Model(plain).eval()
    expected = fx.symbolic_trace(model)
    fuse(model)
    traced = fx.symbolic_trace(model)
    for module in (traced, fx.symbolic_trace(traced), copy.deepcopy(traced)):
        calls = [n.target for n in module.graph.nodes if n.op == "call_module"]
        assert calls == [n.target for n in expected.graph.nodes if n.op == "call_module"] == ["rnn"]
        for size in SIZES:
            x = inputs(plain, *size)
            assert_equal(module(x), model(x))


def test_fx_graphs_are_trained() -> None:
    model = Model(FusedGRU(3, 5, dtype=torch.float64))
    traced = fx.symbolic_trace(model)
    parameters = list(traced.rnn.parameters())
    assert [id(p) for p in parameters] == [id(p) for p in model.rnn.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        x = inputs(model.rnn, 4, 2)
        expected = torch.autograd.grad(model(x)[0].square().sum(), parameters)
        optimizer.zero_grad()
        traced(x)[0].square().sum().backward()
        torch.testing.assert_close([p.grad for p in parameters], list(expected))
        optimizer.step()


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnns = nn.ModuleList([FusedLSTM(3, 5, zoneout=0.1), FusedGRU(5, 5)])

    def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        output, (h, c), cells = self.rnns[0](
            x, (h, c), lengths=lengths, reset=reset, return_cell_sequence=True
        )
        mask = (x[..., 0] * 0 == 0).cummin(0).values
        return self.rnns[1](output, h, mask=mask), c, cells


def test_fx_takes_states_and_options() -> None:
    model = Everything().eval()
    traced = fx.symbolic_trace(model)
    h, c = torch.randn(2, 1, 2, 5)
    arguments = torch.randn(4, 2, 3), h, c, torch.tensor([4, 2]), torch.rand(4, 2) < 0.3
    torch.testing.assert_close(traced(*arguments), model(*arguments), rtol=0, atol=0)


def test_fx_of_the_layer_itself_is_refused() -> None:
    message = "torch.fx can trace a model that calls a fused layer, not the layer itself"
    with pytest.raises(TypeError, match=message):
        fx.symbolic_trace(FusedGRU(3, 5))
    graph = fx.Graph()
    with pytest.raises(TypeError, match=message):
        FusedGRU(3, 5)(fx.Proxy(graph.placeholder("x")))


def double(module: nn.Module, args: Any, result: Any) -> Any:
    return result[0] * 2, result[1]


def test_fx_runs_the_hooks_of_a_leaf_once() -> None:
    model = nn.Sequential(FusedGRU(3, 5))
    model[0].register_forward_hook(double)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    x = torch.randn(4, 2, 3)
    with pytest.raises(TypeError, match="hooks of a fused layer twice"):
        fx.symbolic_trace(model)
    traced = fx.GraphModule(model, Tracer().trace(model))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_fx_leaves_computed_weights_alone() -> None:
    model = nn.Sequential(weight_norm(nn.GRU(3, 5), "weight_hh_l0"))
    fuse(model)
    Tracer().trace(model)
    assert type(model[0].weight_hh_l0) is Tensor


@every_layer
def test_make_fx_records_the_operator(kind: str) -> None:
    _, layer = twins(kind, 3, 5)
    x = torch.randn(4, 2, 3)
    graph = make_fx(lambda x: layer(x)[0])(x)
    assert any("fused_rnn.layer" in str(node.target) for node in graph.graph.nodes)
    x = torch.randn(4, 2, 3, requires_grad=True)
    found, expected = graph(x), layer(x)[0]
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(y.sum(), x) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)

"""Stacks that torch.compile sees as one operator, in which their layers may overlap."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import LAYERS, assert_same, packer, run, states, twins
from test_compile import Renamed, compiled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from wavefront_helpers import overlapping, there_are_none, there_are_streams

from fused_rnn.kernels import launch
from fused_rnn.ops import functional, operators

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is not switched on"
)
# Dynamo looks at .grad of the packed data, which is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(functional, "overlaps", there_are_streams)
    yield
    torch._dynamo.reset()


def apart() -> Any:
    """Layer by layer, without operators."""
    return mock.patch.object(functional, "overlaps", there_are_none)


CASES: list[tuple[str, str, dict[str, Any], tuple[str, ...], bool]] = [
    ("tanh", "triton", {}, (), True),
    ("gru", "triton", {"dropout": 0.5}, ("lengths", "reset"), True),
    ("lstm", "triton", {"learn_h0": True, "clip_recurrent_grad": 0.05}, ("reset",), True),
    ("lstm", "triton", {"dropout": 0.5}, (), False),
    ("relu", "auto", {"learn_h0": True, "batch_first": True, "dropout": 1.0}, ("lengths",), False),
]


@interpreted
@pytest.mark.parametrize(("kind", "backend", "how", "names", "together"), CASES)
def test_as_layer_by_layer(
    kind: str,
    backend: Any,
    how: dict[str, Any],
    names: tuple[str, ...],
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, ours, extra = LAYERS[kind]
    layer = ours(3, 8, num_layers=3, backend=backend, **extra, **how)
    call, counter = compiled(layer)
    if not together:
        monkeypatch.setattr(operators.Stack, "wave", lambda self, train: None)
    for T, B in ((5, 4), (3, 2)):
        x = torch.randn(*((B, T) if layer.batch_first else (T, B)), 3)
        given = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.3}
        keywords = {name: given[name] for name in names}
        torch.manual_seed(1)
        with apart():
            expected = run(layer, [x], None, **keywords)
        torch.manual_seed(1)
        with overlapping(steps=2) as cut:
            found = run(Renamed(call, layer), [x], None, **keywords)  # type: ignore[arg-type]
        assert_same(found, expected, torch.float32)
        assert bool(cut) is together
    assert counter.frame_count <= 2


@interpreted
@pytest.mark.parametrize("frozen", [1, 3])
def test_frozen_layers_and_inference(frozen: int) -> None:
    _, layer = twins("lstm", 3, 8, num_layers=3, backend="triton", dropout=0.5)
    for name, p in layer.named_parameters():
        p.requires_grad_(int(name[-1]) >= frozen)
    x, call = torch.randn(5, 4, 3), compiled(layer)[0]
    results = []
    for function in (layer, call):
        torch.manual_seed(2)
        with overlapping(steps=2) as cut:
            out = function(x)[0]
            wanted = [p for p in layer.parameters() if p.requires_grad]
            results.append([out, *(torch.autograd.grad(out.sum(), wanted) if wanted else ())])
        assert cut
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@interpreted
def test_packed_and_states() -> None:
    _, layer = twins("gru", 3, 8, num_layers=2, backend="triton")
    xs = [torch.randn(n, 3) for n in (5, 2, 4)]
    initial, make = states(layer, 3), packer(False)
    with apart():
        expected = run(layer, xs, initial, make)
    with overlapping(steps=2) as cut:
        found = run(Renamed(compiled(layer)[0], layer), xs, initial, make)  # type: ignore[arg-type]
    assert cut == [2, 2]
    assert_same(found, expected, torch.float32)


@interpreted
def test_a_refused_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_rnn.engines.wavefront import forward

    def refuse(what: launch.Launch) -> None:
        raise launch.LaunchRefused("no room", 8)

    _, layer = twins("lstm", 3, 8, num_layers=2, backend="triton")
    x = torch.randn(5, 4, 3)
    with apart():
        expected = layer(x)[0]
    monkeypatch.setattr(forward, "launch", refuse)
    with overlapping(steps=2) as cut, torch.no_grad():
        assert torch.equal(compiled(layer)[0](x)[0], expected)
    assert cut == [2]


def arguments(backend: str, lowest: int) -> tuple[Any, ...]:
    """Of the operator, for a stack of three GRUs with dropout, as a compiled layer calls it."""
    _, layer = twins("gru", 3, 8, num_layers=3, backend=backend, dropout=0.5)
    for name, p in layer.named_parameters():
        p.requires_grad_(int(name[-1]) >= lowest)
    calls = []
    real = operators.layers_op
    with (
        mock.patch.object(operators, "layers_op", lambda *how: calls.append(how) or real(*how)),
        mock.patch("fused_rnn.layers.call.tracing", return_value=True),
        mock.patch("fused_rnn.layers.base.tracing", return_value=True),
    ):
        layer(torch.randn(4, 2, 3))
    (how,) = calls
    return tuple(how)


@interpreted
@pytest.mark.parametrize(("backend", "lowest"), [("triton", 0), ("triton", 1), ("auto", 0)])
def test_operators(backend: str, lowest: int) -> None:
    """PyTorch's own checks: schema, fake shapes and types."""
    how = arguments(backend, lowest)
    assert how[-1] == lowest
    checks = ["test_schema", "test_faketensor"]
    with overlapping(steps=2):
        torch.library.opcheck(operators.layers_op, how, test_utils=checks)
        tensors, *rest = how
        plain = [t.detach() for t in tensors]
        results = operators.layers_op(plain, *rest)
        grads = [torch.randn_like(t) for t in results[:2]]
        needs = [t.requires_grad for t in tensors]
        kept = [results[0], *results[2:]]
        whole = grads, [True, True], kept, needs, plain, *rest
        torch.library.opcheck(operators.layers_backward_op, whole, test_utils=checks)
        out, h_n, *_ = operators.layers_op(*how)
        wanted = [t for t in tensors if t.requires_grad]
        directions = torch.stack([grads[0], -grads[0]]), torch.stack([grads[1]] * 2)
        pairs = list(zip(*directions, strict=True))
        each = [torch.autograd.grad([out, h_n], wanted, pair, retain_graph=True) for pair in pairs]
    at_once = torch.autograd.grad([out, h_n], wanted, directions, is_grads_batched=True)
    for found, expected in zip(at_once, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("lowest", [0, 1])
def test_flops_are_those_of_the_layers(lowest: int) -> None:
    how = arguments("triton", lowest)
    _, layer = twins("gru", 3, 8, num_layers=3, backend="triton", dropout=0.5)
    for name, p in layer.named_parameters():
        p.requires_grad_(int(name[-1]) >= lowest)
    counts = []
    with apart(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(4, 2, 3))[0].sum().backward()
    counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        operators.layers_op(*how)[0].sum().backward()
    counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@interpreted
def test_cpu_stacks_and_exported_ones_have_an_operator_for_each_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            _, self.rnn = twins("lstm", 3, 8, num_layers=2, backend="triton")

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.rnn(x)[0]
            return output

    def count(program: Any) -> int:
        nodes = program.graph.nodes
        return sum(n.target == torch.ops.fused_rnn.layers.default for n in nodes)

    model, x = Model().eval(), torch.randn(4, 2, 3)
    assert count(torch.export.export(model, (x,))) == 2
    graphs = []
    for where in (apart(), mock.patch.object(functional, "overlaps", there_are_streams)):
        torch._dynamo.reset()
        with where, torch.no_grad():
            torch.compile(model, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)(x)
    assert [count(graph) for graph in graphs] == [2, 1]

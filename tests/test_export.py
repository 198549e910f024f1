"""torch.export with symbolic T and B, and the way to ONNX."""

import copy
import io
from typing import Any

import pytest
import torch
from helpers import states, twins
from torch import Tensor, nn
from torch.export import Dim, export

import fused_rnn

SIZES = [(2, 3), (1, 5), (9, 1), (1, 1), (70, 4)]  # T, B
T_AND_B = {0: Dim("T", min=1), 1: Dim("B", min=1)}


class Tagger(nn.Module):
    """A layer in the middle of a model."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x.tanh())[0])
        return output


@pytest.mark.parametrize(
    ("kind", "strict"), [("relu", False), ("gru", False), ("projected", False), ("lstm", True)]
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # of run_decompositions itself
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of export.load, 2.11
def test_one_graph_for_all_sizes(kind: str, strict: bool) -> None:
    _, layer = twins(kind, 3, 5, num_layers=2, bidirectional=True)
    model = Tagger(layer).eval()
    x = torch.randn(6, 4, 3)
    model(x)
    program = export(model, (x,), dynamic_shapes=(T_AND_B,), strict=strict)
    operators = [n for n in program.graph.nodes if n.target == torch.ops.fused_rnn.layers.default]
    assert len(operators) == 2  # one for each layer, however long the sequence
    assert [n.args[-1] for n in operators] == [1, 1]  # inference saves nothing

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    program = program.run_decompositions()
    for size in SIZES:
        x = torch.randn(*size, 3)
        expected = model(x)
        torch.testing.assert_close(loaded(x), expected)
        torch.testing.assert_close(program.module()(x), expected)


def test_states_are_inputs_and_outputs() -> None:
    _, layer = twins("lstm", 3, 5, batch_first=True)
    hx: Any = states(layer, 4)
    B, T = Dim("B", min=1), Dim("T", min=1)
    shapes = ({0: B, 1: T}, ({1: B}, {1: B}))
    program = export(layer, (torch.randn(4, 6, 3), hx), dynamic_shapes=shapes).module()
    for T_, B_ in SIZES:
        arguments = torch.randn(B_, T_, 3), states(layer, B_)
        torch.testing.assert_close(program(*arguments), layer(*arguments))


def test_an_exported_graph_can_be_trained() -> None:
    """Though it saves nothing: its backward runs forward once more."""
    layer = fused_rnn.FusedGRU(3, 5)
    program = export(layer, (torch.randn(6, 4, 3),), dynamic_shapes=(T_AND_B,)).module()
    x = torch.randn(3, 2, 3)
    results = []
    for module in (program, layer):
        inputs = x.clone().requires_grad_()
        loss = module(inputs)[0].square().sum()
        results.append(torch.autograd.grad(loss, [inputs, *module.parameters()]))
    torch.testing.assert_close(*results)


def test_the_triton_backend_is_exported(triton_device: str) -> None:
    layer = fused_rnn.FusedGRU(3, 5, backend="triton").to(triton_device)
    x = torch.randn(3, 2, 3, device=triton_device)
    program = export(layer, (x,), dynamic_shapes=(T_AND_B,)).module()
    for T, B in [(2, 3), (1, 2)]:
        x = torch.randn(T, B, 3, device=triton_device)
        torch.testing.assert_close(program(x), layer(x))


# ---- ONNX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
@pytest.mark.filterwarnings("ignore:.*_flat_weights")  # of torch.nn, which keeps two lists of them
def test_the_way_to_onnx(kind: str) -> None:
    """ONNX has operators for torch.nn's layers: unfuse, then export. Here without the packages."""
    _, layer = twins(kind, 3, 5)
    model = Tagger(layer).eval()
    x = torch.randn(6, 4, 3)
    expected = model(x)
    fused_rnn.unfuse(model)
    program = export(model, (x,), dynamic_shapes=({1: Dim("B", min=1)},))
    assert not any("fused_rnn" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected)
    x = torch.randn(6, 2, 3)
    torch.testing.assert_close(program.module()(x), model(x))


def assert_runs(program: bytes, model: nn.Module) -> None:
    """The ONNX program computes what ``model`` does, for all sizes, by ONNX' own evaluator."""
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    reference = pytest.importorskip("onnx.reference", reason="the onnx package is not installed")
    evaluator = reference.ReferenceEvaluator(onnx.load_model_from_string(program))
    for size in SIZES:
        x = torch.randn(*size, 3)
        (found,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found.copy()), model(x), rtol=1e-4, atol=1e-5)


ONNX_CONFIGURATIONS = [{}, {"num_layers": 2, "bidirectional": True}]


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", ONNX_CONFIGURATIONS)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.filterwarnings("ignore")  # the exporter's own, of deprecated parts of PyTorch
def test_onnx_of_torch_export(kind: str, kwargs: dict[str, Any]) -> None:
    pytest.importorskip("onnxscript", reason="the onnxscript package is not installed")
    _, layer = twins(kind, 3, 5, batch_first=True, **kwargs)
    model = Tagger(layer).eval()
    x = torch.randn(6, 4, 3)
    model(x)
    plain = fused_rnn.unfuse(copy.deepcopy(model))
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = torch.onnx.export(plain, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    nodes = [n.op_type for n in program.model.graph]
    assert nodes.count(kind.upper()) == layer.num_layers
    buffer = io.BytesIO()
    program.save(buffer)
    assert_runs(buffer.getvalue(), model)


@pytest.mark.parametrize("kwargs", [*ONNX_CONFIGURATIONS, {"batch_first": True}])
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])  # ONNX' evaluator knows no Relu in RNN
@pytest.mark.parametrize("unfused", [False, True])
@pytest.mark.filterwarnings("ignore")  # the exporter's own: it is deprecated
def test_onnx_of_a_trace(kind: str, kwargs: dict[str, Any], unfused: bool) -> None:
    """A trace holds torch.nn's function, so this exporter takes the fused layers, too."""
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    _, layer = twins(kind, 3, 5, **kwargs)
    model = Tagger(layer).eval()
    x = torch.randn(6, 4, 3)
    expected = model(x)
    exported = fused_rnn.unfuse(copy.deepcopy(model)) if unfused else model
    buffer = io.BytesIO()
    axes = {"x": {0: "first", 1: "second"}}
    torch.onnx.export(exported, (x,), buffer, dynamo=False, input_names=["x"], dynamic_axes=axes)
    graph = onnx.load_model_from_string(buffer.getvalue()).graph
    name = kind.upper() if kind in ("gru", "lstm") else "RNN"
    assert [n.op_type for n in graph.node].count(name) == layer.num_layers
    assert_runs(buffer.getvalue(), model)
    torch.testing.assert_close(model(x), expected)

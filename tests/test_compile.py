"""torch.compile: one graph without breaks, the same for every length and batch size."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import LAYERS, assert_same, packer, run, states, twins
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap

import fused_rnn
from fused_rnn.cells.builtin import CELLS
from fused_rnn.engines.dispatch import Backend
from fused_rnn.ops import operators
from fused_rnn.ops.encoding import Settings
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.layer import LayerInputs, LayerSpec, Options, OptionTensors, Weights

# More than one size at a time changes, and none is 0 or 1, for which Dynamo compiles anew.
SIZES = [(4, 2), (7, 3), (2, 5), (9, 9)]  # T, B
# Dynamo looks at .grad of the packed data, which is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
INPUTS = ["batched", "sorted", "unsorted", "unsorted with states"]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(layer: Callable[..., Any]) -> tuple[Any, CompileCounterWithBackend]:
    """Compiled without graph breaks, autograd traced, the graphs run as they are; and a counter."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(layer, fullgraph=True, backend=counter), counter


def compare(
    fused: nn.Module, call: Any, inputs: str, T: int, B: int, dtype: torch.dtype, device: str
) -> None:
    """Outputs and all gradients of the compiled layer against those of the layer itself."""
    I = fused.input_size
    hx: Any = None
    if inputs == "batched":
        xs, make = [torch.randn(T, B, I, dtype=dtype, device=device)], lambda xs: xs[0]
    else:
        xs = [torch.randn(max(1, T - b), I, dtype=dtype, device=device) for b in range(B)]
        make = packer(True)
        if inputs != "sorted":
            xs, make = xs[::-1], packer(False)
    if inputs == "unsorted with states":
        hx = [h.to(device) for h in states(fused, B)]
    assert_same(run(Renamed(call, fused), xs, hx, make), run(fused, xs, hx, make))  # type: ignore[arg-type]


class Renamed:
    """A compiled layer whose parameters have the names of the layer's."""

    def __init__(self, call: Any, layer: nn.Module) -> None:
        self.call, self.named_parameters = call, layer.named_parameters
        self.parameters = layer.parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [(kind, "batched") for kind in LAYERS] + [("gru", inputs) for inputs in INPUTS[1:]],
)
def test_one_graph_for_all_sizes(kind: str, inputs: str) -> None:
    _, fused = twins(kind, 3, 5, bidirectional=kind == "gru", dtype=torch.float64)
    call, counter = compiled(fused)
    counts = []
    for T, B in SIZES:
        compare(fused, call, inputs, T, B, torch.float64, "cpu")
        counts.append(counter.frame_count)
    # The second call tells Dynamo that T and B vary.
    assert counts == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("kind", "inputs"), [("relu", "batched"), ("gru", "unsorted"), ("lstm", "batched")]
)
def test_triton(kind: str, inputs: str, triton_device: str) -> None:
    options = {"relu": {}, "gru": {"recompute": True}, "lstm": {"bidirectional": True}}
    _, fused = twins(kind, 3, 5, backend="triton", **options[kind])
    fused.to(triton_device)
    call, counter = compiled(fused)
    for T, B in [(2, 3), (3, 2)]:
        compare(fused, call, inputs, T, B, torch.float32, triton_device)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("kind", "options", "inputs"),
    [
        ("gru", {"backend": "eager"}, "batched"),
        ("lstm", {"recompute": True}, "unsorted"),
        ("lstm", {"num_layers": 2}, "batched"),
    ],
    ids=["eager", "recompute", "onednn"],
)
def test_other_engines(kind: str, options: dict[str, Any], inputs: str) -> None:
    _, fused = twins(kind, 3, 5, **options)
    call, _ = compiled(fused)
    for T, B in SIZES[:2]:
        compare(fused, call, inputs, T, B, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("sizes", "graphs"),
    [
        ([(4, 2), (7, 3), (2, 5), (9, 9)], [1, 2, 2, 2]),
        ([(4, 2), (7, 2), (9, 2), (9, 3), (7, 4)], [1, 2, 2, 3, 3]),
        ([(4, 2), (7, 3), (1, 3), (1, 4), (7, 1), (7, 0), (5, 5)], [1, 2, 3, 3, 4, 5, 5]),
    ],
)
def test_how_many_graphs_there_are(sizes: list[tuple[int, int]], graphs: list[int]) -> None:
    """The numbers that the README and docs/faq.md give."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = fused_rnn.FusedGRU(3, 5)
    call = torch.compile(layer, fullgraph=True, backend=counter)
    found = []
    for T, B in sizes:
        call(torch.randn(T, B, 3))
        found.append(counter.frame_count)
    assert found == graphs


def test_a_forced_backend_that_cannot_run_raises() -> None:
    """Traced lengths are no segments, so the sweeps of the CPU engine do not do."""
    layer = fused_rnn.FusedGRU(3, 5, backend="cpu")
    lengths = torch.tensor([3, 1])
    x = torch.randn(4, 2, 3)
    assert layer(x, lengths=lengths)[0].shape == (4, 2, 5)
    call, _ = compiled(lambda x: layer(x, lengths=lengths))
    with pytest.raises(Exception, match="backend='cpu' cannot run this layer: it takes"):
        call(x)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which Inductor itself uses
@pytest.mark.slow
def test_inductor() -> None:
    """The default backend of torch.compile, around a layer in the middle of a model."""
    _, fused = twins("lstm", 3, 5)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = fused, nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(self.rnn(x.tanh() + 1)[0])
            return output + x

    model = Model()
    call = torch.compile(model, fullgraph=True)
    for T, B in SIZES[:3]:
        x = torch.randn(T, B, 3, requires_grad=True)
        results = []
        for f in (model, call):
            output = f(x)
            wanted = [x, *model.parameters()]
            results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def same(function: Callable[..., Any], *args: Any) -> None:
    """The compiled function's results are the function's."""
    torch.manual_seed(3)
    expected = torch.utils._pytree.tree_leaves(function(*args))
    torch.manual_seed(3)
    found = torch.utils._pytree.tree_leaves(compiled(function)[0](*args))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_modes() -> None:
    _, layer = twins("lstm", 3, 5, num_layers=2, batch_first=True)
    layer.eval()
    x, hx = torch.randn(2, 4, 3), states(layer, 2)
    same(layer, x, hx)
    same(layer, x[0])
    with torch.no_grad():
        same(layer, x, hx)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # tiny calls: see tests/test_native.py
        same(twins("lstm", 3, 64)[1], torch.randn(30, 8, 3))


def test_dropout_between_layers() -> None:
    layer = fused_rnn.FusedGRU(3, 5, 2, dropout=0.5)
    same(layer, torch.randn(4, 2, 3))


def test_inference_saves_nothing() -> None:
    layer = fused_rnn.FusedGRU(3, 5)
    x = torch.randn(4, 2, 3)
    flags = []
    for enabled in (True, False):
        torch._dynamo.reset()
        call, counter = compiled(layer)
        with torch.set_grad_enabled(enabled):
            call(x)
        nodes = [n for n in counter.graphs[0].graph.nodes if "fused_rnn" in str(n.target)]
        assert [n.target for n in nodes] == [torch.ops.fused_rnn.layers.default]
        flags.append(nodes[0].args[-1])
    assert flags == [0, 1]  # the lowest layer for which something is saved


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which torch.func.jvp itself uses
@pytest.mark.parametrize("transform", ["per sample", "jvp"])
def test_transforms_within(transform: str) -> None:
    """torch.func inside of a compiled function: the tangent of an opaque operator would be lost."""
    layer = fused_rnn.FusedGRU(3, 5)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x, xs = torch.randn(2, 2, 3), torch.randn(6, 2, 2, 3)

    def loss(parameters: Any, x: Tensor) -> Tensor:
        total: Tensor = functional_call(layer, parameters, (x,))[0].square().sum()
        return total

    functions: dict[str, tuple[Callable[..., Any], Any]] = {
        "per sample": (vmap(grad(loss), (None, 0)), xs),
        "jvp": (lambda p, x: jvp(lambda x: functional_call(layer, p, (x,))[0], (x,), (x,)), x),
    }
    function, argument = functions[transform]
    same(function, parameters, argument)


def test_errors_pass_through() -> None:
    layer = fused_rnn.FusedGRU(3, 5)
    with pytest.raises(RuntimeError, match="Expected 3, got 7"):
        torch.compile(layer, backend="eager")(torch.randn(4, 2, 7))
    call = torch.compile(layer, fullgraph=True, backend="eager")
    packed = packer(True)([torch.randn(3, 3), torch.randn(2, 3)])
    with pytest.raises(RuntimeError, match="5 rows of 2 sequences, but got 5 rows and initial st"):
        call(packed, torch.zeros(1, 4, 5))


# ---- the operators themselves -------------------------------------------------------------------


def arguments(
    cell: str,
    backend: Backend,
    packed: bool,
    directions: int,
    save: bool,
    device: str,
    options: bool = False,
) -> tuple[Any, ...]:
    """Of :func:`fused_rnn.ops.operators.layers_op`, without biases where ``packed``."""
    T, B, I, H, known = 3, 2, 3, 4, CELLS[cell]
    G, has_c, steps = known.blocks, known.has_c, (5,) if packed else (T, B)
    sizes = torch.tensor([2, 2, 1]) if packed else None

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    def weights() -> Weights:
        bias = [None if packed else random(G * H) for _ in range(2)]
        return Weights(random(G * H, I), random(G * H, H), *bias, None)

    tensors = OptionTensors()
    if options:
        zone = torch.rand(*steps, directions * H, device=device) < 0.3
        tensors = OptionTensors(
            lengths=None if packed else torch.tensor([1, 3], device=device),
            reset=torch.rand(steps, device=device) < 0.3,
            restart_h=random(directions, H),
            restart_c=random(directions, H) if has_c else None,
            zone_h=zone,
            zone_c=zone.clone() if has_c else None,
            drop=torch.rand(directions, B, H, device=device),
        )
    inputs = LayerInputs(
        random(*steps, I),
        random(directions, B, H),
        random(directions, B, H) if has_c else None,
        tuple(weights() for _ in range(directions)),
        tensors,
    )
    settled = Options(zoned=True, clip=0.5, cells=has_c) if options else None
    layout = BatchLayout(T, B)  # which the operators do not read
    spec = LayerSpec(known, layout, directions, H, recompute=packed, options=settled)
    present = [t for t in inputs.flatten() if t is not None]
    numbers = [0.0, 0.5] if options else [0.0]
    settings = Settings.text(spec, inputs, backend)
    return present, [], sizes, settings, numbers, 0.0, 0 if save else 1


@pytest.mark.parametrize(
    ("cell", "packed", "directions", "save"),
    [("rnn_relu", True, 2, True), ("gru", False, 2, False), ("lstm", False, 1, True)],
)
def test_operators(cell: str, packed: bool, directions: int, save: bool) -> None:
    """PyTorch's own checks: schema, autograd, fake shapes and types, tracing of symbolic sizes."""
    inputs, *options = arguments(cell, "cpu", packed, directions, save, "cpu")
    torch.library.opcheck(operators.layers_op, (inputs, *options))
    check_backward(inputs, options, ["test_schema", "test_faketensor"])


@pytest.mark.parametrize(("cell", "with_options"), [("gru", False), ("lstm", True)])
def test_operators_of_the_eager_loop(cell: str, with_options: bool) -> None:
    """Without the checks that look into storages, which tensors under torch.func have not."""
    inputs, *options = arguments(cell, "eager", not with_options, 2, True, "cpu", with_options)
    torch.library.opcheck(operators.layers_op, (inputs, *options))
    check_backward(inputs, options, ["test_autograd_registration"])


@pytest.mark.parametrize("with_options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize(("cell", "packed"), [("rnn_relu", False), ("gru", True), ("lstm", False)])
def test_operators_of_the_kernels(
    cell: str, packed: bool, with_options: bool, triton_device: str
) -> None:
    inputs, *options = arguments(cell, "triton", packed, 1, True, triton_device, with_options)
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(operators.layers_op, (inputs, *options), test_utils=checks)
    check_backward(inputs, options, checks)


def check_backward(inputs: list[Tensor], options: list[Any], checks: list[str]) -> None:
    """With gradients of the first two outputs, for all inputs but h0."""
    plain = [t.detach() for t in inputs]
    results = operators.layers_op(plain, *options)
    grads = [torch.randn_like(results[0]), torch.randn_like(results[1])]
    told = Settings.each(options[2])[-1]
    given = [True, True, *[False] * (told.cell.has_c + told.cells)]
    needs = [k != 1 and t.requires_grad for k, t in enumerate(inputs)]
    kept = [results[0], *results[len(given) :]]
    arguments = (grads, given, kept, needs, plain, *options)
    torch.library.opcheck(operators.layers_backward_op, arguments, test_utils=checks)

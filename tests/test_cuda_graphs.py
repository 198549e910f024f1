"""CUDA graphs, streams and several devices; without a GPU, that nothing waits for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LAYERS, tensors, twins
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn.engines.dispatch import Backend
from fused_rnn.engines.triton import engine as triton_engine
from fused_rnn.engines.triton import support
from fused_rnn.engines.triton.products import plan_request
from fused_rnn.kernels import pack
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan
from fused_rnn.spec.layer import LayerSpec

KINDS = ["tanh", "relu", "gru", "lstm"]
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])


def need_gpus(count: int = 1) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA or ROCm device(s)")


# ---- without a GPU: meta tensors -----------------------------------------------------------


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would make the host wait for the device, or copy between the two."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(t)]
        outputs = func(*args, **kwargs)
        found = [t for t in torch.utils._pytree.tree_leaves(outputs) if is_tensor(t)]
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.index,  # by a list: it is copied to the device
            torch.ops.aten.index_put_,
        ), func
        devices = {t.device.type for t in (*inputs, *found) if t.dim() > 0}
        assert len(devices) < 2, f"{func} copies between {devices}"
        return outputs


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton engine on tensors without memory: its sweeps only allocate."""

    def make_engine(spec: LayerSpec, device: Any, dtype: Any) -> Any:
        plan = make_plan(plan_request(spec, torch.float32, "tf32"), LIMITS[90])
        return triton_engine.TritonEngine(plan, "tf32")

    monkeypatch.setattr(support, "make_engine", make_engine)
    monkeypatch.setattr(pack, "launch_once", lambda *_: None)
    monkeypatch.setattr(triton_engine, "launch", lambda what: None)


def build(kind: str, **options: Any) -> torch.nn.Module:
    _, ours, extra = LAYERS[kind]
    return ours(8, 16, **extra, **options)


@every_kind
@both
@pytest.mark.parametrize(
    ("backend", "recompute"),
    [("triton", False), ("triton", True), ("eager", False)],
    ids=["triton", "recompute", "eager"],
)
def test_nothing_waits_for_the_device(
    kind: str, bidirectional: bool, backend: Backend, recompute: bool, no_kernels: None
) -> None:
    options = {"bidirectional": bidirectional, "num_layers": 2, "device": "meta"}
    layer = build(kind, backend=backend, recompute=recompute, **options)
    x = torch.empty(5, 3, 8, device="meta", requires_grad=True)
    with NoSynchronisation():
        results = tensors(layer(x))
        grads = torch.autograd.grad(sum(t.sum() for t in results), [x, *layer.parameters()])
    assert {t.device.type for t in (*results, *grads)} == {"meta"}


@every_kind
@both
def test_options_do_not_wait(kind: str, bidirectional: bool, no_kernels: None) -> None:
    options = {"zoneout": 0.1, "recurrent_dropout": 0.2, "learn_h0": True}
    options |= {"clip_recurrent_grad": 1.0, "bidirectional": bidirectional, "num_layers": 2}
    layer = build(kind, backend="triton", device="meta", **options)
    x = torch.empty(5, 3, 8, device="meta", requires_grad=True)
    keywords: dict[str, Any] = {
        "lengths": torch.empty(3, dtype=torch.int64, device="meta"),
        "reset": torch.empty(5, 3, dtype=torch.bool, device="meta"),
    }
    if kind == "lstm":
        keywords["return_cell_sequence"] = True
    with NoSynchronisation():
        output, final, *more = layer(x, **keywords)
        results = [*tensors((output, final)), *more]
        grads = torch.autograd.grad(sum(t.sum() for t in results), [x, *layer.parameters()])
    assert {t.device.type for t in (*results, *grads)} == {"meta"}


@every_kind
def test_a_step_does_not_wait(kind: str, no_kernels: None) -> None:
    layer = build(kind, backend="triton", device="meta")
    x = torch.empty(1, 3, 8, device="meta")
    with torch.no_grad(), NoSynchronisation():
        assert {t.device.type for t in tensors(layer(x))} == {"meta"}


def test_waiting_would_show() -> None:
    x = torch.empty(3, device="meta")
    waits: list[Callable[[], Any]] = [
        lambda: x[0].item(),
        lambda: x.nonzero(),
        lambda: x.cpu(),
        lambda: x[[0, 1]],
        lambda: x.index_put_((torch.tensor([0, 1]),), x[:2]),
        lambda: torch.ones(3).to("meta"),
    ]
    for wait in waits:
        with pytest.raises((AssertionError, RuntimeError)), NoSynchronisation():
            wait()


# ---- with one -----------------------------------------------------------------------------------


def pair(kind: str, bidirectional: bool = False, device: str = "cuda") -> Any:
    _, layer = twins(kind, 16, 64, num_layers=2, bidirectional=bidirectional, backend="triton")
    return layer.to(device)


@every_kind
@both
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "lengths"])
@pytest.mark.gpu
def test_capture_of_inference(kind: str, bidirectional: bool, ragged: bool) -> None:
    """Of new inputs, and new lengths and resets, in the same memory."""
    need_gpus()
    layer = pair(kind, bidirectional)
    x = torch.randn(20, 8, 16, device="cuda")
    keywords = {}
    if ragged:
        keywords["lengths"] = torch.randint(1, 21, (8,), device="cuda")
        keywords["reset"] = torch.rand(20, 8, device="cuda") < 0.2
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                layer(x, **keywords)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tensors(layer(x, **keywords))
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            if ragged:
                keywords["lengths"].random_(1, 21)
                keywords["reset"].bernoulli_(0.2)
            reserved = torch.cuda.memory_reserved()
            graph.replay()
            assert torch.cuda.memory_reserved() == reserved
            for found, expected in zip(captured, tensors(layer(x, **keywords)), strict=True):
                assert torch.equal(found, expected)


@every_kind
@pytest.mark.gpu
def test_capture_of_a_training_step(kind: str) -> None:
    """Forward, backward and the optimizer in one graph; against the same steps without."""
    need_gpus()
    batches = torch.randn(6, 20, 8, 16, device="cuda")
    found, expected = (train(kind, batches, capture) for capture in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def train(kind: str, batches: Tensor, capture: bool) -> list[Tensor]:
    """The parameters after a step on each batch; warmed up first, as a capture needs."""
    torch.manual_seed(0)
    layer = pair(kind)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.zeros_like(batches[0])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        layer(x)[0].square().mean().backward()
        optimizer.step()

    state = [p.detach().clone() for p in layer.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if capture:
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            step()
    with torch.no_grad():
        for p, before in zip(layer.parameters(), state, strict=True):
            p.copy_(before)
    for batch in batches:
        x.copy_(batch)
        graph.replay() if capture else step()
    return [p.detach().clone() for p in layer.parameters()]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.gpu
def test_make_graphed_callables(kind: str) -> None:
    need_gpus()
    layer = pair(kind)
    x = torch.randn(20, 8, 16, device="cuda", requires_grad=True)
    expected = layer(x)[0]
    (slope,) = torch.autograd.grad(expected.sum(), x)
    # Else the nodes of the parameters' gradients live on, bound to the stream of this call, and the
    # capture would have to wait for it.
    expected = expected.detach()
    graphed = torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
    found = graphed(x)[0]
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], slope)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_compiled_with_cuda_graphs(kind: str) -> None:
    need_gpus()
    layer = pair(kind)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(20, 8, 16, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x)[0].clone(), layer(x)[0])


@every_kind
@pytest.mark.gpu
def test_streams(kind: str) -> None:
    """Layers that run at once on several streams do not touch each other's memory."""
    need_gpus()
    layer = pair(kind)
    xs = [torch.randn(200, 8, 16, device="cuda") for _ in range(4)]
    expected = [layer(x)[0].detach().clone() for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer(x)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_kind
@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one(kind: str) -> None:
    need_gpus(2)
    layer = pair(kind, device="cuda:1")
    x = torch.randn(20, 8, 16, device="cuda:1", requires_grad=True)
    with torch.cuda.device(0):
        output = layer(x)[0]
        (slope,) = torch.autograd.grad(output.sum(), x)
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        again = layer(x)[0]
        assert torch.equal(again, output)
        assert torch.equal(torch.autograd.grad(again.sum(), x)[0], slope)

"""Layers of one program and of groups under CUDA graphs, on several streams, from several threads.

What a group of programs waits for must come, whoever else uses the GPU; and each result has the
bits of the same call alone. Without a GPU the tests are rehearsed: small sizes on the CPU, with
stand-ins for the queues of torch.cuda, so that no mistake in a test waits for a GPU.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import plan_request, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan


@dataclass(frozen=True)
class Layer:
    """A layer in bf16, how many programs share a batch tile of it, and the steps of its input."""

    kind: str
    H: int
    group: bool
    T: int = 50

    def __str__(self) -> str:
        return f"{self.kind}-{self.H}-{'group' if self.group else 'program'}"


PROGRAM, GROUP = Layer("lstm", 64, group=False), Layer("lstm", 256, group=True)
LAYERS_TRIED = [PROGRAM, Layer("gru", 128, group=False), GROUP, Layer("gru", 512, group=True)]
B, I = 16, 32
every_case = pytest.mark.parametrize("case", LAYERS_TRIED, ids=str)


def test_which_are_groups() -> None:
    """On every GPU that has them."""
    for case in [*LAYERS_TRIED, Layer("lstm", 1024, group=True), Layer("tanh", 512, group=True)]:
        for limits in LIMITS.values():
            if limits.groups:
                cell = {"tanh": "rnn_tanh"}.get(case.kind, case.kind)
                plan = make_plan(plan_request(cell, case.H, 2, B), limits)
                assert (plan.programs > 1) == case.group, (case, limits.target)


# ---- a GPU, or what stands in for one -----------------------------------------------------------


class Queue:
    """A stream or a captured graph, to which nothing is left to do: the CPU has done it already."""

    def __init__(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, Queue)

    def synchronize(self) -> None:
        pass

    def replay(self) -> None:
        pass


@contextmanager
def entered(queue: Queue) -> Iterator[None]:
    assert isinstance(queue, Queue)
    yield


@dataclass(frozen=True)
class Machine:
    """Where a test runs.

    Attributes:
        device: of the tensors.
        rehearsal: nothing runs later than it is called, and everything is small.
    """

    device: str
    rehearsal: bool

    def build(self, case: Layer) -> tuple[nn.Module, Tensor]:
        """The layer, and an input for it."""
        H, T = (8, 5) if self.rehearsal else (case.H, case.T)
        backend = "auto" if self.rehearsal else "triton"
        layer = twins(case.kind, I, H, backend=backend, dtype=torch.bfloat16)[1]
        return layer.to(self.device), self.input(T)

    def input(self, T: int, sequences: int = B) -> Tensor:
        return torch.randn(T, sequences, I, device=self.device, dtype=torch.bfloat16)


@pytest.fixture(params=[pytest.param("rehearsal"), pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA or ROCm device")
        return Machine("cuda", rehearsal=False)
    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Queue)
    monkeypatch.setattr(torch.cuda, "current_stream", Queue)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "graph", entered)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    return Machine("cpu", rehearsal=True)


# ---- what is run, and compared ------------------------------------------------------------------

Results = list[Tensor]


def infer(layer: nn.Module, x: Any) -> Results:
    with torch.no_grad():
        return [layer(x)[0]]


def train(layer: nn.Module, x: Any) -> Results:
    """The output, and all gradients of a loss."""
    output = layer(x)[0]
    data = output.data if isinstance(output, PackedSequence) else output
    grads = torch.autograd.grad(data.float().square().mean(), [*layer.parameters()])
    return [data.detach(), *grads]


def copies(results: Results) -> Results:
    return [t.clone() for t in results]


def assert_equal(found: Results, expected: Results) -> None:
    """To the last bit; call it when the device has come to an end."""
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.isfinite(b).all(), f"result {i} is not finite"
        assert torch.equal(a, b), f"result {i} of {len(found)} has other bits than alone"


# ---- the tests ----------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("run", [infer, train])
def test_a_captured_graph(
    machine: Machine, case: Layer, run: Callable[[nn.Module, Any], Results]
) -> None:
    """Forward, and forward with backward: replayed 20 times, for three inputs in turn.

    A replay runs with the counters of the capture, which the graph itself has to set to zero.
    """
    layer, x = machine.build(case)
    inputs = [torch.randn_like(x) for _ in range(3)]
    expected = [copies(run(layer, value)) for value in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(layer, x)
    for i in range(20):
        x.copy_(inputs[i % 3])
        graph.replay()
        if machine.rehearsal:
            found = run(layer, x)
        torch.cuda.synchronize()
        assert_equal(found, expected[i % 3])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "case",
    [*LAYERS_TRIED, Layer("lstm", 1024, group=True), Layer("tanh", 512, group=True)],
    ids=str,
)
def test_several_streams(machine: Machine, case: Layer, count: int) -> None:
    """Groups of several launches compete for the multiprocessors, and each needs all of its own."""
    layer, x = machine.build(case)
    inputs = [torch.randn_like(x) for _ in range(count)]
    expected = [copies(train(layer, value)) for value in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for value, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(train(layer, value))
        torch.cuda.synchronize()
        for one, alone in zip(found, expected, strict=True):
            assert_equal(one, alone)


def test_layers_of_both_kinds_at_once(machine: Machine) -> None:
    """One program each, which need no others, between groups, which do."""
    built = [machine.build(case) for case in LAYERS_TRIED]
    expected = [copies(train(layer, x)) for layer, x in built]
    streams = [torch.cuda.Stream() for _ in built]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for (layer, x), stream in zip(built, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(train(layer, x))
        torch.cuda.synchronize()
        for one, alone in zip(found, expected, strict=True):
            assert_equal(one, alone)


@every_case
def test_three_threads(machine: Machine, case: Layer) -> None:
    """Each with a stream and an input of its own."""
    layer, x = machine.build(case)
    inputs = [torch.randn_like(x) for _ in range(3)]
    expected = [copies(train(layer, value)) for value in inputs]
    torch.cuda.synchronize()
    start = threading.Barrier(len(inputs))
    errors: list[BaseException] = []

    def work(value: Tensor, alone: Results) -> None:
        try:
            stream = torch.cuda.Stream()
            start.wait(30)
            with torch.cuda.stream(stream):
                for _ in range(5):
                    found = train(layer, value)
                    stream.synchronize()
                    assert_equal(found, alone)
        except BaseException as error:
            errors.append(error)

    workers = [
        threading.Thread(target=work, args=args) for args in zip(inputs, expected, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


@every_case
def test_a_busy_gpu(machine: Machine, case: Layer) -> None:
    """Large products on another stream hold the multiprocessors while a group wants them."""
    layer, x = machine.build(case)
    expected = copies(train(layer, x))
    size = 8 if machine.rehearsal else 4096
    a = torch.randn(size, size, device=machine.device, dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(other):
            for _ in range(5):
                a @ a
        found = train(layer, x)
        torch.cuda.current_stream().synchronize()
        assert_equal(found, expected)
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", [PROGRAM, GROUP, Layer("lstm", 512, group=True)], ids=str)
def test_20000_steps(machine: Machine, case: Layer) -> None:
    """As many barriers in one launch, of which none may be missed; alone, and beside another."""
    layer, _ = machine.build(case)
    x = machine.input(20 if machine.rehearsal else 20_000, sequences=4)
    expected = copies(train(layer, x))
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        beside = train(layer, x)
    found = train(layer, x)
    torch.cuda.synchronize()
    assert_equal(found, expected)
    assert_equal(beside, expected)


@contextmanager
def no_host_waits() -> Iterator[None]:
    """PyTorch's own watch: a wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
@pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_the_host_does_not_wait(machine: Machine, case: Layer, packed: bool) -> None:
    """From the second call on, since the first one compiles; with lengths never seen, too."""
    layer, x = machine.build(case)

    def batch(longest: int) -> Any:
        value = torch.randn_like(x)
        if not packed:
            return value
        return pack_sequence([value[: max(1, longest - 3 * b), b] for b in range(B)])

    T = x.shape[0]
    train(layer, batch(T))
    for once_more in (batch(T), batch(T - 1)):
        with no_host_waits():
            found = train(layer, once_more)
        assert_equal(found, train(layer, once_more))

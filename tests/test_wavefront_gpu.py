"""Stacks whose layers overlap, on a GPU's streams: against layer by layer."""

from typing import Any

import pytest
import torch
from helpers import assert_close, away_from_kinks, packer, run, sequences, states, twins
from torch import Tensor

from fused_rnn import FusedLSTM
from fused_rnn.engines.wavefront import stack
from fused_rnn.kernels import pieces
from fused_rnn.ops import functional


@pytest.fixture
def cut_on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stacks are cut on the GPU, however short, into pieces of 16 steps."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    cut: list[int] = []

    def cut_stack(
        request: Any, plan: Any, layers: int, T: int, limits: Any, *, train: bool, captured: bool
    ) -> pieces.Cuts:
        cut.append(layers)
        streams = min(layers, pieces.layers_at_a_time(request, plan, limits))
        one = pieces.Cut(-(-T // 16), 16, streams, "for a test")
        return pieces.Cuts(one, one)

    monkeypatch.setattr(stack, "cut_stack", cut_stack)
    return cut


SIZES = [(48, 3, 5, 8), (70, 8, 64, 512), (64, 32, 16, 136)]  # T, B, I, H


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tanh", "relu", "gru", "lstm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_layer_by_layer_on_gpu(
    kind: str,
    size: tuple[int, ...],
    packed: bool,
    dtype: torch.dtype,
    cut_on_gpu: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    T, B, I, H = size
    _, fused = twins(kind, I, H, backend="triton", num_layers=4, dropout=0.2)
    if dtype != torch.float32:
        away_from_kinks(kind, fused)
    fused = fused.to(dtype)
    if packed:
        lengths = [max(1, T - (7 * b) % T) for b in range(B)]
        xs, make = sequences(lengths, I, dtype), packer(False)
    else:
        xs, make = [torch.randn(T, B, I, dtype=dtype)], lambda xs: xs[0]
    xs, initial = [x.cuda() for x in xs], [h.cuda() for h in states(fused, B)]
    fused = fused.cuda()
    torch.manual_seed(2)
    found = run(fused, xs, initial, make)
    torch.manual_seed(2)
    again = run(fused, xs, initial, make)
    assert cut_on_gpu == [4, 4]
    monkeypatch.setattr(functional, "overlaps", lambda device: False)
    torch.manual_seed(2)
    expected = run(fused, xs, initial, make)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for name, value in expected.items():
        assert torch.equal(found[name], again[name]), name
        assert_close(found[name], value, name, dtype, of_largest=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["relu", "gru", "lstm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lengths_and_resets_on_gpu(
    kind: str, size: tuple[int, ...], cut_on_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    T, B, I, H = size
    _, fused = twins(kind, I, H, backend="triton", num_layers=4, learn_h0=True)
    fused, x = fused.cuda(), torch.randn(T, B, I, device="cuda")
    lengths = torch.tensor([T - (7 * b) % T for b in range(B)], device="cuda")
    call = {"lengths": lengths, "reset": torch.rand(T, B, device="cuda") < 0.1}
    found = run(fused, [x], None, **call)
    assert cut_on_gpu == [4]
    monkeypatch.setattr(functional, "overlaps", lambda device: False)
    for name, value in run(fused, [x], None, **call).items():
        assert_close(found[name], value, name, torch.float32, of_largest=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "cudagraphs"])
def test_compiled_on_gpu(backend: str, cut_on_gpu: list[int]) -> None:
    torch._dynamo.reset()
    layer = FusedLSTM(64, 128, num_layers=3, backend="triton", device="cuda", dtype=torch.bfloat16)
    call = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(64, 8, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for function in (layer, call, call, call):
        out, _ = function(x)
        grads = torch.autograd.grad(out.float().square().sum(), list(layer.parameters()))
        results.append([t.clone() for t in (out.detach(), *grads)])
    assert len(cut_on_gpu) >= 3
    for other in results[1:]:
        for found, value in zip(other, results[0], strict=True):
            assert torch.equal(found, value)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_recorded_by_a_cuda_graph(train: bool, cut_on_gpu: list[int]) -> None:
    layer = FusedLSTM(64, 128, num_layers=3, backend="triton", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, 8, 64, device="cuda", dtype=torch.bfloat16)
    parameters = list(layer.parameters())

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(train):
            out, _ = layer(x)
            if not train:
                return [out]
            return [out.detach(), *torch.autograd.grad(out.float().square().sum(), parameters)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = call()
    assert cut_on_gpu
    for found, value in zip(recorded, expected, strict=True):
        assert torch.equal(found, value)


@pytest.mark.gpu
def test_memory_is_that_of_layer_by_layer(
    cut_on_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = FusedLSTM(256, 256, num_layers=4, backend="triton", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, 16, 256, device="cuda", dtype=torch.bfloat16)

    def peak(train: bool) -> int:
        for _ in range(2):
            layer.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            with torch.set_grad_enabled(train):
                out = layer(x)[0]
                if train:
                    out.sum().backward()
        return torch.cuda.max_memory_allocated()

    found = [peak(train) for train in (False, True)]
    assert cut_on_gpu
    monkeypatch.setattr(functional, "overlaps", lambda device: False)
    for overlapped, train in zip(found, (False, True), strict=True):
        assert overlapped <= 1.05 * peak(train), train

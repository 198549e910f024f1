"""FlopCounterMode counts the matrix products of a layer, whatever runs it: as for torch.nn's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import every_layer, packer, states, tensors, twins
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_rnn import FusedGRU, FusedLSTM
from fused_rnn.engines.dispatch import Backend

T, B, I, H = 6, 2, 4, 6


def counted(layer: Any, *arguments: Any, counts_backward: bool = True) -> tuple[int, int]:
    """FLOPs of forward and of forward with backward."""
    with FlopCounterMode(display=False) as counter:
        output = tensors(layer(*arguments))
        forward = counter.get_total_flops()
        if counts_backward:
            sum(t.sum() for t in output).backward()
        return forward, counter.get_total_flops()


def batch(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> Tensor:
    return torch.randn(T, B, I, dtype=dtype, requires_grad=requires_grad)


def test_a_gru_by_hand() -> None:
    """Two products for each gate and row; backward twice as many, but none for initial zeros."""
    gates = 3 * H
    forward = 2 * T * B * gates * (I + H)
    backward = 2 * forward - 2 * B * gates * H
    assert forward + backward == 12_528
    for dtype in (torch.float32, torch.float64):
        assert counted(FusedGRU(I, H, dtype=dtype), batch(dtype)) == (forward, forward + backward)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "bias": False},
    "batch_first": {"batch_first": True},
}


@every_layer
@pytest.mark.parametrize("backend", ["auto", "cpu", "native", "eager"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("input_grad", [True, False])
def test_as_many_as_torch_nn(kind: str, backend: Backend, name: str, input_grad: bool) -> None:
    """In fp64 torch.nn's LSTM, too, consists of products that a counter knows."""
    layers = twins(kind, I, H, **CONFIGURATIONS[name], backend=backend, dtype=torch.float64)
    plain, fused = (counted(layer, batch(requires_grad=input_grad)) for layer in layers)
    assert fused == plain
    assert fused[0] > 0


@every_layer
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_packed_sequences_and_states(kind: str, backend: Backend) -> None:
    layers = twins(kind, I, H, bidirectional=True, backend=backend, dtype=torch.float64)
    sequences = [torch.randn(t, I, dtype=torch.float64) for t in (2, 7, 1)]
    hx: Any = tuple(s.requires_grad_() for s in states(layers[0], 3))
    hx = hx if len(hx) == 2 else hx[0]
    plain, fused = (counted(layer, packer(False)(sequences), hx) for layer in layers)
    assert fused == plain
    gates = layers[0].weight_hh_l0.shape[0]
    R = layers[0].weight_hh_l0.shape[1]
    projection = 2 * 2 * 10 * R * H if kind == "projected" else 0
    assert fused[0] == 2 * 2 * 10 * gates * (I + R) + projection


@every_layer
@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
def test_frozen_weights(kind: str, frozen: str) -> None:
    layers = twins(kind, I, H, dtype=torch.float64)
    for layer in layers:
        getattr(layer, frozen).requires_grad_(False)
    plain, fused = (counted(layer, batch()) for layer in layers)
    assert fused == plain


@every_layer
def test_inference_and_a_single_step(kind: str) -> None:
    layers = twins(kind, I, H, dtype=torch.float64)
    for x in (batch(), batch()[:1]):
        with torch.no_grad():
            plain, fused = (counted(layer, x, counts_backward=False) for layer in layers)
        assert fused == plain
    plain, fused = (counted(layer, batch()[:1]) for layer in layers)
    assert fused == plain


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels(kind: str, packed: bool, triton_device: str) -> None:
    plain, fused = twins(kind, I, H, backend="triton")
    plain.double()
    fused.to(triton_device)
    found = []
    for layer in (plain, fused):
        like = layer.weight_hh_l0
        x = torch.randn(3, B, I).to(like).requires_grad_()
        found.append(counted(layer, packer(True)([x[:, 0], x[:2, 1]]) if packed else x))
    assert found[1] == found[0]


@pytest.fixture
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forget_graphs")
@pytest.mark.parametrize("kind", ["gru", "lstm", "projected"])
def test_compiled_and_exported_layers(kind: str) -> None:
    """There the operators are counted; nothing that they run is counted once more."""
    _, layer = twins(kind, I, H, bidirectional=True, dtype=torch.float64)
    expected = counted(layer, batch())
    # Newer versions of PyTorch run what is compiled eagerly while a counter is at work.
    compiled = torch.compile(lambda x: layer(x), backend="aot_eager")
    assert counted(compiled, batch()) == expected
    exported = torch.export.export(layer, (batch(),)).module()
    assert counted(exported, batch()) == expected


def test_options() -> None:
    """Those that the CPU runs step by step, and lengths, of which padding costs nothing."""
    zoned = FusedLSTM(I, H, zoneout=0.1, dtype=torch.float64)
    assert counted(zoned, batch()) == counted(FusedLSTM(I, H, dtype=torch.float64), batch())
    gru = FusedGRU(I, H, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        gru(batch(), lengths=torch.tensor([6, 1]))
    assert counter.get_total_flops() == 2 * 7 * 3 * H * (I + H)


def test_by_module_and_only_what_is_inside() -> None:
    model = nn.Sequential(nn.Linear(I, I), FusedGRU(I, H))
    forward, both = counted(model[1], batch(torch.float32))
    linear = 2 * T * B * I * I
    x = batch(torch.float32)
    with FlopCounterMode(display=False) as counter:
        loss = model(x)[0].sum()
    counts = counter.get_flop_counts()
    assert sum(counts["Sequential.1"].values()) == forward
    assert sum(counts["Sequential.0"].values()) == linear
    assert counter.get_total_flops() == forward + linear
    with FlopCounterMode(display=False) as counter:  # not active in forward
        loss.backward()
    assert counter.get_total_flops() == both - forward + 2 * linear
    model(x)  # after the counter
    assert counter.get_total_flops() == both - forward + 2 * linear


def test_two_counters_and_a_second_derivative() -> None:
    layer, x = FusedGRU(I, H), batch(torch.float32)
    with FlopCounterMode(display=False) as outer, FlopCounterMode(display=False) as inner:
        output = layer(x)[0]
    assert outer.get_total_flops() == inner.get_total_flops() == counted(layer, x)[0]
    with FlopCounterMode(display=False) as counter:
        (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert counter.get_total_flops() > 0


def test_results_do_not_change_under_a_counter() -> None:
    for cls in (FusedGRU, FusedLSTM):
        layer, x = cls(I, H), batch(torch.float32)
        expected = layer(x)
        with FlopCounterMode(display=False):
            found = layer(x)
        for a, b in zip(tensors(found), tensors(expected), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["auto", "cpu", "native"])
@pytest.mark.parametrize("steps", [T, 20])
def test_onednn_is_counted(backend: Backend, steps: int) -> None:
    """In fp32 too, in which a counter sees nothing of nn.LSTM's own kernel."""
    x = torch.randn(steps, B, I)
    plain, fused = twins("lstm", I, H, backend=backend)
    expected = counted(plain.double(), x.double())
    assert counted(fused, x) == expected
    with torch.no_grad():
        assert counted(fused, x, counts_backward=False)[0] == expected[0]

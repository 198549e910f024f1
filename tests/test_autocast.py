"""autocast: everything in its type, whatever the cell and the device."""

from typing import Any

import pytest
import torch
from helpers import LAYERS, assert_no_worse, every_layer, packer, states, tensors, twins
from torch import Tensor, nn

import fused_rnn
from fused_rnn.engines import native_rules

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
KINDS = ["tanh", "relu", "gru", "lstm"]


def devices() -> Any:
    gpu = pytest.param("cuda", marks=pytest.mark.gpu)
    return pytest.mark.parametrize("device", ["cpu", gpu])


def available(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")


@every_layer
@TYPES
@devices()
def test_types(kind: str, dtype: torch.dtype, device: str) -> None:
    """All results in the autocast type, given states and packed input included, gradients not."""
    available(device)
    _, layer = twins(kind, 3, 5, num_layers=2, bidirectional=True)
    layer.to(device)
    hx = tuple(h.to(device) for h in states(layer, 2))
    xs = [torch.randn(t, 3, device=device, requires_grad=True) for t in (4, 2)]
    with torch.autocast(device, dtype=dtype):
        for x in (torch.stack([xs[0], xs[0]], dim=1), packer(True)(xs)):
            results = tensors(layer(x, hx if len(hx) == 2 else hx[0]))
            assert [t.dtype for t in results] == [dtype] * len(results)
    results[0].float().sum().backward()
    for p in (*xs, *layer.parameters()):
        assert p.grad is not None
        assert p.grad.dtype == torch.float32


@every_layer
@TYPES
def test_results_are_those_of_a_layer_of_that_type(kind: str, dtype: torch.dtype) -> None:
    _, layer = twins(kind, 8, 16, bidirectional=True)
    x = torch.randn(6, 3, 8)
    with torch.autocast("cpu", dtype=dtype):
        found = tensors(layer(x))
    for a, b in zip(found, tensors(layer.to(dtype)(x.to(dtype))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@TYPES
def test_the_kernels(kind: str, dtype: torch.dtype, triton_device: str) -> None:
    _, layer = twins(kind, 3, 5, backend="triton")
    layer.to(triton_device)
    x = torch.randn(3, 2, 3, device=triton_device)
    with torch.autocast(triton_device, dtype=dtype):
        found = tensors(layer(x))
    found[0].float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32
    for a, b in zip(found, tensors(layer.to(dtype)(x.to(dtype))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@TYPES
def test_as_cudnn(kind: str, dtype: torch.dtype) -> None:
    """At most twice the error of torch.nn's, in the same type.

    autocast takes cuDNN's layers to fp16, even where bf16 is asked for; so they are cast here.
    """
    available("cuda")
    plain, fused = twins(kind, 16, 64)
    exact = twins(kind, 16, 64, dtype=torch.float64)[0]
    exact.load_state_dict(plain.state_dict())
    x = torch.randn(20, 8, 16)
    results = []
    with torch.autocast("cuda", dtype=dtype):
        results.append({str(i): t for i, t in enumerate(tensors(fused.cuda()(x.cuda())))})
    found = tensors(plain.cuda().to(dtype)(x.cuda().to(dtype)))
    results.append({str(i): t for i, t in enumerate(found)})
    assert all(t.dtype == dtype for result in results for t in result.values())
    oracle = {str(i): t for i, t in enumerate(tensors(exact(x.double())))}
    assert_no_worse(*({n: t.cpu() for n, t in r.items()} for r in results), oracle)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_state_is_wider_inside(kind: str) -> None:
    """Results of many steps are the exact ones of the rounded inputs, rounded once."""
    _, layer = twins(kind, 8, 16)
    x = torch.randn(200, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tensors(layer(x))
    exact = tensors(layer.bfloat16().double()(x.bfloat16().double()))
    for a, b in zip(found, exact, strict=True):
        half = torch.finfo(torch.bfloat16).eps / 2
        assert (a.double() - b).abs().le(1.01 * half * b.abs() + 1e-5).all()


@every_layer
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
def test_backward_within_the_context(kind: str, create_graph: bool) -> None:
    """Our engines' is not autocast a second time, if the layer ran before the context.

    torch.nn's own kernels are, where the layer runs them, just as in torch.nn's layer.
    """
    plain, fused = twins(kind, 3, 5, num_layers=2, backend="cpu")
    _, native = twins(kind, 3, 5, num_layers=2, backend="native")
    native.load_state_dict(plain.state_dict())
    x = torch.randn(4, 2, 3, requires_grad=True)

    def slopes(layer: nn.Module, inside: bool) -> tuple[Tensor, ...]:
        loss = tensors(layer(x))[0].float().square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            wanted = [x, *layer.parameters()]
            found = torch.autograd.grad(loss, wanted, create_graph=create_graph)
        if create_graph:  # outside: within, PyTorch's own derivatives are autocast
            total = torch.stack([g.square().sum() for g in found]).sum()
            found = torch.autograd.grad(total, wanted)
        return found

    assert all(map(torch.equal, slopes(fused, True), slopes(fused, False)))
    assert all(map(torch.equal, slopes(native, True), slopes(plain, True)))


def test_fp64_is_left_alone() -> None:
    """As by torch.nn's layers and everything else under autocast."""
    layer, x = fused_rnn.FusedGRU(3, 5, dtype=torch.float64), torch.randn(4, 2, 3)
    expected = layer(x.double())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.double())[0], expected)
        with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float32\) does not match"):
            layer(x)
        with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match"):
            layer.float()(x.double())
        with pytest.raises(ValueError, match=r"RNN input dtype \(torch.int64\) does not match"):
            layer(x.long())
        with pytest.raises(RuntimeError, match=r"hidden tensor with torch\.float64"):
            layer(x, torch.zeros(1, 2, 5, dtype=torch.float64))


@pytest.mark.parametrize("multiplies", [False, True])
def test_explain_knows_the_type(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16-bit types torch.nn's kernels take those for which the CPU has instructions."""
    monkeypatch.setattr(native_rules, "_multiplies", lambda dtype: multiplies)
    layer, x = fused_rnn.FusedLSTM(3, 64), torch.zeros(16, 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_rnn.explain(layer, x)[0].backend == ("native" if multiplies else "cpu")
    assert fused_rnn.explain(layer, x)[0].backend == "native"


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@devices()
def test_grad_scaler(kind: str, device: str) -> None:
    """fp16 training with a scaler: a step that overflows is skipped, the others learn."""
    available(device)
    torch.manual_seed(0)
    _, layer = twins(kind, 3, 16)
    model = nn.ModuleList([layer, nn.Linear(16, 1)]).to(device)
    x = torch.randn(8, 16, 3)
    target = x.cumsum(0)[..., :1].tanh().to(device)  # on a GPU it is not deterministic, and warns
    x = x.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)  # overflows at first
    losses, scales = [], []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = nn.functional.mse_loss(model[1](model[0](x)[0]).float(), target)
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if len(scales) == 1:
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        losses.append(loss.item())
    assert scales[0] == 2.0**39
    assert losses[-1] < losses[0] / 2
    assert all(torch.isfinite(p).all() for p in model.parameters())

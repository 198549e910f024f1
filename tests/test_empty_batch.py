"""No sequence in the batch: results without elements, and zeros for every gradient, as torch.nn."""

from typing import Any

import pytest
import torch
from helpers import LAYERS, every_layer, states, tensors, twins
from torch import Tensor, nn

import fused_rnn

T, I, H = 3, 4, 5
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True},
}


def batch(layer: nn.Module, steps: int = T, device: str = "cpu") -> Tensor:
    size = (0, steps, I) if layer.batch_first else (steps, 0, I)
    return torch.zeros(size, dtype=layer.weight_ih_l0.dtype, device=device)


def zeros_for_all(loss: Tensor, wanted: list[Tensor]) -> None:
    for tensor, grad in zip(
        wanted, torch.autograd.grad(loss, wanted, retain_graph=True), strict=True
    ):
        assert grad.shape == tensor.shape
        assert not grad.any()


def total(found: list[Tensor]) -> Tensor:
    return torch.stack([t.sum() for t in found]).sum()


def check(plain: nn.Module, fused: nn.Module, device: str = "cpu", **keywords: Any) -> None:
    """Shapes and ``requires_grad`` of torch.nn, and a gradient for whatever can have one."""
    for steps in (T, 1):
        x = batch(plain, steps)
        expected, found = tensors(plain(x)), tensors(fused(x.to(device), **keywords))
        assert [t.shape for t in found] == [t.shape for t in expected]
        assert [t.requires_grad for t in found] == [t.requires_grad for t in expected]
        hx = [s.to(device).requires_grad_() for s in states(plain, 0)]
        x = x.to(device).requires_grad_()
        found = tensors(fused(x, tuple(hx) if len(hx) == 2 else hx[0], **keywords))
        for part in (found, found[:1], found[1:]):
            zeros_for_all(total(part), [x, *hx, *fused.parameters()])


@every_layer
@pytest.mark.parametrize("backend", ["auto", "cpu", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(kind: str, backend: Any, shape: str) -> None:
    check(*twins(kind, I, H, backend=backend, **SHAPES[shape]))


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_gradients_of_the_kernels(kind: str, triton_device: str) -> None:
    plain, fused = twins(kind, I, H, 2, backend="triton")
    check(plain, fused.to(triton_device), triton_device)


@every_layer
def test_nothing_is_recorded_where_nothing_wants_a_gradient(kind: str) -> None:
    plain, fused = twins(kind, I, H)
    for layer in (plain, fused):
        layer.requires_grad_(False)
        assert not any(t.requires_grad for t in tensors(layer(batch(layer))))


@every_layer
def test_lower_layers_and_learned_states_get_zeros(kind: str) -> None:
    _, ours, extra = LAYERS[kind]
    below, fused = nn.Linear(I, I), ours(I, H, 2, learn_h0=True, **extra)
    output, _ = fused(below(batch(fused)), reset=torch.zeros(T, 0, dtype=torch.bool))
    zeros_for_all(output.sum(), [*below.parameters(), *fused.parameters()])


@every_layer
def test_lengths_and_resets(kind: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    plain, fused = twins(kind, I, H)
    check(plain, fused, lengths=none)
    x = batch(fused).requires_grad_()
    reset = torch.zeros(T, 0, dtype=torch.bool)
    found = tensors(fused(x, lengths=none, reset=reset))
    zeros_for_all(total(found), [x, *fused.parameters()])


def test_cell_sequence() -> None:
    fused = fused_rnn.FusedLSTM(I, H)
    cells = fused(batch(fused), return_cell_sequence=True)[2]
    assert cells.shape == (T, 0, H)
    zeros_for_all(cells.sum(), list(fused.parameters()))


@pytest.mark.parametrize("kind", ["relu", "gru", "lstm"])
def test_autocast(kind: str) -> None:
    _, fused = twins(kind, I, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tensors(fused(batch(fused)))
    assert all(t.dtype == torch.bfloat16 for t in found)
    zeros_for_all(total(found), list(fused.parameters()))


@every_layer
def test_vmap(kind: str) -> None:
    _, fused = twins(kind, I, H)
    found = torch.vmap(lambda x: tensors(fused(x))[0])(torch.zeros(6, T, 0, I))
    assert found.shape == (6, T, 0, fused.proj_size or H)


@every_layer
@pytest.mark.parametrize("how", ["compile", "export"])
def test_traced(kind: str, how: str) -> None:
    """A graph made for other sizes, and one made for this."""
    _, fused = twins(kind, I, H, 2, bidirectional=True)
    torch._dynamo.reset()
    x = batch(fused).requires_grad_()
    if how == "compile":
        traced: Any = torch.compile(fused, fullgraph=True, backend="aot_eager")
        parameters = list(fused.parameters())
    else:
        sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        traced = torch.export.export(fused, (torch.zeros(4, 3, I),), dynamic_shapes=sizes).module()
        parameters = list(traced.parameters())
    found = tensors(traced(x))
    assert [t.shape for t in found] == [t.shape for t in tensors(fused(x))]
    zeros_for_all(total(found), [x, *parameters])
    with torch.no_grad():
        assert [t.shape for t in tensors(traced(x))] == [t.shape for t in found]
    torch._dynamo.reset()

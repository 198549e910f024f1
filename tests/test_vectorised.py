"""Many gradients asked for at once: ``is_grads_batched=True`` and what PyTorch makes of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import every_backend, every_layer, tensors, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

SHAPE = (3, 2, 2)  # T, B, I
KINDS = ["packed", "lengths", "reset", "zoneout", "clip", "recompute", "stack", "step"]


def jacobians_agree(call: Callable[[Tensor], Any], x: Tensor, rtol: float = 1e-9) -> None:
    """The vectorised Jacobian is the one that is made row by row."""
    found, expected = (
        torch.autograd.functional.jacobian(call, x, vectorize=v) for v in (True, False)
    )
    assert any(j.abs().sum() > 0 for j in expected)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol / 10)


def caller(layer: nn.Module, case: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The layer as a function of its input, by one of the ways that a call can take."""
    how: dict[str, Any] = {}
    if case == "lengths":
        how["lengths"] = torch.tensor([3, 1])
    elif case == "reset":
        how["reset"] = torch.tensor([[False, False], [True, False], [False, True]])
    elif case == "zoneout":
        layer.eval().zoneout = 0.25
    elif case == "clip":
        layer.clip_recurrent_grad = 0.1
    elif case == "recompute":
        layer.recompute = True
    if case == "packed":
        return lambda x: tuple(tensors(layer(pack_sequence([x[:, 0], x[:2, 1]]))))
    return lambda x: tuple(tensors(layer(x, **how)))


@every_layer
@pytest.mark.parametrize("backend", ["auto", "cpu", "eager"])
@pytest.mark.parametrize("case", KINDS)
def test_jacobian(kind: str, backend: Any, case: str) -> None:
    if case in ("zoneout", "clip") and backend == "cpu":
        backend = "auto"  # the loop that knows them is nobody's engine
    shape = {"num_layers": 2, "bidirectional": True} if case == "stack" else {}
    _, layer = twins(kind, 2, 3, backend=backend, dtype=torch.float64, **shape)
    x = torch.randn(SHAPE, dtype=torch.float64)
    jacobians_agree(caller(layer, case), x[:1] if case == "step" else x)


def test_jacobian_of_onednn() -> None:
    _, layer = twins("lstm", 2, 3, 2, backend="native")
    jacobians_agree(caller(layer, "plain"), torch.randn(SHAPE), rtol=1e-4)


def many_at_once_agree(function: Callable[[Tensor], Any], x: Tensor, rtol: float) -> None:
    """Three gradients of each output at once are those of three backwards."""
    x = x.detach().clone().requires_grad_()
    outputs = function(x)
    for output in outputs:
        many = torch.randn(3, *output.shape, dtype=x.dtype, device=x.device)
        (found,) = torch.autograd.grad(output, x, many, retain_graph=True, is_grads_batched=True)
        one_by_one = [torch.autograd.grad(output, x, one, retain_graph=True)[0] for one in many]
        torch.testing.assert_close(found, torch.stack(one_by_one), rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("kind", [pytest.param("tanh", marks=pytest.mark.slow), "gru", "lstm"])
@pytest.mark.parametrize("case", ["plain", "packed", "zoneout"])
def test_gradients_of_the_kernels(kind: str, case: str, triton_device: str) -> None:
    _, layer = twins(kind, 2, 3, backend="triton")
    call = caller(layer.to(triton_device), case)
    many_at_once_agree(call, torch.randn(SHAPE, device=triton_device), rtol=1e-4)


@every_layer
@every_backend
def test_gradcheck_and_hessian(kind: str, backend: Any) -> None:
    _, layer = twins(kind, 2, 2, backend=backend, dtype=torch.float64)
    x = torch.randn(2, 2, 2, dtype=torch.float64)
    call = caller(layer, "plain")
    variable = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(call, variable, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, variable, check_batched_grad=True)

    def loss(x: Tensor) -> Tensor:
        return torch.stack([t.square().sum() for t in call(x)]).sum()

    found, expected = (
        torch.autograd.functional.hessian(loss, x, vectorize=v) for v in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", [pytest.param("relu", marks=pytest.mark.slow), "gru", "projected"])
@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("case", ["plain", "zoneout"])
def test_traced(kind: str, how: str, case: str) -> None:
    _, layer = twins(kind, 2, 3, 2, dtype=torch.float64)
    caller(layer, case)  # sets the layer's options
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch._dynamo.reset()
    if how == "compile":
        traced: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    else:
        traced = torch.export.export(layer, (x,)).module()
    many_at_once_agree(lambda x: tensors(traced(x)), x, rtol=1e-9)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_traced_packed_input() -> None:
    _, layer = twins("lstm", 2, 3, dtype=torch.float64)
    torch._dynamo.reset()
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(SHAPE, dtype=torch.float64)
    call = lambda x: tensors(traced(pack_sequence([x[:, 0], x[:2, 1]])))  # noqa: E731
    with torch._functorch.config.patch(donated_buffer=False):  # backward runs more than once
        many_at_once_agree(call, x, rtol=1e-9)
    torch._dynamo.reset()

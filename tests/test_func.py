"""torch.func: every transform and their nestings, against the same of the eager loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import every_layer, twins
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn.engines import reference
from fused_rnn.ops import autograd

# What jvp and linearize themselves warn of.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit", "ignore:Attempted to insert a get_attr"
)
KINDS = ["relu", "gru", "lstm"]

Parameters = dict[str, Tensor]


class Case:
    """One layer, and what a transform may be applied to: parameters, an input, several inputs."""

    def __init__(self, layer: nn.Module) -> None:
        generator = torch.Generator().manual_seed(3)
        draw: Any = lambda *s: torch.randn(*s, 2, dtype=dtype, generator=generator)  # noqa: E731
        dtype = layer.weight_ih_l0.dtype
        self.layer, self.has_c = layer, isinstance(layer, fused_rnn.FusedLSTM)
        self.p = {name: p.detach() for name, p in layer.named_parameters()}
        self.x, self.xs = draw(3, 2), draw(4, 3, 2)

    def out(self, p: Parameters, x: Tensor) -> Tensor:
        output: Tensor = functional_call(self.layer, p, (x,))[0]
        return output

    def loss(self, p: Parameters, x: Tensor) -> Tensor:
        return self.out(p, x).square().sum()

    def from_state(self, h: Tensor) -> Any:
        return self.layer(self.x, (h, h) if self.has_c else h)

    @property
    def stacked(self) -> Parameters:
        return {name: torch.stack([p, 2 * p, p - 1]) for name, p in self.p.items()}


TRANSFORMS: dict[str, Callable[[Case], Any]] = {
    "grad": lambda c: grad(c.loss)(c.p, c.x),
    "grad of the input": lambda c: grad(c.loss, 1)(c.p, c.x),
    "vmap": lambda c: vmap(c.layer)(c.xs),
    "vmap in the last place": lambda c: vmap(c.layer, in_dims=3, out_dims=1)(c.xs.movedim(0, 3)),
    "vmap of states": lambda c: vmap(c.from_state)(c.xs.new_ones(5, 2, 2, 3)),
    "vmap of vmap": lambda c: vmap(vmap(c.layer))(c.xs.expand(2, *c.xs.shape)),
    "vmap, autograd outside": lambda c: torch.autograd.grad(
        vmap(lambda x: c.layer(x)[0])(c.xs).square().sum(), list(c.layer.parameters())
    ),
    "ensemble": lambda c: vmap(c.out, (0, None))(c.stacked, c.x),
    "ensemble, own inputs": lambda c: vmap(c.out, (0, 0))(c.stacked, c.xs[:3]),
    "gradients of an ensemble": lambda c: vmap(grad(c.loss), (0, None))(c.stacked, c.x),
    "gradients per sample": lambda c: vmap(grad(c.loss), (None, 0))(c.p, c.xs),
    "grad of vmap": lambda c: grad(lambda p: vmap(c.out, (None, 0))(p, c.xs).square().sum())(c.p),
    "jacrev": lambda c: jacrev(c.out, 1)(c.p, c.x),
    "jacfwd": lambda c: jacfwd(c.out, 1)(c.p, c.x),
    "hessian": lambda c: hessian(c.loss, 1)(c.p, c.x),
    "hessian of parameters": lambda c: hessian(c.loss)(c.p, c.x[:2]),
    "jacrev of jacrev": lambda c: jacrev(jacrev(c.loss, 1), 1)(c.p, c.x[:2]),
    "grad of grad": lambda c: grad(lambda x: grad(c.loss, 1)(c.p, x).square().sum())(c.x),
    "grad, autograd outside": lambda c: torch.autograd.grad(
        grad(c.loss, 1)(dict(c.layer.named_parameters()), c.x).square().sum(),
        list(c.layer.parameters()),
        allow_unused=True,
    ),
    "jvp": lambda c: jvp(lambda x: c.layer(x), (c.x,), (c.x.cos(),)),
    "jvp of grad": lambda c: jvp(lambda x: grad(c.loss, 1)(c.p, x), (c.x,), (c.x.cos(),)),
}
LINEARIZE = {"linearize": lambda c: linearize(lambda x: c.out(c.p, x), c.x)[1](c.x.cos())}


def compare(kind: str, transform: str, backend: Any, device: str, dtype: torch.dtype) -> None:
    results = []
    for name in (backend, "eager"):
        torch.manual_seed(0)
        _, layer = twins(kind, 2, 3, backend=name, bidirectional=True, dtype=dtype)
        on = device if name == backend else "cpu"
        case = Case(layer)
        layer.to(on)
        case.x, case.xs = case.x.to(on), case.xs.to(on)
        case.p = {k: p.to(on) for k, p in case.p.items()}
        call = (TRANSFORMS | LINEARIZE)[transform]
        results.append(torch.utils._pytree.tree_leaves(call(case)))
    rtol, atol = (1e-9, 1e-10) if dtype == torch.float64 else (1e-4, 2e-5)
    for found, expected in zip(*results, strict=True):
        if expected is None:  # the ReLU's curvature does not reach the bias
            assert found is None or not found.any()
        else:
            torch.testing.assert_close(found.cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(kind: str, transform: str) -> None:
    compare(kind, transform, "cpu", "cpu", torch.float64)


def test_linearize() -> None:
    """Of one cell: it takes seconds, since it traces the loop."""
    compare("relu", "linearize", "cpu", "cpu", torch.float64)


@pytest.mark.parametrize("transform", ["vmap", "grad", "gradients per sample", "jacrev", "jvp"])
def test_transforms_of_onednn(transform: str) -> None:
    compare("lstm", transform, "native", "cpu", torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", ["vmap", "grad", "gradients per sample", "hessian"])
def test_transforms_of_the_kernels(kind: str, transform: str, triton_device: str) -> None:
    compare(kind, transform, "triton", triton_device, torch.float32)


@every_layer
def test_the_eager_loop_equals_autograd(kind: str) -> None:
    """The oracle of this file against torch.nn's gradients and against finite differences."""
    plain, layer = twins(kind, 2, 3, backend="eager", dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    expected = torch.autograd.grad(plain(x)[0].square().sum(), list(plain.parameters()))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    found = grad(lambda p: functional_call(layer, p, (x,))[0].square().sum())(parameters)
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    call = lambda x: layer(x)[0]  # noqa: E731
    eps = 1e-6 * torch.randn_like(x)
    tangent = jvp(call, (x,), (eps,))[1]
    difference = (call(x + eps) - call(x - eps)) / 2
    torch.testing.assert_close(tangent, difference, rtol=1e-4, atol=1e-14)


def test_packed_sequences() -> None:
    """Packing itself has no batching rule in PyTorch: what is vmapped is the packed data."""
    _, layer = twins("lstm", 2, 3, backend="cpu", bidirectional=True, dtype=torch.float64)
    xs = torch.randn(4, 8, 2, dtype=torch.float64)

    def call(data: Tensor) -> Tensor:
        output: Tensor = layer(PackedSequence(data, torch.tensor([2, 2, 2, 1, 1])))[0].data
        return output

    expected = torch.stack([call(x) for x in xs])
    torch.testing.assert_close(vmap(call)(xs), expected, rtol=1e-11, atol=1e-12)
    found = vmap(grad(lambda x: call(x).square().sum()))(xs)
    inputs = xs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(call(x).square().sum() for x in inputs), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_ensemble_of_modules() -> None:
    """As in PyTorch's tutorial: parameters of several models, stacked."""
    models = [fused_rnn.FusedGRU(2, 3) for _ in range(3)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    x = torch.randn(4, 2, 2)
    call = lambda p, b: functional_call(models[0], (p, b), (x,))[0]  # noqa: E731
    expected = torch.stack([m(x)[0] for m in models])
    torch.testing.assert_close(vmap(call)(parameters, buffers), expected)


def test_the_engine_runs_first_order_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither grad nor a vmap that shares the parameters goes through the eager loop."""

    def fail(*args: Any) -> None:
        raise AssertionError("the eager loop ran")

    monkeypatch.setattr(reference, "run", fail)
    case = Case(fused_rnn.FusedGRU(2, 3, bidirectional=True))
    for name in ("grad", "vmap", "vmap of vmap", "vmap, autograd outside", "grad of vmap"):
        TRANSFORMS[name](case)
    with pytest.raises(AssertionError, match="the eager loop ran"):
        TRANSFORMS["ensemble"](case)


def test_forward_mode_without_torch_func() -> None:
    layer = fused_rnn.FusedGRU(2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    call = lambda x: layer(x)[0]  # noqa: E731
    expected = jvp(call, (x,), (x.cos(),))[1]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, x.cos())))
        torch.testing.assert_close(dual.tangent, expected)

    # A tangent may also enter in backward alone: the derivative of a gradient.
    inputs = x.clone().requires_grad_()
    output = call(inputs)
    with forward_ad.dual_level():
        dout = forward_ad.make_dual(torch.ones_like(output), output.detach())
        (found,) = torch.autograd.grad(output, inputs, dout)
        tangent = forward_ad.unpack_dual(found).tangent
    (expected,) = torch.autograd.grad(call(inputs), inputs, output.detach())
    torch.testing.assert_close(tangent, expected)
    assert not autograd.forward_mode()

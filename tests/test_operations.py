"""Every operation of a step: derived for the CPU and for the kernels, against the eager loop."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from derived_helpers import assert_equal
from helpers import assert_close
from torch import Tensor

from fused_rnn import FusedRecurrent, cell, show
from fused_rnn.derive.derivation import derivation

# Of two gates and the state, all of which may be negative; each of a size that keeps h small.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add": lambda a, b, h: torch.add(a, b, alpha=0.5) + h / 2,
    "sub": lambda a, b, h: torch.sub(a, b, alpha=2) - h / 2,
    "rsub": lambda a, b, h: 1 - a - torch.rsub(b, h, alpha=0.3),
    "mul": lambda a, b, h: a * b * -1 + h * 0.5,
    "div": lambda a, b, h: a / (2 + b * b) + h / 3,
    "reciprocal": lambda a, b, h: torch.reciprocal(1 + a * a) + 1 / (1.5 + h),
    "neg": lambda a, b, h: torch.neg(a) - +b - h / 2,
    "abs": lambda a, b, h: a.abs() + abs(h) / 2,
    "sign": lambda a, b, h: a * torch.sign(b) + torch.sgn(h) * b,
    "floor": lambda a, b, h: torch.floor(3 * a) / 4 + b * h,
    "lerp": lambda a, b, h: torch.lerp(a, h, torch.sigmoid(b)) + torch.lerp(a, h, 0.3),
    "addcmul": lambda a, b, h: torch.addcmul(a, b, h, value=0.5),
    "addcdiv": lambda a, b, h: torch.addcdiv(a, h, 2 + b * b, value=-0.5),
    "square": lambda a, b, h: a.square() / 4 + b**2 / 4 + h**3 / 4,
    "sqrt": lambda a, b, h: torch.sqrt(1 + a * a) - torch.rsqrt(1 + b * b) + h / 2,
    "pow": lambda a, b, h: (1 + a * a) ** -1.5 + (1 + b * b) ** 0.3 + (1 + h * h) ** -2 / 2,
    "pow of tensors": lambda a, b, h: (1 + a * a) ** torch.tanh(b) / 2 + 2 ** torch.tanh(h) / 4,
    "exp": lambda a, b, h: torch.exp(-a * a) + torch.expm1(h / 4) + torch.expm1(b / 1e5),
    "log": lambda a, b, h: torch.log(1 + a * a) + torch.log1p(b * b) + torch.log1p(h * h / 1e5),
    "sin": lambda a, b, h: torch.sin(3 * a) + torch.cos(b) * h / 2 + torch.erf(a),
    "elu": lambda a, b, h: F.elu(a, 0.7) + F.selu(b) / 2 + h / 2,
    "gelu": lambda a, b, h: F.gelu(a) + F.gelu(b, approximate="tanh") + F.gelu(h) / 2,
    "hardtanh": lambda a, b, h: F.hardtanh(2 * a) + F.relu6(b) + h / 2,
    "hardsigmoid": lambda a, b, h: F.hardsigmoid(a) + F.hardswish(b) + F.hardsigmoid(h) / 2,
    "leaky": lambda a, b, h: F.leaky_relu(a, 0.1) + F.relu(b) + torch.relu(h) / 2,
    "logsigmoid": lambda a, b, h: F.logsigmoid(a) / 2 + F.softplus(b) / 2 + h / 2,
    "mish": lambda a, b, h: F.mish(a) + F.silu(b) + F.mish(h) / 2,
    "softsign": lambda a, b, h: F.softsign(a) + F.tanhshrink(b) + F.softsign(h) / 2,
    "threshold": lambda a, b, h: F.threshold(a, 0.1, 0.2) + b * h / 2,
    "maximum": lambda a, b, h: torch.maximum(a, b) + torch.minimum(b, h) / 2,
    "clamp": lambda a, b, h: a.clamp(-0.5, 0.4) + b.clamp(min=0.1) + h.clamp(max=0.2) / 2,
    "clamp by tensors": lambda a, b, h: torch.clamp(a, -b.abs(), b.abs()) + torch.clamp_min(h, 0.1),
    "where": lambda a, b, h: torch.where(a > b, a, h) + torch.where(h <= 0, 0.5, b),
    "masked_fill": lambda a, b, h: a.masked_fill(b < 0, 0.3) + h.masked_fill(h >= 0.1, 0.0) / 2,
    "logic": lambda a, b, h: torch.where(
        (a > 0) & ~(b > 0) | torch.logical_and(h == 0, h != 1), a, b * h
    ),
    "conditions": lambda a, b, h: (a > 0) * b + (h > 0).to(h.dtype) - (b > 0).double().to(a),
    "constants": lambda a, b, h: (
        torch.zeros_like(a) + torch.ones_like(b) / 2 + a * torch.full_like(h, 0.3) + b.new_ones(())
    ),
    "layer_norm": lambda a, b, h: (
        F.layer_norm(a + h, a.shape[-1:]) / 2 + F.layer_norm(b, b.shape[-1:], eps=0.1) / 4
    ),
    "views": lambda a, b, h: (
        a.view_as(b).clone() + b.contiguous().reshape(b.shape) + h.detach() / 2
    ),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def make(name: str) -> Any:
    @cell(gates="ab", states="h")
    def step(gates: Any, state: Any) -> Tensor:
        return OPERATIONS[name](gates.a, gates.b, state.h)

    torch.manual_seed(1)
    return FusedRecurrent(step, 3, 4, dtype=torch.float64)


def results(layer: Any, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output, final = layer(x)
    wanted = [x, *layer.parameters()]
    generator = torch.Generator().manual_seed(2)
    loss = (
        output.double() * torch.randn(output.shape, generator=generator).to(output.device)
    ).sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [t.detach().cpu() for t in (output, final, *grads)]


@every_operation
def test_on_the_cpu(name: str) -> None:
    layer, x = make(name), torch.randn(4, 5, 3).double()
    if name == "hardsigmoid":  # of whose derivative, 1/6, PyTorch itself has fp32's digits alone
        layer, x = layer.float(), x.float()
    found = []
    for backend in ("cpu", "eager"):
        layer.backend = backend
        found.append(results(layer, x))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, name)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
@every_operation
def test_in_the_kernels(name: str, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.engines.triton.support.rnn_precision", lambda: "ieee")
    layer = make(name).float()
    x = torch.randn(3, 2, 3)
    layer.backend = "eager"
    expected = results(layer.double(), x.double())
    layer.backend = "triton"
    found = results(layer.to(triton_device, torch.float32), x.to(triton_device))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, name, growth=8)
    assert "_step(" in show(layer.cell)


def test_numbers_beyond_all_bounds() -> None:
    @cell(gates="a", states="hc", initial={"c": 1.0})
    def beyond(gates: Any, state: Any) -> tuple[Tensor, Tensor]:
        endless = torch.full_like(gates.a, math.inf)
        bounded = torch.minimum(gates.a, 1 + endless) + torch.sin(1 / (1 + endless))
        ever = torch.where(endless > 0, bounded, state.c) + (endless < 1).to(bounded.dtype)
        return torch.tanh(ever), torch.floor(state.c / state.c)

    assert not derivation(beyond).rests_at_zero  # 0 / 0
    assert_equal(beyond)

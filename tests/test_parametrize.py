"""Weights that are computed, shared, frozen or replaced: nothing is cached past a change."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from helpers import every_backend, every_layer, states, tensors, twins
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fused_rnn
from fused_rnn import FusedGRU, FusedLSTM
from fused_rnn.engines.dispatch import Backend

WEIGHTS = ["weight_ih_l0", "weight_hh_l0"]


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the layer's own parameters."""
    parameters = dict(layer.named_parameters())
    loss = tensors(layer(x))[0].square().sum()
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


class Drop(nn.Module):
    """Dropout of weights, as in AWD-LSTM."""

    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.dropout(weight, 0.5, training=True)


class LoRA(nn.Module):
    """A frozen weight with a trainable update of low rank."""

    def __init__(self, rows: int, columns: int, rank: int = 2) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, columns, dtype=torch.float64) / 4)
        self.up = nn.Parameter(torch.randn(rows, rank, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach() + self.up @ self.down


def add_lora(layer: nn.Module) -> None:
    for name in WEIGHTS:
        parametrize.register_parametrization(layer, name, LoRA(*getattr(layer, name).shape))
        layer.parametrizations[name].original.requires_grad_(False)


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda layer: [weight_norm(layer, name) for name in WEIGHTS],
    "spectral_norm": lambda layer: [spectral_norm(layer, name) for name in WEIGHTS],
    "weight drop": lambda layer: parametrize.register_parametrization(layer, WEIGHTS[1], Drop()),
    "lora": add_lora,
}


@every_layer
@every_backend
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations(kind: str, backend: Backend, name: str) -> None:
    """Against torch.nn's layer with the weights that the parametrization comes to."""
    plain, fused = twins(kind, 3, 5, backend=backend, dtype=torch.float64)
    PARAMETRIZATIONS[name](fused)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for step in range(3):
        source = copy.deepcopy(fused)  # its random numbers and power iterations are the same
        torch.manual_seed(step)
        found = tensors(fused(x))
        torch.manual_seed(step)
        weights = {n: getattr(source, n) for n, _ in plain.named_parameters()}
        expected = tensors(functional_call(plain, weights, (x,)))
        mine = [p for p in fused.parameters() if p.requires_grad]
        theirs = [p for p in source.parameters() if p.requires_grad]
        assert len(mine) > 0
        found += torch.autograd.grad(found[0].square().sum(), mine)
        expected += torch.autograd.grad(expected[0].square().sum(), theirs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            for p, g in zip(mine, expected[-len(mine) :], strict=True):
                p -= 1e-3 * g


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_parametrizations_of_the_kernels(kind: str, triton_device: str) -> None:
    plain, fused = twins(kind, 3, 5, backend="triton")
    fused.to(triton_device)
    weight_norm(fused, "weight_hh_l0")
    x = torch.randn(3, 2, 3)
    with torch.no_grad():
        fused.parametrizations.weight_hh_l0.original0.mul_(0.5)
        weights = {"weight_hh_l0": fused.weight_hh_l0.cpu()}
    found = tensors(fused(x.to(triton_device)))
    for a, b in zip(found, tensors(functional_call(plain, weights, (x,))), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
    found[0].sum().backward()
    assert fused.parametrizations.weight_hh_l0.original0.grad is not None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_strided_parameters_of_the_kernels(
    kind: str, recompute: bool, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of a larger tensor, as of a network that computes weights."""
    monkeypatch.setattr("fused_rnn.engines.triton.support.rnn_precision", lambda: "ieee")
    plain, fused = twins(kind, 3, 5, backend="triton", recompute=recompute)
    fused.to(triton_device)
    for name, parameter in list(fused.named_parameters()):
        wide = torch.stack([parameter.detach(), torch.full_like(parameter, torch.nan)], -1)
        setattr(fused, name, nn.Parameter(wide[..., 0]))
    x = torch.randn(3, 2, 3)
    found, expected = gradients(fused, x.to(triton_device)), gradients(plain, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-4, atol=1e-5)


def test_each_weight_is_computed_once_per_call() -> None:
    class Count(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            Count.calls += 1
            return weight

    layer = FusedLSTM(3, 5)
    for name in WEIGHTS:
        parametrize.register_parametrization(layer, name, Count())
    Count.calls = 0
    layer(torch.randn(4, 2, 3))
    assert Count.calls == 2


def test_removing_a_parametrization() -> None:
    layer, x = FusedGRU(3, 5), torch.randn(4, 2, 3)
    weight_norm(layer, "weight_hh_l0")
    expected = layer(x)[0]
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is FusedGRU
    torch.testing.assert_close(layer(x)[0], expected)


@every_layer
def test_tied_layers(kind: str) -> None:
    """One parameter in two layers: the gradient is the sum of both."""
    plain, fused = twins(kind, 1 if kind == "projected" else 5, 5, 2, dtype=torch.float64)
    for layer in (plain, fused):
        for name in ("weight_ih", "weight_hh"):
            setattr(layer, f"{name}_l1", getattr(layer, f"{name}_l0"))
    x = torch.randn(4, 2, plain.input_size, dtype=torch.float64)
    found, expected = gradients(fused, x), gradients(plain, x)
    assert len(found) == len(expected) < 8 + 2 * (kind == "projected")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_tied_modules() -> None:
    first, second = FusedGRU(5, 5), FusedGRU(5, 5)
    for name, p in first.named_parameters():
        setattr(second, name, p)
    x = torch.randn(4, 2, 5)
    second(first(x)[0])[0].sum().backward()
    again = copy.deepcopy(first)
    again.zero_grad()
    again(again(x)[0])[0].sum().backward()
    for p, q in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@every_layer
@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
def test_frozen_parameters(kind: str, frozen: str) -> None:
    plain, fused = twins(kind, 3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for layer in (plain, fused):
        getattr(layer, frozen).requires_grad_(False)
        layer(x)[0].square().sum().backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        if name == frozen:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_replaced_weights_need_not_be_parameters(kind: str) -> None:
    """functional_call with any tensors: strided, computed, of another layer's memory."""
    plain, fused = twins(kind, 3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    block = torch.randn(2 * plain.weight_hh_l0.shape[0], 10, dtype=torch.float64).requires_grad_()
    weights = {"weight_hh_l0": block[::2, ::2]}
    results = []
    for layer in (plain, fused):
        output = tensors(functional_call(layer, weights, (x,)))[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), block)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@every_layer
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_a_weight_of_another_size_is_refused(kind: str, name: str) -> None:
    _, layer = twins(kind, 3, 5)
    size = tuple(getattr(layer, name).shape)
    setattr(layer, name, nn.Parameter(torch.zeros(*size[:-1], size[-1] + 1)))
    message = f"Expected {name} of size {size}, got {(*size[:-1], size[-1] + 1)}"
    with pytest.raises(RuntimeError) as error:
        layer(torch.randn(4, 2, 3))
    assert str(error.value) == message


@every_layer
def test_no_warning_of_contiguous_weights(kind: str) -> None:
    """torch.nn: "RNN module weights are not part of single contiguous chunk of memory"."""
    _, layer = twins(kind, 3, 5, num_layers=2, bidirectional=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = copy.deepcopy(layer).double().float()
        moved.load_state_dict(layer.state_dict(), assign=True)
        moved = torch.nn.Sequential(moved).requires_grad_()[0]
        x, hx = torch.randn(4, 2, 3), states(layer, 2)
        found = tensors(moved(x, hx if len(hx) == 2 else hx[0]))
        found[0].sum().backward()
    expected = tensors(layer(x, hx if len(hx) == 2 else hx[0]))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert fused_rnn.explain(moved, x) == fused_rnn.explain(layer, x)

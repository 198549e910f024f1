"""Gradients of gradients on every engine, against torch.nn in fp64, and what they are used for.

gradcheck and gradgradcheck themselves, which need fp64, are in test_autograd.py.
"""

from typing import Any

import pytest
import torch
from helpers import assert_same, every_layer, packer, sequences, twins
from torch import Tensor, nn
from torch.func import functional_call


def penalty(layer: nn.Module, xs: list[Tensor], packed: bool) -> dict[str, Tensor]:
    """WGAN-GP's penalty, as a function of a gradient, and its own gradients."""
    device = next(layer.parameters()).device
    inputs = [x.to(device).detach().requires_grad_() for x in xs]
    make = packer(False) if packed else lambda xs: xs[0]
    output, final = layer(make(list(inputs)))
    critic = (output.data if packed else output).square().sum()
    critic = critic + sum(s.sin().sum() for s in (final if isinstance(final, tuple) else (final,)))
    first = torch.autograd.grad(critic, inputs, create_graph=True)
    loss = torch.stack([(g.norm(dim=-1) - 1).square().sum() for g in first]).sum()
    names = [name for name, _ in layer.named_parameters()]
    # Biases of a ReLU layer do not reach the penalty.
    wanted = [*inputs, *layer.parameters()]
    second = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    labels = [f"x{i}" for i in range(len(inputs))]
    results = {f"first {n}": g for n, g in zip(labels, first, strict=True)}
    results |= {f"second {n}": g for n, g in zip(labels + names, second, strict=True)}
    return {name: value.detach().cpu() for name, value in results.items()} | {"loss": loss.cpu()}


def compare(kind: str, device: str, dtype: torch.dtype, packed: bool, **options: Any) -> None:
    exact, layer = twins(kind, 3, 5, bidirectional=True, dtype=dtype, **options)
    xs = sequences([4, 2, 3], 3, dtype) if packed else [torch.randn(4, 2, 3, dtype=dtype)]
    found = penalty(layer.to(device), xs, packed)
    expected = penalty(exact.double(), [x.double() for x in xs], packed)
    # A second derivative goes three times through the layer, and on a GPU, whose exp and tanh are
    # good to two units in the last place and not to one, the errors of each show.
    assert_same(found, expected, dtype, growth=3**0.5 if device == "cuda" else 1.0)


both = pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])


@every_layer
@both
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"backend": "eager"}], ids=str)
def test_penalty_on_the_cpu(kind: str, packed: bool, options: dict[str, Any]) -> None:
    compare(kind, "cpu", torch.float64, packed, **options)


def test_penalty_through_onednn() -> None:
    compare("lstm", "cpu", torch.float32, packed=False, backend="native")


@pytest.mark.parametrize("kind", ["tanh", "relu", "gru", "lstm"])
@pytest.mark.parametrize("recompute", [False, True], ids=["save", "recompute"])
def test_penalty_of_the_kernels(
    kind: str, recompute: bool, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_rnn.engines.triton.support.rnn_precision", lambda: "ieee")
    packed = recompute
    compare(kind, triton_device, torch.float32, packed, backend="triton", recompute=recompute)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_training_a_critic(kind: str) -> None:
    """Some steps of a WGAN-GP critic; every one builds on the one before."""
    plain, fused = twins(kind, 3, 5, dtype=torch.float64)
    real, fake = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    losses = []
    for layer in (plain, fused):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        history = []
        for _ in range(5):
            mix = torch.rand(1, 4, 1, dtype=torch.float64)
            between = (mix * real + (1 - mix) * fake).requires_grad_()
            score = layer(between)[0][-1].sum()
            (slope,) = torch.autograd.grad(score, between, create_graph=True)
            smooth = (slope.square().sum((0, 2)).sqrt() - 1).square().mean()
            loss = layer(fake)[0][-1].mean() - layer(real)[0][-1].mean() + 10 * smooth
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[1][-1] < losses[1][0]


@every_layer
def test_gradient_through_a_step_of_training(kind: str) -> None:
    """MAML: the outer gradient passes through the update that the inner one made."""
    plain, fused = twins(kind, 3, 5, dtype=torch.float64)
    inner, outer = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    results = []
    for layer in (plain, fused):
        parameters = dict(layer.named_parameters())
        loss = functional_call(layer, parameters, (inner,))[0].square().sum()
        slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        updated = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), slopes, strict=True)}
        loss = functional_call(layer, updated, (outer,))[0].square().sum()
        results.append(torch.autograd.grad(loss, list(parameters.values())))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_third_order() -> None:
    plain, fused = twins("gru", 2, 3, dtype=torch.float64)
    x = torch.randn(3, 1, 2, dtype=torch.float64)
    results = []
    for layer in (plain, fused):
        inputs = x.clone().requires_grad_()
        value = layer(inputs)[0].square().sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, inputs, create_graph=True)
            value = slope.square().sum()
        results.append(slope.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)


def test_saved_tensors_may_lie_elsewhere() -> None:
    """Hooks that move what is saved, as of save_on_cpu, also around a double backward."""
    _, layer = twins("lstm", 3, 5, dtype=torch.float64)
    x = [torch.randn(4, 2, 3, dtype=torch.float64)]
    expected = penalty(layer, x, packed=False)
    with torch.autograd.graph.save_on_cpu():
        assert_same(penalty(layer, x, packed=False), expected)


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_eval_mode_on_the_kernels(kind: str, triton_device: str) -> None:
    """cuDNN refuses: "backward can only be called in training mode"."""
    plain, layer = twins(kind, 3, 5, backend="triton")
    x = torch.randn(3, 2, 3)
    slopes = []
    for module, device in ((plain.eval(), "cpu"), (layer.to(triton_device).eval(), triton_device)):
        inputs = x.to(device).requires_grad_()
        (slope,) = torch.autograd.grad(module(inputs)[0].square().sum(), inputs)
        slopes.append(slope.cpu())
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-5)

"""Gradients: exact, differentiable again, and paid for only where they are asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    assert_same,
    every_backend,
    every_layer,
    packer,
    run,
    sequences,
    states,
    tensors,
    twins,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn.engines.cpu import engine as cpu
from fused_rnn.engines.cpu import sweep as cpu_sweep
from fused_rnn.engines.dispatch import Backend
from fused_rnn.ops import autograd
from fused_rnn.spec.layer import Needs, WeightNeeds


def function_of_everything(
    layer: nn.Module, xs: list[Tensor], hx: tuple[Tensor, ...], make: Callable[[Any], Any]
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The layer as a function of its inputs, states and parameters, for gradcheck."""
    names = [n for n, _ in layer.named_parameters()]
    values = [p.detach().clone() for p in layer.parameters()]
    arguments = [t.detach().clone().requires_grad_() for t in (*xs, *hx, *values)]

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        inputs = list(arguments[: len(xs)])
        initial = arguments[len(xs) : len(xs) + len(hx)]
        parameters = dict(zip(names, arguments[len(xs) + len(hx) :], strict=True))
        state = tuple(initial) if len(initial) == 2 else initial[0]
        return tuple(tensors(torch.func.functional_call(layer, parameters, (make(inputs), state))))

    return call, tuple(arguments)


@every_layer
@every_backend
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.filterwarnings("ignore:Input #.*requires gradient and is not a double precision")
def test_gradcheck_and_gradgradcheck(
    kind: str, backend: Backend, packed: bool, bidirectional: bool
) -> None:
    _, layer = twins(kind, 2, 3, backend=backend, bidirectional=bidirectional, dtype=torch.float64)
    if packed:
        xs, make, batch = sequences([3, 1], 2, torch.float64), packer(True), 2
    else:
        xs, batch = [torch.randn(3, 2, 2, dtype=torch.float64)], 2
        make = lambda xs: xs[0]  # noqa: E731
    call, arguments = function_of_everything(layer, xs, states(layer, batch), make)
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


@every_layer
def test_second_order_gradients_equal_torch(kind: str) -> None:
    """A gradient penalty, as in WGAN-GP: through the hand-written backward and past it."""
    plain, fused = twins(kind, 3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    results = []
    for layer in (plain, fused):
        inputs = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(inputs)[0].square().sum(), inputs, create_graph=True)
        penalty = (first.norm(dim=-1) - 1).square().sum()
        wanted = [inputs, *layer.parameters()]
        results.append(torch.autograd.grad(penalty, wanted, allow_unused=True))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(
            torch.zeros(1) if found is None else found,
            torch.zeros(1) if expected is None else expected,
            rtol=1e-9,
            atol=1e-11,
        )


@every_layer
def test_tied_weights(kind: str) -> None:
    """One parameter in two directions gets the sum of both gradients, at both orders."""
    _, layer = twins(kind, 3, 4, bidirectional=True, dtype=torch.float64)
    layer.weight_ih_l0_reverse = layer.weight_ih_l0
    x = torch.randn(3, 2, 3, dtype=torch.float64)

    def call(weight: Tensor) -> Tensor:
        tied = {"weight_ih_l0": weight, "weight_ih_l0_reverse": weight}
        output: Tensor = torch.func.functional_call(layer, tied, (x,))[0]
        return output

    weight = layer.weight_ih_l0.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (weight,), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (weight,), fast_mode=True)


@every_layer
def test_repeated_backward_and_accumulation(kind: str) -> None:
    _, layer = twins(kind, 3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    loss = layer(x)[0].square().sum()
    loss.backward(retain_graph=True)
    assert x.grad is not None
    first = [p.grad.clone() for p in (x, *layer.parameters())]
    loss.backward()
    for p, once in zip((x, *layer.parameters()), first, strict=True):
        assert torch.equal(p.grad, once + once)


@every_layer
@every_backend
def test_backward_in_eval_mode_and_from_states_alone(kind: str, backend: Backend) -> None:
    plain, fused = twins(kind, 3, 5, backend=backend)
    x = torch.randn(4, 2, 3)
    for select in (lambda ts: ts[0], lambda ts: ts[1], lambda ts: ts[-1]):
        grads = []
        for layer in (plain.eval(), fused.eval()):
            inputs = x.clone().requires_grad_()
            loss = select(tensors(layer(inputs))).square().sum()
            grads.append(torch.autograd.grad(loss, [inputs, *layer.parameters()]))
        for found, expected in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@every_layer
def test_strided_and_expanded_inputs_and_gradients(kind: str) -> None:
    plain, fused = twins(kind, 4, 5, bidirectional=True)
    inputs = {
        "transposed": torch.randn(4, 3, 6).permute(2, 1, 0),
        "every other": torch.randn(12, 6, 8)[::2, ::2, ::2],
        "expanded": torch.randn(6, 1, 4).expand(6, 3, 4),
    }
    for x in inputs.values():
        copies = [x.clone().requires_grad_() for _ in range(2)]
        strided = x.detach().requires_grad_()
        outputs = [plain(copies[0])[0], fused(copies[1])[0], fused(strided)[0]]
        width = outputs[0].shape[-1]
        for dout in (
            torch.randn(width, 3, 6).permute(2, 1, 0),
            torch.randn(1, 1, width).expand(6, 3, width),
        ):
            expected, found, found_strided = (
                torch.autograd.grad(o, i, dout, retain_graph=True)[0]
                for o, i in zip(outputs, [copies[0], copies[1], strided], strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found_strided, expected, rtol=1e-4, atol=1e-5)


@every_layer
def test_strided_states(kind: str) -> None:
    plain, fused = twins(kind, 3, 5, num_layers=2)
    x = [torch.randn(4, 3, 3)]
    hx = tuple(torch.randn(s.shape[2], s.shape[1], 2).transpose(0, 2) for s in states(plain, 3))
    results = [tensors(layer(x[0], hx if len(hx) == 2 else hx[0])) for layer in (plain, fused)]
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_layer
def test_strided_weights(kind: str) -> None:
    plain, fused = twins(kind, 3, 5)
    strided = {
        name: p.detach().t().contiguous().t()
        for name, p in plain.named_parameters()
        if p.dim() == 2
    }
    assert not strided["weight_hh_l0"].is_contiguous() or kind == "projected"
    x = torch.randn(4, 3, 3)
    found = torch.func.functional_call(fused, strided, (x,))
    torch.testing.assert_close(found, plain(x), rtol=1e-5, atol=1e-6)


@every_layer
@every_backend
def test_inputs_and_saved_tensors_are_never_modified(kind: str, backend: Backend) -> None:
    _, layer = twins(kind, 3, 5, backend=backend, bidirectional=True)
    x, hx = torch.randn(4, 2, 3, requires_grad=True), states(layer, 2)
    output, *rest = tensors(layer(x, hx if len(hx) == 2 else hx[0]))
    dout = torch.randn_like(output)
    kept = [t.detach().clone() for t in (x, *hx, *layer.parameters(), output, dout, *rest)]
    output.backward(dout)
    for now, before in zip((x, *hx, *layer.parameters(), output, dout, *rest), kept, strict=True):
        assert torch.equal(now, before)


@every_layer
def test_frozen_parameters_cost_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = twins(kind, 3, 5, dtype=torch.float64, backend="cpu")
    wanted: list[Needs] = []
    original = cpu.backward

    def spy(*args: Any) -> Any:
        wanted.append(args[-1])
        return original(*args)

    monkeypatch.setattr(cpu, "backward", spy)
    layer.requires_grad_(False)
    layer.bias_hh_l0.requires_grad_(True)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    layer(x)[0].sum().backward()
    assert layer.bias_hh_l0.grad is not None
    one = WeightNeeds(*[name == "b_hh" for name in WeightNeeds._fields])
    assert wanted == [Needs(False, False, False, (one,))]
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "bias_hh_l0")


@every_layer
def test_nothing_is_saved_without_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the autograd function ran")

    monkeypatch.setattr(autograd.LayerFunction, "apply", fail)
    _, layer = twins(kind, 3, 5)
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        without = layer(x)[0]
    assert not without.requires_grad
    layer.requires_grad_(False)
    assert not layer(x)[0].requires_grad


@every_layer
def test_deterministic(kind: str) -> None:
    _, layer = twins(kind, 7, 33, bidirectional=True)
    xs, hx = [torch.randn(9, 5, 7)], states(layer, 5)
    first = run(layer, xs, hx)
    for _ in range(49):
        again = run(layer, xs, hx)
        assert all(torch.equal(first[name], again[name]) for name in first)


@every_layer
@every_backend
def test_one_call_equals_a_call_per_step(kind: str, backend: Backend) -> None:
    _, layer = twins(kind, 3, 5, num_layers=2, backend=backend, dtype=torch.float64)
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    whole, final = layer(x)
    state, outputs = None, []
    for t in range(7):
        output, state = layer(x[t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(kind: str) -> None:
    """All outputs in the autocast type, gradients in the parameters' own."""
    plain, fused = twins(kind, 8, 16)
    x = torch.randn(6, 3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tensors(fused(x))
    assert all(t.dtype == torch.bfloat16 for t in found)
    expected = tensors(plain(x))
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).abs().max() < 2e-2  # bf16 keeps 8 bits of values below 1
    found[0].float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())


def test_long_sequence() -> None:
    """cuDNN refuses more than 65,535 steps."""
    plain, fused = twins("gru", 1, 2)
    x = torch.randn(70_000, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_double_backward_uses_public_layers() -> None:
    """The layers are plain modules: a Hessian by torch.autograd.functional works, too."""
    layer = fused_rnn.FusedGRU(1, 2, dtype=torch.float64)
    x = torch.randn(3, 1, 1, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: layer(x)[0].square().sum(), x)
    flat = hessian.reshape(3, 3)
    torch.testing.assert_close(flat, flat.T)
    assert flat.abs().sum() > 0


def checkpointed_equals_itself(layer: nn.Module, xs: list[Tensor], make: Any) -> None:
    """Outputs and gradients with and without activation checkpointing, to the last bit."""
    results = []
    for keep in (True, False):
        torch.manual_seed(1)  # of dropout between layers, which checkpointing repeats
        variables = [x.detach().clone().requires_grad_() for x in xs]
        call = lambda *xs: tuple(tensors(layer(make(list(xs)))))  # noqa: E731
        outputs = call(*variables) if keep else checkpoint(call, *variables, use_reentrant=False)
        loss = torch.stack([o.square().sum() for o in outputs]).sum()
        grads = torch.autograd.grad(loss, [*variables, *layer.parameters()])
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


CHECKPOINTED = ["batched", "packed", "dropout", "step"]


def checkpoint_case(kind: str, case: str, dtype: torch.dtype, **options: Any) -> Any:
    dropout = {"dropout": 0.5} if case == "dropout" else {}
    _, layer = twins(kind, 3, 5, 2, dtype=dtype, **dropout, **options)
    if case == "packed":
        return layer, sequences([2, 4, 1], 3, dtype), packer(False)
    steps = 1 if case == "step" else 4
    return layer, [torch.randn(steps, 2, 3, dtype=dtype)], lambda xs: xs[0]


@pytest.mark.parametrize("case", CHECKPOINTED)
@pytest.mark.parametrize("recompute", [False, True])
@every_layer
@pytest.mark.parametrize("backend", ["auto", "cpu", "eager"])
def test_activation_checkpointing(kind: str, backend: Backend, recompute: bool, case: str) -> None:
    """What is saved may be asked for once only."""
    options = {"backend": backend, "recompute": recompute}
    checkpointed_equals_itself(*checkpoint_case(kind, case, torch.float64, **options))


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_activation_checkpointing_of_onednn(case: str) -> None:
    checkpointed_equals_itself(*checkpoint_case("lstm", case, torch.float32, backend="native"))


@pytest.mark.parametrize(
    ("case", "recompute"),
    [("packed", False), ("packed", True), ("dropout", False), ("batched", True), ("step", True)],
)
@pytest.mark.parametrize("kind", ["tanh", "relu", "gru", "lstm"])
def test_activation_checkpointing_of_the_kernels(
    kind: str, recompute: bool, case: str, triton_device: str
) -> None:
    options = {"backend": "triton", "recompute": recompute}
    layer, xs, make = checkpoint_case(kind, case, torch.float32, **options)
    xs = [x.to(triton_device) for x in xs]
    checkpointed_equals_itself(layer.to(triton_device), xs, make)


@every_layer
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_spans_end_anywhere(
    kind: str, packed: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's sweeps cut time into spans, here of a few rows, in both directions."""
    options = {"bidirectional": True, "backend": "cpu", "recompute": recompute}
    plain, fused = twins(kind, 3, 5, dtype=torch.float64, **options)
    xs = [torch.randn(9, 3, 3, dtype=torch.float64)]
    if packed:
        xs = sequences([9, 2, 5, 5], 3, torch.float64)
    make = packer(False) if packed else (lambda xs: xs[0])
    hx = states(plain, 4 if packed else 3)
    expected = run(plain, xs, hx, make)
    for least in (1, 4, 7):
        monkeypatch.setattr(cpu_sweep, "SPAN", 0)
        monkeypatch.setattr(cpu_sweep, "LEAST", least)
        assert_same(run(fused, xs, hx, make), expected)

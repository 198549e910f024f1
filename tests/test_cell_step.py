"""One step at a time: fast without gradients, and the state carried to the last bit."""

from typing import Any

import pytest
import torch
from helpers import LAYERS, every_layer, states, tensors, twins
from torch import Tensor, nn

import fused_rnn
from fused_rnn.engines import native, reference
from fused_rnn.engines.cpu import engine as cpu
from fused_rnn.engines.dispatch import Backend
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.layer import LayerInputs, LayerSpec

KINDS = ["tanh", "relu", "gru", "lstm"]


def chain(layer: nn.Module, x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Output and final states of calls one after the other, each with the states of the last."""
    state, outputs = None, []
    for piece in x.split(lengths):
        output, state = layer(piece, state)
        outputs.append(output)
    return tensors((torch.cat(outputs), state))


# ---- the step without gradients -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_step_runs_no_sweep(
    kind: str, bidirectional: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a sweep ran")

    options = {"bidirectional": bidirectional, "bias": bias, "batch_first": bias}
    plain, fused = twins(kind, 3, 5, num_layers=2, dtype=torch.float64, **options)
    x, hx = torch.randn(1, 1, 3, dtype=torch.float64), states(plain, 1)
    state = hx if len(hx) == 2 else hx[0]
    for module in (cpu, reference):
        monkeypatch.setattr(module, "forward", fail)
    with torch.no_grad():
        for argument in (None, state):
            for found, expected in zip(
                tensors(fused(x, argument)), tensors(plain(x, argument)), strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(AssertionError, match="a sweep ran"):
        twins(kind, 3, 5, backend="cpu", dtype=torch.float64)[1](x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_runs_no_sweep(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a sweep ran")

    plain, fused = twins(kind, 3, 5, dtype=torch.float64)
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    call = torch.compile(fused, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(cpu, "forward", fail)
    with torch.no_grad():
        for found, expected in zip(tensors(call(x)), tensors(plain(x)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_rollout(kind: str) -> None:
    """Any number of steps, as an agent takes them, equal one call to rounding."""
    plain, fused = twins(kind, 3, 5, num_layers=2)
    x = torch.randn(9, 4, 3)
    expected = tensors(plain(x))
    with torch.inference_mode():
        for found, value in zip(chain(fused, x, [1] * 9), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


@every_layer
@pytest.mark.parametrize("recorded", [False, True], ids=["no-grad", "grad"])
def test_results_share_no_memory(kind: str, recorded: bool) -> None:
    """Resetting the state of finished sequences in place leaves the output alone."""
    _, layer = twins(kind, 3, 5)
    with torch.set_grad_enabled(recorded):
        results = [t.detach() for t in tensors(layer(torch.randn(1, 4, 3)))]
    kept = [t.clone() for t in results]
    for state in results[1:]:
        state[:, 2] = 0
    assert torch.equal(results[0], kept[0])
    if len(results) == 3:
        kept[1][:, 2] = 0
        assert torch.equal(results[1], kept[1])


def test_explain_a_step() -> None:
    layer, x = fused_rnn.FusedGRU(3, 5), torch.zeros(1, 2, 3)

    def backend(layer: Any) -> str:
        return fused_rnn.explain(layer, x)[0].backend

    with torch.no_grad():
        assert backend(layer) == "native"
        assert backend(fused_rnn.FusedGRU(3, 5, backend="cpu")) == "cpu"
    assert backend(layer) == "native"
    layer.recompute = True
    assert backend(layer) == "cpu"
    layer.requires_grad_(False)
    assert backend(layer) == "native"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
def test_the_step_of_a_gpu(kind: str, directions: int) -> None:
    """What runs a single step there, on tensors of a CPU."""
    _, fused = twins(kind, 3, 5, bidirectional=directions == 2, dtype=torch.float64)
    x, hx = torch.randn(4, 3, dtype=torch.float64), states(fused, 4)
    weights = tuple(fused._weights()[0])
    inputs = LayerInputs(x, hx[0], hx[1] if len(hx) == 2 else None, weights)
    spec = LayerSpec(fused._cell, BatchLayout(1, 4), directions, 5)
    assert native.steps_at_once(spec, torch.device("cuda"), torch.float64)
    oracle = reference.run(spec, inputs)
    for found, expected in zip(native.step(spec, inputs), oracle, strict=True):
        assert (found is None) is (expected is None)
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
def test_training_a_step_runs_no_sweep(
    kind: str, bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of all inputs, and gradients of those, are torch.nn's."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a sweep ran")

    plain, fused = twins(kind, 3, 5, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True), states(plain, 4)
    for module in (cpu, reference):
        monkeypatch.setattr(module, "forward", fail)
    found = []
    for layer in (plain, fused):
        state = tuple(h.clone().requires_grad_() for h in hx)
        results = tensors(layer(x, state if len(hx) == 2 else state[0]))
        loss = sum(t.square().sum() for t in results)
        wanted = [x, *state, *layer.parameters()]
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wanted, allow_unused=True)
        found.append([*first, *(g for g in second if g is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_step_in_16_bits_is_as_accurate_as_a_sweep(kind: str, dtype: torch.dtype) -> None:
    _, layer = twins(kind, 16, 32, dtype=dtype)
    x = torch.randn(1, 4, 16, dtype=dtype)
    recorded = tensors(layer(x))
    with torch.no_grad():
        for found, expected in zip(tensors(layer(x)), recorded, strict=True):
            assert torch.equal(found, expected)


# ---- carrying the state -------------------------------------------------------------------------

LENGTHS = [[1] * 8, [1, 2, 5], [4, 4]]


def exact(layer: nn.Module, B: int, dtype: torch.dtype) -> Tensor:
    """Set weights and return an input [8, B, I] so that every x W^T + b is exact.

    BLAS may round a product of 8 steps and one of a single step differently. Sums of a few
    multiples of 1/8 it need not round at all, so that whatever differs comes from the state.
    """
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "_ih" in name or name.startswith("bias"):
                p.copy_((8 * p).round() / 8)
    return torch.randint(-2, 3, (8, B, layer.input_size)).to(dtype)


def assert_bitwise(layer: nn.Module, x: Tensor) -> None:
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            whole = tensors(layer(x))
            for lengths in LENGTHS:
                for found, expected in zip(chain(layer, x, lengths), whole, strict=True):
                    assert torch.equal(found, expected), lengths


@pytest.mark.parametrize("B", [1, 3, 16])
@pytest.mark.parametrize(
    ("kind", "backend"),
    [(kind, backend) for kind in LAYERS for backend in ("eager", "cpu")],
)
def test_the_state_is_carried_to_the_last_bit(kind: str, backend: Backend, B: int) -> None:
    """A long call, calls for its parts, and calls for single steps.

    Not in this list: torch.nn's own kernels, of which oneDNN's LSTM picks a product by T.
    """
    _, layer = twins(kind, 8, 24, backend=backend, dtype=torch.float64)
    assert_bitwise(layer, exact(layer, B, torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_carry_the_state_to_the_last_bit(kind: str, triton_device: str) -> None:
    _, layer = twins(kind, 3, 5, backend="triton")
    x = exact(layer, 2, torch.float32)[:5].to(triton_device)
    layer.to(triton_device)
    whole = tensors(layer(x))
    for lengths in ([1] * 5, [2, 3]):
        for found, expected in zip(chain(layer, x, lengths), whole, strict=True):
            assert torch.equal(found, expected), lengths


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_state_is_carried_to_rounding(kind: str, dtype: torch.dtype) -> None:
    """Any backend, any input: the products of the inputs are all that may round differently."""
    _, layer = twins(kind, 8, 24, num_layers=2, dtype=dtype)
    x = torch.randn(8, 3, 8, dtype=dtype)
    whole = tensors(layer(x))
    tolerance = 8 * torch.finfo(dtype).eps
    for lengths in LENGTHS:
        for found, expected in zip(chain(layer, x, lengths), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)

"""``explain`` names what runs: held against the engines that a call really enters."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import LAYERS, every_layer, packer, sequences
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import explain
from fused_rnn.cells import minimal_gated_unit
from fused_rnn.engines import native, reference
from fused_rnn.engines.cpu import engine as cpu
from fused_rnn.layers import whole_stack
from fused_rnn.tools.explain import Explanations

T, B, I, H = 16, 2, 3, 4


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has run since, a layer for an entry."""
    names: list[str] = []

    def watch(module: Any, attribute: str, name: str, whole: bool = False) -> None:
        original = getattr(module, attribute)

        def spy(*args: Any, **keywords: Any) -> Any:
            names.extend([name] * (args[0].num_layers if whole else 1))
            return original(*args, **keywords)

        monkeypatch.setattr(module, attribute, spy)

    watch(cpu, "forward", "sweeps")
    watch(native, "run", "native")
    watch(whole_stack, "call", "native", whole=True)
    watch(reference, "run", "loop")
    return names


def named(found: Any) -> Iterator[str]:
    """What an explanation says, in the words of :func:`ran`."""
    for one in found:
        if "nothing to run" in one.reason:
            continue
        yield {"cpu": "sweeps", "eager": "loop", "native": "native"}[one.backend]


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the error's type and text."""
    try:
        return function()
    except RuntimeError as error:
        return type(error), str(error)


def lengths(*values: int) -> dict[str, Tensor]:
    return {"lengths": torch.tensor(values)}


RESET = {"reset": torch.zeros(T, B, dtype=torch.bool).index_fill(0, torch.tensor([2, 9]), True)}
MASK = {"mask": torch.arange(T)[:, None] < torch.tensor([T, 2])}
LONG = PackedSequence(torch.zeros(T + 2, I), torch.tensor([2, 2] + [1] * (T - 2)))
PACKED = PackedSequence(torch.zeros(4, I), torch.tensor([2, 1, 1]))
PACKED_RESET = PackedSequence(torch.ones(4, dtype=torch.bool), torch.tensor([2, 1, 1]))
x = torch.zeros(T, B, I)
# name: (options of the layer, input, what else the call takes)
CALLS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "plain": ({}, x, {}),
    "short": ({}, x[:3], {}),
    "step": ({}, x[:1], {}),
    "step, recompute": ({"recompute": True}, x[:1], {}),
    "empty batch": ({}, x[:, :0], {}),
    "recompute": ({"recompute": True}, x, {}),
    "bidirectional": ({"bidirectional": True}, x, {}),
    "unbatched": ({}, x[:, 0], {}),
    "batch_first": ({"batch_first": True}, x.transpose(0, 1), {}),
    "packed": ({}, PACKED, {}),
    "packed, long": ({}, LONG, {}),
    "packed, all alike": ({}, PackedSequence(torch.zeros(4, I), torch.tensor([2, 2])), {}),
    "packed, reset": ({}, PACKED, {"reset": PACKED_RESET}),
    "fp64": ({"dtype": torch.float64}, x.double(), {}),
    "bf16": ({"dtype": torch.bfloat16}, x.bfloat16(), {}),
    "lengths": ({}, x, lengths(T, 1)),
    "short lengths": ({}, x, lengths(3, 1)),
    "lengths all alike": ({}, x, lengths(T, T)),
    "lengths of a step": ({}, x, lengths(1, 1)),
    "lengths of 0": ({}, x, lengths(0, 0)),
    "mask": ({}, x, MASK),
    "reset": ({}, x, RESET),
    "reset of a step": ({}, x[:1], {"reset": torch.tensor([[True, False]])}),
    "both": ({"learn_h0": True}, x, RESET | lengths(3, 2)),
    "zoneout": ({"zoneout": 0.5}, x, {}),
    "dropout": ({"recurrent_dropout": 0.5}, x, lengths(3, 1)),
    "clip": ({"clip_recurrent_grad": 1.0}, x, {}),
    "cells": ({}, x, {"return_cell_sequence": True}),
}


@every_layer
@pytest.mark.parametrize("backend", ["auto", "cpu", "native", "eager"])
@pytest.mark.parametrize("case", CALLS)
def test_it_names_what_runs(kind: str, backend: Any, case: str, ran: list[str]) -> None:
    options, input, call = CALLS[case]
    _, ours, extra = LAYERS[kind]
    if case == "cells" and ours is not fused_rnn.FusedLSTM:
        with pytest.raises(TypeError, match="return_cell_sequence"):
            explain(ours(I, H, **extra), input, **call)
        return
    layer = ours(I, H, 2, **extra, **options, backend=backend)
    frozen = ours(I, H, 2, **extra, **options, backend=backend).requires_grad_(False)
    half = ours(I, H, 2, **extra, **options, backend=backend)
    for name, parameter in half.named_parameters():
        parameter.requires_grad_("_l1" in name)
    for context in (nullcontext(), torch.no_grad()):
        for one in (layer, layer.eval(), frozen, half):
            ran.clear()
            with context:
                found = attempt(lambda one=one: explain(one, input, **call))  # type: ignore[misc]
                assert ran == []
                happened = attempt(lambda one=one: one(input, **call))  # type: ignore[misc]
            if isinstance(found, Explanations):
                assert list(named(found)) == ran
                assert [e.layer for e in found] == [0, 1]
            else:
                assert found == happened
            if backend in ("cpu", "native"):
                assert set(ran) <= {"sweeps" if backend == "cpu" else "native"}


@every_layer
@pytest.mark.parametrize("extra", ["zoneout", "recurrent_dropout", "clip_recurrent_grad"])
def test_a_forced_backend_that_cannot_run_raises(kind: str, extra: str) -> None:
    _, ours, more = LAYERS[kind]
    layer = ours(I, H, **more, **{extra: 0.5}, backend="cpu")
    text = r"backend='cpu' cannot run this layer: .* options .*; select backend='auto' or 'eager'"
    for call in (layer, lambda x: explain(layer, x)):
        with pytest.raises(RuntimeError, match=text):
            call(x)
    layer.backend = "auto"
    (found,) = explain(layer, x)
    assert found.backend == "eager"
    assert "options" in found.reason


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use, in jvp
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("extra", ["none", "lengths", "zoneout"])
def test_transforms(kind: str, extra: str, ran: list[str]) -> None:
    _, ours, _ = LAYERS[kind]
    layer = ours(I, H, zoneout=0.5 if extra == "zoneout" else 0.0).eval()
    call = lengths(T, 1) if extra == "lengths" else {}
    said: list[str] = []

    def loss(x: Tensor) -> Tensor:
        ran.clear()
        said[:] = named(explain(layer, x, **call))
        result: Tensor = layer(x, **call)[0].square().sum()
        assert said == ran[:1]
        return result

    torch.func.grad(loss)(x)
    torch.func.vmap(loss)(torch.zeros(2, T, B, I))
    torch.func.jvp(loss, (x,), (x,))
    assert said == ["loop"]


def test_states_that_want_a_gradient(ran: list[str]) -> None:
    layer = fused_rnn.FusedGRU(I, H, recompute=True).requires_grad_(False)
    h = torch.zeros(1, B, H)
    for hx in (h, h.clone().requires_grad_()):
        ran.clear()
        found = list(named(explain(layer, x[:1], hx=hx)))
        layer(x[:1], hx)
        assert found == ran
    assert found == ["sweeps"]


def test_lengths_on_a_cpu() -> None:
    (found,) = explain(fused_rnn.FusedLSTM(I, H), x, lengths=torch.tensor([T, 1]))
    assert found.backend == "cpu"
    assert found.reason.startswith("segments as a packed batch, sweeps of PyTorch calls")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({"length": 3}, TypeError, "unexpected keyword argument 'length'"),
        ({"lengths": [3, 1]}, TypeError, "lengths should be a tensor"),
        (lengths(99, 1), ValueError, "lengths should be from 0 to 16"),
        ({"hx": (x, x)}, TypeError, "hx should be a tensor"),
        ({"hx": torch.zeros(1, 9, H)}, RuntimeError, "Expected hidden size"),
    ],
)
def test_what_comes_with_the_call_is_checked(
    call: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        explain(fused_rnn.FusedGRU(I, H), x, **call)


def test_packed_input_of_any_order() -> None:
    packed = packer(False)(sequences([1, T], I, torch.float32))
    assert explain(fused_rnn.FusedGRU(I, H), packed)[0].backend == "cpu"


@pytest.mark.parametrize("extra", [{}, {"zoneout": 0.5}, {"recurrent_dropout": 0.5}])
def test_the_kernels_know_the_options(extra: dict[str, float], triton_device: str) -> None:
    layer = fused_rnn.FusedLSTM(I, H, backend="triton", **extra).to(triton_device)
    call = {n: t.to(triton_device) for n, t in (RESET | lengths(3, 2)).items()}
    (found,) = explain(layer, x.to(triton_device), **call, return_cell_sequence=True)
    assert found.backend == "triton"


def test_a_cell_that_torch_lacks(ran: list[str]) -> None:
    """The sweeps derived from its step run on a CPU, in inference, too."""
    layer = fused_rnn.FusedRecurrent(minimal_gated_unit, I, H)
    for context in (nullcontext(), torch.no_grad()):
        ran.clear()
        with context:
            found = list(named(explain(layer, x)))
            layer(x)
        assert found == ran == ["sweeps"]

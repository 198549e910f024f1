"""Lengths, resets, zoneout and the like in the Triton kernels, against the eager loop in fp64.

(The eager loop is held against torch.nn in test_options.py.)
"""

from typing import Any

import pytest
import torch
from concurrent_interpreter import concurrent_grid
from helpers import assert_same
from sweep_oracle import Problem, group_plan
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fused_rnn import FusedGRU, FusedLSTM, FusedRNN
from fused_rnn.engines.triton import engine as triton_engine
from fused_rnn.engines.triton import support

LAYERS: dict[str, Any] = {
    "tanh": (FusedRNN, {}),
    "relu": (FusedRNN, {"nonlinearity": "relu"}),
    "gru": (FusedGRU, {}),
    "lstm": (FusedLSTM, {}),
}
NAMES = {"tanh": "rnn_tanh", "relu": "rnn_relu", "gru": "gru", "lstm": "lstm"}
ALL = {"zoneout": 0.3, "recurrent_dropout": 0.4, "clip_recurrent_grad": 0.3, "learn_h0": True}
# Constructor's keywords, and what is passed beside the input.
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lengths": ({}, {"lengths"}),
    "reset": ({}, {"reset"}),
    "restart": ({"learn_h0": True}, {"reset", "lengths"}),
    "zoneout": ({"zoneout": 0.3}, set()),
    "expectation": ({"zoneout": 0.3}, {"eval"}),
    "dropout": ({"recurrent_dropout": 0.4}, set()),
    "clip": ({"clip_recurrent_grad": 0.05}, set()),
    "cells": ({}, {"cells"}),
    "all": (ALL, {"lengths", "reset", "cells"}),
    "all expected": ({"zoneout": 0.3}, {"lengths", "reset", "cells", "eval"}),
    "packed": ({"zoneout": 0.3, "recurrent_dropout": 0.4}, {"packed", "reset", "cells"}),
}
LENGTHS = [4, 1, 3, 0, 2, 4, 4, 3, 1]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.engines.triton.support.rnn_precision", lambda: "ieee")


def run(layer: nn.Module, given: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """Outputs and, of a fixed random loss, all gradients; random numbers are the same ones."""
    torch.manual_seed(5)
    layer = layer.to(device, dtype)
    x = given["x"].to(device, dtype).requires_grad_()
    hx = [h.to(device, dtype).requires_grad_() for h in given["hx"]]
    state = None if not hx else tuple(hx) if len(hx) == 2 else hx[0]
    keywords = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in given["keywords"].items()
    }
    if "pack" in given:
        argument: Any = pack_padded_sequence(x, given["pack"], enforce_sorted=False)
        keywords["reset"] = pack_padded_sequence(
            keywords["reset"], given["pack"], enforce_sorted=False
        )
    else:
        argument = x
    output, final, *more = layer(argument, state, **keywords)
    found = [output, *(final if isinstance(final, tuple) else (final,)), *more]
    found = [f if isinstance(f, Tensor) else f.data for f in found]
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in found]
    loss = sum((o.double().cpu() * w).sum() for o, w in zip(found, weights, strict=True))
    assert isinstance(loss, Tensor)
    wanted = [x, *hx, *layer.parameters()]
    names = ["x", *(f"hx {i}" for i in range(len(hx))), *(n for n, _ in layer.named_parameters())]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    results = {f"output {i}": o.detach().cpu() for i, o in enumerate(found)}
    return results | {
        f"grad {n}": g.detach().cpu() for n, g in zip(names, grads, strict=True) if g is not None
    }


def compare(
    kind: str, case: str, device: str, T: int, B: int, H: int, **options: Any
) -> dict[str, Tensor]:
    cls, extra = LAYERS[kind]
    keywords, passed = CASES[case]
    layer = cls(3, H, backend="triton", **extra, **keywords, **options)
    if "learn_h0" in keywords:
        for name in ("h_0", "c_0") if kind == "lstm" else ("h_0",):
            nn.init.normal_(getattr(layer, name))
    layer.train("eval" not in passed)
    D, states = 2 if layer.bidirectional else 1, 2 if kind == "lstm" else 1
    given: dict[str, Any] = {"x": torch.randn(T, B, 3), "keywords": {}, "hx": []}
    if "learn_h0" not in keywords:
        given["hx"] = [torch.randn(D, B, H) for _ in range(states)]
    if "reset" in passed:
        given["keywords"]["reset"] = torch.rand(T, B) < 0.4
    if "lengths" in passed:
        given["keywords"]["lengths"] = torch.tensor(LENGTHS[:B]).clamp(max=T)
    if "cells" in passed and kind == "lstm":
        given["keywords"]["return_cell_sequence"] = True
    if "packed" in passed:
        given["pack"] = torch.tensor(LENGTHS[:B]).clamp(1, T)
    found = run(layer, given, device, torch.float32)
    layer.backend = "eager"
    generator_is_the_same = device == "cpu" or not layer.training
    if generator_is_the_same:
        expected = run(layer, given, "cpu", torch.float64)
    else:  # a GPU draws other masks: the eager loop is to draw them there, too
        expected = run(layer, given, device, torch.float64)
    assert_same(found, expected, torch.float32)
    return found


def turns() -> Any:
    """All cases with all layers; without the slow ones, they take turns."""
    for i, case in enumerate(CASES):
        for j, kind in enumerate(LAYERS):
            if case == "cells" and kind != "lstm":
                continue
            quick = case in ("all", "all expected", "cells", "packed") or i % 4 == j
            yield pytest.param(kind, case, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "case"), list(turns()))
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
def test_options(kind: str, case: str, bidirectional: bool, triton_device: str) -> None:
    compare(kind, case, triton_device, 4, 9, 5, bidirectional=bidirectional)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", ["all", "packed"])
def test_recompute(kind: str, case: str, triton_device: str) -> None:
    compare(kind, case, triton_device, 3, 3, 5, recompute=True, bidirectional=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_stack(kind: str, triton_device: str) -> None:
    compare(kind, "all", triton_device, 3, 3, 4, num_layers=2, bias=False)


GROUP_PLANS: dict[str, dict[str, Any]] = {
    "registers": {},
    "split": {"block_h": 32, "k_split": 2},
    "streamed": {"regime": "streamed"},
    "launches": {"tiles": 1},
}


def group_turns() -> Any:
    for i, case in enumerate(CASES):
        for j, kind in enumerate(LAYERS):
            if case == "cells" and kind != "lstm":
                continue
            plan = list(GROUP_PLANS)[(i + j) % 4]
            quick = case == "all" or (case in ("packed", "lengths", "reset") and i % 4 == j)
            yield pytest.param(kind, case, plan, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "case", "plan"), list(group_turns()))
def test_groups(kind: str, case: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs share a batch tile and run concurrently."""
    H, B = 35 if plan == "split" else 19, 9 if plan == "launches" else 3
    problem = Problem(NAMES[kind], torch.float32, H, B, 1)
    engine = triton_engine.TritonEngine(group_plan(problem, **GROUP_PLANS[plan]), "ieee")
    assert engine.plan.programs == 2
    monkeypatch.setattr(support, "make_engine", lambda *args: engine)
    with concurrent_grid(seed=H, timeout=600):
        first = compare(kind, case, "cpu", 3, B, H, bidirectional=plan != "launches")
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.parametrize("lengths", [[3, 2, 1], [3, 3, 3]], ids=["ragged", "uniform"])
def test_compile_of_packed_input_in_a_group(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved depends on nothing that a tracer does not know, such as B and the lengths."""
    engine = triton_engine.TritonEngine(
        group_plan(Problem("lstm", torch.float32, 17, 3, 1)), "ieee"
    )
    monkeypatch.setattr(support, "make_engine", lambda *args: engine)
    layer = FusedLSTM(3, 17, backend="triton")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, found = torch.randn(3, 3, 3), []
    for function in (compiled, layer):
        with concurrent_grid(seed=1, timeout=600):
            output, _ = function(pack_padded_sequence(x, torch.tensor(lengths)))
            loss = output.data.square().sum()
            found.append([output.data, *torch.autograd.grad(loss, list(layer.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_zoneout_keeps_a_state_exactly(triton_device: str) -> None:
    """However large what is not taken."""
    for size in (1e7, 1e30):
        layer = FusedRNN(3, 5, nonlinearity="relu", zoneout=0.5, backend="triton")
        layer = layer.to(triton_device)
        with torch.no_grad():
            layer.weight_ih_l0.fill_(1.0)
            h0 = torch.full((1, 3, 5), 0.1, device=triton_device)
            output, _ = layer(torch.full((1, 3, 3), size, device=triton_device), h0)
        kept = output == h0
        assert 0 < kept.sum() < kept.numel()
        assert (output[~kept] > 1e6).all()


def test_cell_sequence_may_be_overwritten(triton_device: str) -> None:
    """What backward needs of c is its own."""
    layer = FusedLSTM(3, 5, backend="triton").to(triton_device)
    x = torch.randn(4, 3, 3, device=triton_device)
    found = []
    for overwrite in (False, True):
        output, _, cells = layer(x, return_cell_sequence=True)
        loss = output.sum() + 2 * cells.sum()
        if overwrite:
            loss = output.sum() + cells.mul_(2).sum()
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_is_never_looked_at(triton_device: str) -> None:
    """NaN behind a sequence's end reaches neither outputs nor gradients."""
    layer = FusedLSTM(3, 5, bidirectional=True, backend="triton").to(triton_device)
    lengths, x = torch.tensor([4, 1, 3]), torch.randn(4, 3, 3)
    for b, n in enumerate(lengths):
        x[n:, b] = torch.nan
    output, final = layer(x.to(triton_device), lengths=lengths.to(triton_device))
    (output.sum() + final[0].sum()).backward()
    assert output.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_lengths_out_of_range_are_cut_on_a_gpu(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the GPU to look at them, so the kernels must not leave the batch."""
    monkeypatch.setattr("fused_rnn.layers.call.check_lengths", lambda *args: None)
    layer = FusedGRU(3, 5, backend="triton").to(triton_device)
    x = torch.randn(4, 3, 3, device=triton_device)
    wild = torch.tensor([-3, 2**31 - 1, 9], device=triton_device)
    tame = torch.tensor([0, 4, 4], device=triton_device)
    for found, expected in zip(layer(x, lengths=wild), layer(x, lengths=tame), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_compile(kind: str, triton_device: str) -> None:
    cls, extra = LAYERS[kind]
    layer = cls(3, 5, backend="triton", **ALL, **extra).to(triton_device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 3, device=triton_device)
    keywords: dict[str, Any] = {
        "reset": (torch.rand(4, 3) < 0.4).to(triton_device),
        "lengths": torch.tensor([4, 1, 3], device=triton_device),
    }
    if kind == "lstm":
        keywords["return_cell_sequence"] = True
    found = []
    for function in (layer, compiled):
        torch.manual_seed(2)
        output, _, *more = function(x, **keywords)
        loss = output.square().sum() + sum(m.square().sum() for m in more)
        grads = torch.autograd.grad(loss, list(layer.parameters()))
        found.append([output, *more, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)

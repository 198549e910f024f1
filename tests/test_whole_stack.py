"""A whole stack in one call of torch.nn's function, on a CPU."""

from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    assert_no_worse,
    every_layer,
    packer,
    run,
    sequences,
    states,
    tensors,
    twins,
)
from torch import Tensor

import fused_rnn
from fused_rnn.engines import native_rules
from fused_rnn.ops import functional

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False},
    "batch_first": {"batch_first": True},
}
DIRECTIONS = pytest.mark.parametrize("shape", SHAPES)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def batch(packed: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Any]:
    if packed:
        return sequences([4, 2, 5], 3, dtype), packer(False)
    return [torch.randn(5, 5, 3, dtype=dtype)], lambda xs: xs[0]


# ---- the whole stack at once, on a CPU ----------------------------------------------------------


@every_layer
@DIRECTIONS
@PACKED
def test_the_stack_in_one_call(
    kind: str, shape: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit torch.nn's layer, dropout, states and all."""
    monkeypatch.setattr(functional, "run", None)  # to call it would raise
    options = SHAPES[shape] | {"num_layers": 2, "dropout": 0.5}
    plain, fused = twins(kind, 3, 6, **options)
    xs, make = batch(packed, torch.float32)
    for hx in (None, states(plain, 3 if packed else 5)):
        results = []
        for layer in (plain, fused):
            torch.manual_seed(0)
            results.append(run(layer, xs, hx, make))
        assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


def test_unbatched_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "run", None)
    for kind in LAYERS:
        plain, fused = twins(kind, 3, 6)
        hx = states(plain, None)
        for argument in (None, hx if len(hx) == 2 else hx[0]):
            found, expected = (
                tensors(layer(torch.ones(4, 3), argument)) for layer in (fused, plain)
            )
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_training_and_inference_differ_by_rounding(kind: str) -> None:
    """Our sweeps train, torch.nn's kernels infer: the bits may differ, the numbers do not."""
    _, layer = twins(kind, 8, 16, dtype=torch.float64)
    x = torch.randn(40, 3, 8, dtype=torch.float64)
    assert fused_rnn.explain(layer, x)[0].backend == "cpu"
    trained = tensors(layer(x))
    with torch.no_grad():
        assert fused_rnn.explain(layer, x)[0].backend == "native"
        for found, expected in zip(tensors(layer(x)), trained, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("T", [2, 40])
def test_16_bits_are_no_worse_than_torchs(kind: str, dtype: torch.dtype, T: int) -> None:
    """Whichever runs, eager or compiled: of tiny calls torch.nn's own, which round every state."""
    plain, fused = twins(kind, 8, 16, dtype=dtype)
    exact = twins(kind, 8, 16, dtype=torch.float64)[0]
    exact.load_state_dict(plain.state_dict())
    x = torch.randn(T, 8, 8, dtype=dtype)
    engine = "native" if T == 2 or native_rules.multiplies(dtype) else "cpu"
    with torch.no_grad():
        assert fused_rnn.explain(fused, x)[0].backend == engine
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    names = ("output", "h_n", "c_n")
    oracle = dict(zip(names, tensors(exact(x.double())), strict=False))
    theirs = dict(zip(names, tensors(plain(x)), strict=False))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for layer in (fused, compiled):
                found = dict(zip(names, tensors(layer(x)), strict=False))
                assert_no_worse(found, theirs, oracle)

"""torch.nn's own kernels as an engine: as on a GPU, on CPU tensors; and when they are chosen."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    assert_same,
    every_layer,
    packer,
    run,
    sequences,
    states,
    tensors,
    twins,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn.engines import dispatch, native
from fused_rnn.layers import whole_stack
from fused_rnn.ops.functional import rnn_layer
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.layer import LayerInputs, LayerSpec, Weights

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False},
    "batch_first": {"batch_first": True},
}
DIRECTIONS = pytest.mark.parametrize("shape", SHAPES)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engine runs every layer as on a GPU, wrapped for autograd. Returns what has run."""
    ran: list[str] = []

    def chosen(device: torch.device, free: bool, reason: str) -> dispatch.Choice:
        return dispatch.Choice("native", reason, native)

    def spied(*args: Any, **keywords: Any) -> Any:
        ran.append("native")
        return original(*args, **keywords)

    original = native.run
    monkeypatch.setattr(native, "run", spied)
    monkeypatch.setattr(dispatch, "_native", chosen)
    monkeypatch.setattr(whole_stack, "prepare", lambda *args: None)
    return ran


def batch(packed: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Any]:
    if packed:
        return sequences([4, 2, 5], 3, dtype), packer(False)
    return [torch.randn(5, 5, 3, dtype=dtype)], lambda xs: xs[0]


# ---- the engine, as on a GPU --------------------------------------------------------------------


@every_layer
@DIRECTIONS
@PACKED
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_results_and_gradients(
    kind: str, shape: str, packed: bool, given: bool, on_a_gpu: list[str]
) -> None:
    plain, fused = twins(kind, 3, 6, dtype=torch.float64, backend="native", **SHAPES[shape])
    xs, make = batch(packed)
    hx = states(plain, 3 if packed else 5) if given else None
    for training in (True, False):  # cuDNN's own backward needs its training mode
        plain.train(training)
        fused.train(training)
        assert_same(run(fused, xs, hx, make), run(plain, xs, hx, make))
    assert on_a_gpu
    with torch.no_grad():
        found = run(fused, xs, hx, make, gradients=False)
    assert_same(found, run(plain, xs, hx, make, gradients=False))


@every_layer
@PACKED
@pytest.mark.parametrize("most", [1, 2, 4])
def test_sequences_too_long_for_one_call(
    kind: str, packed: bool, most: int, on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN takes 65,535 steps."""
    monkeypatch.setattr(native, "_most_steps", lambda layer, device: most)
    plain, fused = twins(kind, 3, 6, 2, dtype=torch.float64, backend="native")
    xs, make = batch(packed)
    hx = states(plain, 3 if packed else 5)
    assert_same(run(fused, xs, hx, make), run(plain, xs, hx, make))
    both = twins(kind, 3, 6, bidirectional=True, dtype=torch.float64, backend="native")[1]
    text = "takes at most 65535 steps, and two directions cannot be cut"
    with pytest.raises(RuntimeError, match=text):
        both(make(xs))
    monkeypatch.undo()
    spec = LayerSpec(fused._cell, BatchLayout(10**6, 1), 1, 6)
    assert native._most_steps(spec, torch.device("cuda")) == 65535


@every_layer
@PACKED
def test_recompute_saves_the_output_alone(kind: str, packed: bool, on_a_gpu: list[str]) -> None:
    plain, fused = twins(kind, 3, 6, dtype=torch.float64, backend="native", recompute=True)
    xs, make = batch(packed)
    assert_same(run(fused, xs, None, make), run(plain, xs, None, make))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(make([x.requires_grad_() for x in xs]))
    assert sum(t.dtype.is_floating_point for t in kept) <= 2 + len(tensors(plain(make(xs)))) + 5


@every_layer
@PACKED
def test_second_order(kind: str, packed: bool, on_a_gpu: list[str]) -> None:
    """cuDNN cannot; the eager loop does."""
    plain, fused = twins(kind, 3, 6, dtype=torch.float64, backend="native")
    found = []
    xs, make = batch(packed)
    for layer in (plain, fused):
        leaves = [x.clone().requires_grad_() for x in xs]
        loss = tensors(layer(make(leaves)))[0].square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        grads = torch.autograd.grad(total, list(layer.parameters()), allow_unused=True)
        found.append({str(i): g for i, g in enumerate(grads) if g is not None})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("kind", ["relu", "gru", "lstm"])
def test_what_autograd_offers(kind: str, on_a_gpu: list[str]) -> None:
    """Backward twice, many gradients at once, checkpoints, tensors saved elsewhere."""
    plain, fused = twins(kind, 3, 6, 2, dtype=torch.float64, backend="native")
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def both(layer: nn.Module) -> list[Tensor]:
        out = layer(x)[0]
        found = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2)]
        many = torch.randn(3, *out.shape, dtype=x.dtype, generator=torch.manual_seed(3))
        found += torch.autograd.grad(out, x, many, is_grads_batched=True)
        again = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
        found += torch.autograd.grad(again.square().sum(), x)
        with torch.autograd.graph.save_on_cpu():
            out = layer(x)[0]
        found += torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        return found

    for found, expected in zip(both(fused), both(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_backward_without_need_of_all(on_a_gpu: list[str]) -> None:
    _, layer = twins("gru", 3, 6, dtype=torch.float64, backend="native")
    layer.requires_grad_(False).bias_hh_l0.requires_grad_()
    layer(torch.randn(4, 2, 3, dtype=torch.float64))[1].sum().backward()
    assert layer.bias_hh_l0.grad is not None
    assert layer.weight_ih_l0.grad is None


def test_the_graph_goes_with_backward(on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward has used is free, though the loss is still there."""
    tokens: list[Any] = []
    original = native._recorded

    def spied(spec: LayerSpec, inputs: Any) -> Any:
        outputs, saved = original(spec, inputs)
        token = Token()
        saved[0].grad_fn.register_hook(lambda *_: token and None)
        tokens.append(weakref.ref(token))
        return outputs, saved

    monkeypatch.setattr(native, "_recorded", spied)
    layer = fused_rnn.FusedLSTM(3, 5, backend="native")
    loss = layer(torch.randn(4, 2, 3))[0].sum()
    gc.collect()
    assert tokens[0]() is not None
    loss.backward()
    gc.collect()
    assert tokens[0]() is None


class Token:
    """Something to refer to weakly."""


def test_written_into_before_backward(on_a_gpu: list[str]) -> None:
    """PyTorch's own error, not a wrong gradient."""
    layer = fused_rnn.FusedLSTM(3, 5, backend="native")
    x = torch.randn(4, 2, 3)
    loss = layer(x)[0].sum()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@PACKED
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_arguments_of_cudnn(
    kind: str, bidirectional: bool, packed: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PyTorch's shape functions for it, which check sizes; there is no GPU behind them."""
    given: list[Any] = []
    original = torch._cudnn_rnn

    def spied(*args: Any) -> Any:
        given.append(args)
        return original(*args)

    monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda x: True)
    monkeypatch.setattr(torch, "_cudnn_rnn", spied)
    monkeypatch.setattr(native, "in_one_piece", lambda weights, *how: torch.empty(1, device="cuda"))
    D, sizes = 1 + bidirectional, (3, 2, 2)
    layout = BatchLayout(3, 3, sizes) if packed else BatchLayout(3, 3)
    _, kind_of, extra = LAYERS[kind]
    ours: Any = kind_of(4, 6, bidirectional=bidirectional, bias=bias, device="meta", **extra)
    with FakeTensorMode(), torch.no_grad():
        weights = tuple(
            Weights._make(None if p is None else torch.empty(p.shape, device="cuda") for p in w)
            for w in ours._weights()[0]
        )
        x = torch.empty(layout.N, 4, device="cuda")
        R = ours.proj_size or 6
        h0 = torch.empty(D, 3, R, device="cuda")
        c0 = torch.empty(D, 3, 6, device="cuda") if ours._cell.has_c else None
        spec = LayerSpec(ours._cell, layout, D, 6, projected=ours.proj_size > 0)
        outputs = native.run(spec, LayerInputs(x, h0, c0, weights), train=True)
    assert outputs.out.shape == (layout.N, D * R)
    assert outputs.h_n.shape == h0.shape
    assert (outputs.c_n is None) is (c0 is None)
    (args,) = given
    assert args[2] * D == len(args[1])  # parameters of a direction
    assert (args[6], args[7], args[8]) == (_MODES[kind], 6, ours.proj_size)
    assert args[11:13] == (0.0, True)
    assert args[14] == (list(sizes) if packed else [])


_MODES = {"relu": 0, "tanh": 1, "lstm": 2, "projected": 2, "gru": 3}  # CUDNN_RNN_RELU and so on


# ---- what it does not run -----------------------------------------------------------------------


def test_refuses() -> None:
    x = torch.randn(4, 2, 3)
    for options in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}):
        layer = fused_rnn.FusedGRU(3, 5, backend="native", **options)
        with pytest.raises(RuntimeError, match="'native' cannot run this layer: it has no options"):
            layer(x)
    layer = fused_rnn.FusedGRU(3, 5, backend="native", device="meta")
    with pytest.raises(RuntimeError, match="it is not used on meta"):
        layer(x.to("meta"))


def test_lengths_as_a_packed_batch() -> None:
    plain, layer = twins("gru", 3, 5, dtype=torch.float64, backend="native")
    x, lengths = torch.randn(4, 2, 3, dtype=torch.float64), torch.tensor([4, 2])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
    out, h_n = layer(x, lengths=lengths)
    expected, final = plain(packed)
    torch.testing.assert_close(out, nn.utils.rnn.pad_packed_sequence(expected)[0])
    torch.testing.assert_close(h_n, final)


def test_projections_warn_of_nothing() -> None:
    """PyTorch warns once in a process that oneDNN has none; and no random number is drawn."""
    code = """
import torch
from fused_rnn import FusedLSTM
layer, x = FusedLSTM(3, 5, proj_size=2), torch.zeros(4, 2, 3)
before = torch.get_rng_state()
layer(x)
assert torch.equal(before, torch.get_rng_state())
"""
    command = [sys.executable, "-W", "error:LSTM with projections", "-c", code]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- on a GPU, and by itself ---------------------------------------------------------------------


@pytest.mark.gpu
@every_layer
@DIRECTIONS
@PACKED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("whole", [True, False], ids=["stack", "layers"])
def test_on_a_gpu(
    kind: str,
    shape: str,
    packed: bool,
    dtype: torch.dtype,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By cuDNN, as a whole and layer by layer; in fp32 it is its own measure."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    if not whole:
        monkeypatch.setattr(whole_stack, "prepare", lambda *args: None)
    plain, fused = twins(kind, 3, 6, dtype=dtype, backend="native", **SHAPES[shape])
    xs, make = batch(packed, dtype)
    hx = states(fused, 3 if packed else 5)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    fused.cuda().eval()
    where = "cpu" if dtype == torch.float64 else "cuda"
    plain.to(where)
    found = run(fused, [x.cuda() for x in xs], [h.cuda() for h in hx], make)
    expected = run(plain, [x.to(where) for x in xs], [h.to(where) for h in hx], make)
    on_cpu = [{n: t.cpu() for n, t in results.items()} for results in (found, expected)]
    assert_same(*on_cpu, dtype)
    with torch.no_grad():
        assert isinstance(fused(make([x.cuda() for x in xs]))[0], (Tensor, PackedSequence))


def test_functional() -> None:
    """One layer through the general path, which autograd records itself on a CPU."""
    plain, fused = twins("lstm", 3, 6, backend="native", dtype=torch.float64)
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    h0 = torch.zeros(1, 2, 6, dtype=torch.float64)
    how = (fused._cell, x, h0, h0, fused._weights()[0], BatchLayout(5, 2), "native")
    out = rnn_layer(*how).out
    expected = plain(x.view(5, 2, 3))[0].flatten(0, 1)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(o.sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(found, wanted)

"""torch.nn's own kernels as an engine: as on a GPU, on CPU tensors; and when they are chosen."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    assert_no_worse,
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
from fused_rnn import autograd, contest, dispatch, measured, native, native_stack
from fused_rnn.functional import rnn_layer
from fused_rnn.kernels.plan import LIMITS, make_plan
from fused_rnn.problem import Layer
from fused_rnn.rows import Rows
from fused_rnn.tuning import Request

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
        return dispatch.Choice("native", native, reason, native.run)  # type: ignore[arg-type]

    def spied(*args: Any, **keywords: Any) -> Any:
        ran.append("native")
        return original(*args, **keywords)

    original = native.run
    monkeypatch.setattr(native, "run", spied)
    monkeypatch.setattr(dispatch, "_native", chosen)
    monkeypatch.setattr(native_stack, "prepare", lambda *args: None)
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
    assert native._most_steps(Layer(fused._cell, Rows(10**6, 1), 1), torch.device("cuda")) == 65535


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

    def spied(layer: Layer, inputs: Any) -> Any:
        outputs, saved = original(layer, inputs)
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
    D, sizes = 1 + bidirectional, (3, 2, 2)
    rows = Rows(3, 3, sizes) if packed else Rows(3, 3)
    _, kind_of, extra = LAYERS[kind]
    ours: Any = kind_of(4, 6, bidirectional=bidirectional, bias=bias, device="meta", **extra)
    parameters = [p for w in ours._weights()[0] for p in w]
    with FakeTensorMode(), torch.no_grad():
        weights = [None if p is None else torch.empty(p.shape, device="cuda") for p in parameters]
        x = torch.empty(rows.N, 4, device="cuda")
        R = ours.proj_size or 6
        h0 = torch.empty(D, 3, R, device="cuda")
        c0 = torch.empty(D, 3, 6, device="cuda") if ours._cell.has_c else None
        inputs = (x, h0, c0, *weights)
        outputs = native.run(Layer(ours._cell, rows, D), inputs, train=True)
    assert outputs.out.shape == (rows.N, D * R)
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
        with pytest.raises(RuntimeError, match="'native' cannot run this layer: it has no extras"):
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
    paths = [str(RESULTS.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- the whole stack at once, on a CPU ----------------------------------------------------------


@every_layer
@DIRECTIONS
@PACKED
def test_the_stack_in_one_call(
    kind: str, shape: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit torch.nn's layer, dropout, states and all."""
    monkeypatch.setattr(autograd, "run", None)  # to call it would raise
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
    monkeypatch.setattr(autograd, "run", None)
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
    engine = "native" if T == 2 or native.multiplies(dtype) else "cpu"
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


# ---- when it is chosen --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "dtype", "T", "B", "H", "options", "native_train"),
    [
        ("gru", torch.float32, 4, 8, 64, {}, True),
        ("gru", torch.float32, 64, 8, 64, {}, False),
        ("rnn_tanh", torch.float32, 16, 8, 64, {}, True),
        ("lstm", torch.float32, 64, 8, 64, {}, True),
        ("lstm", torch.float32, 64, 8, 64, {"ragged": True}, False),
        ("lstm", torch.float32, 64, 8, 64, {"projected": True}, False),
        ("lstm", torch.float64, 64, 8, 64, {}, False),
        ("gru", torch.float32, None, 8, 64, {}, False),
        ("lstm", torch.float32, None, 8, 64, {}, True),
    ],
)
def test_the_rule_of_a_cpu(
    cell: str, dtype: torch.dtype, T: int, B: int, H: int, options: Any, native_train: bool
) -> None:
    how = {"ragged": False, "projected": False} | options
    assert (native.suits(cell, dtype, T, B, H, train=True, **how) is not None) is native_train
    assert native.suits(cell, dtype, T, B, H, train=False, **how) is not None


@pytest.mark.parametrize("instructions", [False, True])
def test_16_bits_go_by_what_the_cpu_can(
    instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_multiplies", lambda dtype: instructions)
    how = {"ragged": False, "projected": False}

    def suits(T: int, B: int, H: int, train: bool) -> bool:
        found = native.suits("gru", torch.bfloat16, T, B, H, train=train, **how)
        return found is not None

    assert suits(64, 32, 128, train=False) is instructions
    assert suits(64, 32, 128, train=True) is instructions  # 4096 units
    assert not suits(64, 8, 128, train=True)
    assert suits(4, 4, 16, train=True)
    assert suits(4, 4, 16, train=False)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"ragged": False, "projected": False, "train": True}
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert native.suits("lstm", torch.float32, 64, 8, 64, **how) is None


RESULTS = Path(__file__).parent.parent / "bench" / "results" / "nvidia-h200-grid.jsonl"
# Rows in which the slower one is taken by more than a tenth, and why.
KNOWN = {
    # The plan has changed since: it kept weights in shared memory (docs/speed.md).
    ("fp16", 256, 32, 1024, "forward"),
    # A batch of 8 alone: one row is no rule.
    ("fp16", 256, 8, 512, "train"),
}


def measured_rows() -> Iterator[tuple[dict[str, Any], float, float]]:
    """A row, torch.nn's milliseconds and ours."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (theirs["provider"], ours["provider"]) == ("torch.nn", "fused_rnn")
        yield theirs, theirs["ms"], ours["ms"]


def test_the_rule_of_a_gpu_takes_what_was_measured_faster() -> None:
    dtypes = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
    lost = set()
    for row, theirs, ours in measured_rows():
        precision: Any = "ieee" if row["dtype"] == "fp32" else "tf32"
        dtype = dtypes.get(row["dtype"], torch.bfloat16)
        request = Request(row["cell"], row["H"], dtype, row["B"], 1, precision)
        plan = make_plan(
            row["cell"], row["H"], dtype.itemsize, row["B"], 1, LIMITS[90], precision=precision
        )
        rows, train = Rows(row["T"], row["B"]), row["mode"] == "train"
        takes_theirs = native.suits_gpu(request, plan, rows, train) is not None
        taken, other = (theirs, ours) if takes_theirs else (ours, theirs)
        if taken > 1.1 * other:
            lost.add((row["dtype"], row["T"], row["B"], row["H"], row["mode"]))
    assert lost == KNOWN


def test_no_rule_where_nothing_was_measured() -> None:
    plan = make_plan("lstm", 64, 2, 32, 1, LIMITS[90])
    request = Request("lstm", 64, torch.float16, 32, 1, "tf32")
    assert native.suits_gpu(request, plan, Rows(16, 32), True)
    assert not native.suits_gpu(request, plan, Rows(16, 32, (32,) * 15 + (1,)), True)
    assert not native.suits_gpu(request._replace(D=2), plan, Rows(16, 32), True)
    assert not native.suits_gpu(request._replace(cell="gru"), plan, Rows(16, 32), True)


# ---- timed on the GPU ---------------------------------------------------------------------------

CUDA = torch.device("cuda")


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where winners are remembered; a GPU is pretended."""
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(measured, "engines", measured.Store("engines.json"))
    monkeypatch.setattr(contest, "_found", {})
    return tmp_path / "engines.json"


def test_the_faster_one_is_remembered(engines: Path) -> None:
    layer = fused_rnn.FusedLSTM(64, 128, dtype=torch.float16)
    x = torch.randn(100, 8, 64, dtype=torch.float16)
    request = Request("lstm", 128, torch.float16, 8, 1, "tf32")
    rows = Rows(100, 8)
    seen: list[tuple[str, bool]] = []

    def timer(twin: Any, given: Any, train: bool) -> float:
        assert given is x
        assert twin.weight_hh_l0 is layer.weight_hh_l0
        seen.append((twin.backend, train))
        return 1.0 if (twin.backend == "native") is train else 2.0

    assert contest.winner(request, rows, True, CUDA) is None
    contest.hold(layer, x, request, rows, CUDA, timer)
    assert layer.backend == "auto"
    assert sorted(seen) == [(b, t) for b in ("native", "triton") for t in (False, True)]
    assert contest.winner(request, rows, True, CUDA) == "native"
    assert contest.winner(request, rows, False, CUDA) == "triton"
    assert contest.winner(request, Rows(65, 7), True, CUDA) == "native"  # of the same class
    other = request._replace(B=9)
    for request_, rows_ in [(request, Rows(64, 8)), (other, Rows(100, 9))]:
        assert contest.winner(request_, rows_, True, CUDA) is None
    assert contest.winner(request, Rows(100, 8, (8,) * 99 + (1,)), True, CUDA) is None
    assert contest.winner(request, rows, True, torch.device("cpu")) is None
    keys = json.loads(engines.read_text())
    assert "training T<=128 lstm H=128 float16" in " ".join(keys)


def test_a_layer_that_is_not_trained_is_timed_in_inference(engines: Path) -> None:
    layer = fused_rnn.FusedGRU(8, 16, dtype=torch.float16)
    request = Request("gru", 16, torch.float16, 4, 1, "tf32")
    x = torch.randn(10, 4, 8, dtype=torch.float16)
    for change in ({"recompute": True}, {}):
        for name, value in change.items():
            setattr(layer, name, value)
        if not change:
            layer.recompute = False
            layer.requires_grad_(False)
        contest.hold(layer, x, request, Rows(10, 4), CUDA, lambda *_: 1.0)
        assert contest.winner(request, Rows(10, 4), True, CUDA) is None
        assert contest.winner(request, Rows(10, 4), False, CUDA) == "triton"


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call without hooks, and the gradients of what trains; nothing is accumulated."""
    calls: list[float] = []

    def bench(call: Any, return_mode: str) -> float:
        call()
        calls.append(1.0)
        return 1.5

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    layer = fused_rnn.FusedLSTM(3, 5)
    layer.bias_ih_l0.requires_grad_(False)
    layer.register_forward_hook(lambda *_: calls.append(-1.0))
    packed = packer(False)(sequences([2, 4], 3, torch.float32))
    for x in (torch.randn(4, 2, 3), packed):
        assert [contest.time_call(layer, x, train) for train in (False, True)] == [1.5, 1.5]
    assert calls == [1.0] * 4
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("zoneout", [0.0, 0.5])
def test_tune_holds_the_contest(zoneout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.nn's kernels can take part: they know no zoneout."""
    from fused_rnn import tuning
    from fused_rnn.triton_engine import TritonEngine

    layer = fused_rnn.FusedLSTM(3, 64, zoneout=zoneout)
    x = torch.randn(4, 2, 3)
    module = sys.modules["fused_rnn.explain"]  # the package has the function of that name
    problem, _, dtype = module.problem_of(layer, x)
    plan = make_plan("lstm", 64, 4, 2, 1, LIMITS[90])
    held: list[Any] = []
    monkeypatch.setattr(module, "problem_of", lambda *_: (problem, torch.device("cuda"), dtype))
    monkeypatch.setattr(
        "fused_rnn.triton_backend.make_engine", lambda *_: TritonEngine(plan, "tf32")
    )
    monkeypatch.setattr("fused_rnn.devices.device_limits", lambda device: LIMITS[90])
    monkeypatch.setattr(tuning, "measure", lambda *_: plan)
    monkeypatch.setattr(contest, "hold", lambda *given: held.append(given))
    assert fused_rnn.tune(layer, x) == (plan,)
    assert len(held) == (zoneout == 0)


def test_the_choice_follows(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was timed comes before the rule; a tracer, to whom T is a symbol, gets the kernels."""
    layer = Layer(fused_rnn.cells.LSTM, Rows(2000, 8), 1)
    plan = make_plan("lstm", 128, 2, 8, 1, LIMITS[90])

    class Engine:
        precision = "tf32"

    Engine.plan = plan  # type: ignore[attr-defined]
    monkeypatch.setattr("fused_rnn.triton_backend.make_engine", lambda *args: Engine)
    monkeypatch.setattr(native, "cudnn", lambda: True)

    def backend(T: int, **how: Any) -> str:
        layer = Layer(fused_rnn.cells.LSTM, Rows(T, 8), 1, how.pop("recompute", False))
        how = {"record": True, "recorder": True} | how
        return dispatch.choose(layer, CUDA, torch.float16, 128, False, "auto", **how).backend

    assert backend(2000) == "triton"
    assert backend(100) == "native"
    assert backend(100, recorder=False) == "triton"
    assert backend(100, recompute=True) == "triton"
    request = Request.of(layer, 128, torch.float16, "tf32")
    for T, best in ((2000, "native"), (100, "triton")):
        measured.engines.remember(contest._key(request, Rows(T, 8), True, CUDA), best)
    assert backend(2000) == "native"
    assert backend(100) == "triton"
    reason = dispatch.choose(layer, CUDA, torch.float16, 128, False, "auto", recorder=True).reason
    assert "they were timed faster on this GPU" in reason


def test_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64, projections, old GPUs: torch.nn's own, and the eager loop only for what it lacks."""
    monkeypatch.setattr("fused_rnn.triton_backend.make_engine", lambda *args: "no such kernel")
    layer = Layer(fused_rnn.cells.LSTM, Rows(20, 8), 1)
    for kind in ("cuda", "mps", "xpu"):
        how = (torch.device(kind), torch.float64, 128, True, "auto")
        choice = dispatch.choose(layer, *how)  # type: ignore[arg-type]
        assert (choice.backend, choice.engine) == ("native", native)
        assert choice.reason == "torch.nn's own kernels: no fused kernel: no such kernel"
    extras = Layer(layer.cell, layer.rows, 1, extras=fused_rnn.problem.Extras(clip=1.0))
    choice = dispatch.choose(extras, torch.device("cuda"), torch.float64, 128, True, "auto")
    assert (choice.backend, choice.engine) == ("eager", None)
    assert choice.reason.endswith("not torch.nn's own: it has no extras")


@pytest.mark.gpu
@every_layer
@DIRECTIONS
@PACKED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_on_a_gpu(kind: str, shape: str, packed: bool, dtype: torch.dtype) -> None:
    """By cuDNN; without its warning that weights are not in one piece, which would be an error."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    plain, fused = twins(kind, 3, 6, dtype=dtype, backend="native", **SHAPES[shape])
    exact = plain.double()
    xs, make = batch(packed, dtype)
    hx = states(fused, 3 if packed else 5)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    fused.cuda().eval()
    found = run(fused, [x.cuda() for x in xs], [h.cuda() for h in hx], make)
    expected = run(exact, [x.double() for x in xs], [h.double() for h in hx], make)
    assert_same({n: t.cpu() for n, t in found.items()}, expected, dtype, growth=3.0)
    with torch.no_grad():
        assert isinstance(fused(make([x.cuda() for x in xs]))[0], (Tensor, PackedSequence))


def test_functional() -> None:
    """One layer through the general path, which autograd records itself on a CPU."""
    plain, fused = twins("lstm", 3, 6, backend="native", dtype=torch.float64)
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    h0 = torch.zeros(1, 2, 6, dtype=torch.float64)
    how = (fused._cell, x, h0, h0, fused._weights()[0], Rows(5, 2), "native")
    out = rnn_layer(*how).out
    expected = plain(x.view(5, 2, 3))[0].flatten(0, 1)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(o.sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(found, wanted)

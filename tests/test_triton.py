"""The Triton backend through the whole layer: outputs, states and all gradients."""

import dataclasses
from typing import Any

import pytest
import torch
from concurrent_interpreter import concurrent_grid
from helpers import (
    assert_no_worse,
    assert_same,
    away_from_kinks,
    packer,
    run,
    sequences,
    states,
    twins,
)
from torch import Tensor, nn

import fused_rnn
from fused_rnn import fuse
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.spec import precision

KINDS = ["tanh", "relu", "gru", "lstm"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def compare(
    kind: str,
    device: str,
    T: int,
    B: int,
    I: int,
    H: int,
    packed: bool = False,
    hx: bool = True,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    **kwargs: Any,
) -> None:
    """Against torch.nn in fp64 on the CPU."""
    exact, fused = twins(kind, I, H, backend="triton", dtype=dtype, recompute=recompute, **kwargs)
    if dtype != torch.float32 and kind in ("tanh", "relu"):
        away_from_kinks(kind, exact)
        fused.load_state_dict(exact.state_dict())
    exact, fused = exact.double(), fused.to(device)
    if packed:
        xs, make = sequences([max(1, T - (3 * b) % T) for b in range(B)], I, dtype), packer(False)
    else:
        xs, make = [torch.randn(T, B, I, dtype=dtype)], lambda xs: xs[0]
    initial = states(fused.cpu(), B) if hx else None
    expected = run(
        exact, [x.double() for x in xs], None if initial is None else _double(initial), make
    )
    fused = fused.to(device)
    found = run(
        fused,
        [x.to(device) for x in xs],
        None if initial is None else [h.to(device) for h in initial],
        make,
    )
    found = {name: value.cpu() for name, value in found.items()}
    if dtype == torch.float32:
        # The tolerance is for sums of 256 products; rounding grows as the root of their number.
        assert_same(found, expected, dtype, growth=max(1.0, (H / 256) ** 0.5))
    elif dtype == torch.bfloat16 and device == "cpu":
        # The interpreter truncates to bf16 where hardware rounds: twice the error, all to one side,
        # so that torch.nn's own error is no measure.
        for name, value in expected.items():
            error = (found[name].double() - value).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * value.abs().max(), name
    else:
        same_type = run(exact.to(dtype), xs, initial, make)
        assert_no_worse(found, same_type, expected)


def _double(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double() for t in tensors]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.engines.triton.support.rnn_precision", lambda: "ieee")


@every_kind
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("recompute", [False, True], ids=["save", "recompute"])
def test_modes(
    kind: str, triton_device: str, packed: bool, bidirectional: bool, recompute: bool
) -> None:
    compare(
        kind,
        triton_device,
        5,
        3,
        4,
        7,
        packed=packed,
        bidirectional=bidirectional,
        recompute=recompute,
    )


@every_kind
@pytest.mark.parametrize("size", [(1, 8, 4, 1), (3, 17, 2, 33), (2, 9, 5, 64)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_sizes(
    kind: str, triton_device: str, size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    compare(kind, triton_device, *size, dtype=dtype)


@every_kind
def test_stack_without_biases_or_states(kind: str, triton_device: str) -> None:
    compare(kind, triton_device, 4, 2, 3, 6, hx=False, num_layers=2, bias=False)


@every_kind
@pytest.mark.parametrize("select", [0, 1, -1], ids=["output", "h_n", "last state"])
def test_gradient_of_one_output(kind: str, triton_device: str, select: int) -> None:
    """Absent gradients are zero."""
    results = []
    plain, fused = twins(kind, 3, 5, backend="triton")
    x = torch.randn(4, 2, 3)
    for layer, device in ((plain, "cpu"), (fused.to(triton_device), triton_device)):
        inputs = x.detach().to(device).requires_grad_()
        output, final = layer(inputs)
        found = [output, *(final if isinstance(final, tuple) else (final,))][select]
        grads = torch.autograd.grad(found.square().sum(), [inputs, *layer.parameters()])
        results.append([g.cpu() for g in grads])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_backward_twice_and_double_backward(kind: str, triton_device: str) -> None:
    _, layer = twins(kind, 2, 3, backend="triton")
    layer.to(triton_device)
    x = torch.randn(3, 2, 2, device=triton_device, requires_grad=True)
    output = layer(x)[0]
    first = torch.autograd.grad(output.square().sum(), x, retain_graph=True)[0]
    again = torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(first, again, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(torch.autograd.grad(again.square().sum(), x)[0]).all()


@every_kind
def test_recompute_saves_states_alone(kind: str, triton_device: str) -> None:
    from bench.memory import saved_bytes

    T, B, I, H = 20, 4, 2, 32
    x = torch.randn(T, B, I, device=triton_device)
    sizes = {}
    for recompute in (False, True):
        _, layer = twins(kind, I, H, backend="triton", recompute=recompute)
        layer.to(triton_device)
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        per_row = saved_bytes(lambda: layer(x)[0], own) / (4 * T * B * H)  # noqa: B023
        sizes[recompute] = per_row
    states = 2 if kind == "lstm" else 1
    assert sizes[True] < states + 0.5  # x, h0 and the final states are the rest
    if kind in ("gru", "lstm"):
        assert sizes[False] > states + 4


@every_kind
@pytest.mark.gpu
def test_deterministic(kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    _, layer = twins(kind, 32, 64, backend="triton", bidirectional=True)
    layer.cuda()
    xs = [torch.randn(50, 33, 32, device="cuda")]
    first = run(layer, xs, None)
    for _ in range(49):
        again = run(layer, xs, None)
        assert all(torch.equal(first[name], again[name]) for name in first)


@every_kind
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("H", [64, 128])
def test_error_against_cudnn(kind: str, dtype: torch.dtype, H: int) -> None:
    """At most twice cuDNN's error in the same type, both against fp64."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    T, B, I = 100, 16, 64
    plain, fused = twins(kind, I, H, backend="triton", dtype=dtype)
    if kind in ("tanh", "relu"):
        away_from_kinks(kind, plain)
        fused.load_state_dict(plain.state_dict())
    exact = twins(kind, I, H, dtype=torch.float64)[0]
    exact.load_state_dict(plain.state_dict())
    xs = [torch.randn(T, B, I, dtype=dtype)]
    oracle = run(exact, [x.double() for x in xs], None)
    theirs = run(plain.cuda(), [x.cuda() for x in xs], None)
    ours = run(fused.cuda(), [x.cuda() for x in xs], None)
    assert_no_worse(*({n: v.cpu() for n, v in r.items()} for r in (ours, theirs, oracle)))


def test_precision_follows_the_switch_of_nn_lstm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rnn = torch.backends.cudnn.rnn
    before, matmul = rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            rnn.fp32_precision = setting
            assert precision.rnn_precision() == setting
            with precision.matmul_precision(setting):
                assert torch.backends.cuda.matmul.fp32_precision == setting
            assert torch.backends.cuda.matmul.fp32_precision == matmul
            with pytest.raises(ZeroDivisionError), precision.matmul_precision(setting):
                _ = 1 / 0
            assert torch.backends.cuda.matmul.fp32_precision == matmul
    finally:
        rnn.fp32_precision = before


# ---- groups of programs -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_groups_through_the_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More units than one program holds: all gradients, with the programs run concurrently."""
    limits = dataclasses.replace(LIMITS[80], groups=True)
    monkeypatch.setattr("fused_rnn.engines.triton.devices.device_limits", lambda device: limits)
    with concurrent_grid(timeout=600):  # a hang is found at once, this is for accidents
        compare(kind, "cpu", T=2, B=2, I=3, H=130, dtype=torch.float32)


@pytest.mark.parametrize("H", [300, 1024, 1500])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.gpu
def test_groups_on_a_gpu(kind: str, H: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    for dtype in (torch.float32, torch.bfloat16):
        compare(kind, "cuda", T=20, B=19, I=32, H=H, dtype=dtype)
        compare(kind, "cuda", T=20, B=19, I=32, H=H, packed=True, bidirectional=True, dtype=dtype)


# ---- explain ------------------------------------------------------------------------------------


def test_explain_names_backend_plan_and_reason(triton_device: str) -> None:
    layer = fused_rnn.FusedGRU(3, 33, 2, backend="triton").to(triton_device)
    found = fused_rnn.explain(layer, torch.randn(4, 2, 3, device=triton_device))
    assert [(e.layer, e.backend) for e in found] == [(0, "triton"), (1, "triton")]
    assert "64 units x 8 sequences" in found[0].reason
    assert str(found).startswith("layer 0: triton: persistent")
    assert str(found).count("\n") == 1


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: fused_rnn.FusedLSTM(3, 5), "native: torch.nn's own kernels: oneDNN's fused LSTM"),
        (lambda: fused_rnn.FusedLSTM(3, 5, recompute=True), "cpu: sweeps of PyTorch calls: recom"),
        (lambda: fused_rnn.FusedLSTM(3, 5).double(), "cpu: sweeps of PyTorch calls: faster here"),
        (lambda: fused_rnn.FusedGRU(3, 5), "cpu: sweeps of PyTorch calls: faster here"),
        (lambda: fused_rnn.FusedGRU(3, 5, backend="native"), "own kernels: backend='native' asks"),
        (lambda: fused_rnn.FusedGRU(3, 5, backend="cpu"), "PyTorch calls: backend='cpu' asks for"),
        (lambda: fused_rnn.FusedRNN(3, 5, backend="eager"), "eager: backend='eager' asks for it"),
        (lambda: fused_rnn.FusedGRU(3, 5, device="meta"), "not on meta"),
    ],
)
def test_explain_on_the_cpu(layer: Any, words: str) -> None:
    layer = layer()
    weight = layer.weight_ih_l0
    x = torch.zeros(16, 2, 3, dtype=weight.dtype, device=weight.device)
    assert words in str(fused_rnn.explain(layer, x))


@pytest.mark.parametrize("H", [1, 128, 129, 512, 1000, 1500, 2048, 4096])
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_explain_plans_every_size_for_a_gpu_that_is_not_here(kind: str, H: int) -> None:
    layer = fuse(_plain(kind, H), backend="triton")
    x = torch.zeros(4, 2, 3, dtype=torch.bfloat16, device="meta")
    for gpu in (80, 86, 89, 90, 100, 120):
        (found,) = fused_rnn.explain(layer, x, gpu)
        assert found.backend == "triton"
        assert found.reason.startswith(("persistent", "cooperative", "streamed"))
        assert "programs hold" not in found.reason


def _plain(kind: str, H: int) -> nn.RNNBase:
    how: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    if kind == "tanh":
        return nn.RNN(3, H, **how)
    return nn.GRU(3, H, **how) if kind == "gru" else nn.LSTM(3, H, **how)


def test_explain_says_why_a_gpu_does_not_run_it() -> None:
    x = torch.zeros(4, 2, 3)
    assert "proj_size" in str(fused_rnn.explain(fused_rnn.FusedLSTM(3, 5, proj_size=2), x, 90))
    text = str(fused_rnn.explain(fused_rnn.FusedLSTM(3, 512), x, "gfx942"))
    assert "native: torch.nn's own kernels: no fused kernel" in text
    assert "a group of programs cannot run here" in text
    with pytest.raises(ValueError, match="gpu 70 is not known"):
        fused_rnn.explain(fused_rnn.FusedLSTM(3, 5), x, 70)


def test_explain_refuses() -> None:
    with pytest.raises(TypeError, match="a fused layer is needed, got LSTM"):
        fused_rnn.explain(nn.LSTM(3, 5), torch.randn(4, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"Expected 3, got 9"):
        fused_rnn.explain(fused_rnn.FusedGRU(3, 5), torch.randn(4, 2, 9))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda **k: fused_rnn.FusedLSTM(3, 5, proj_size=2, **k), "no kernels for projections"),
        (lambda **k: fused_rnn.FusedGRU(3, 5, dtype=torch.float64, **k), "not for torch.float64"),
        (lambda **k: fused_rnn.FusedLSTM(3, 1025, **k), "hidden_size=1025"),
    ],
)
def test_triton_says_what_it_cannot(layer: Any, words: str, triton_device: str) -> None:
    if triton_device == "cuda" and "1025" in words:
        pytest.skip("a group runs it there; the interpreter has one program at a time")
    layer = layer(backend="triton").to(triton_device)
    x = torch.randn(4, 2, 3, dtype=layer.weight_ih_l0.dtype, device=triton_device)
    with pytest.raises(RuntimeError, match=words):
        layer(x)

"""Outputs, final states and all gradients equal torch.nn's, in every mode."""

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    assert_no_worse,
    assert_same,
    every_backend,
    every_layer,
    packer,
    run,
    sequences,
    states,
    twins,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.common_modules import module_db

import fused_rnn
from fused_rnn.engines.dispatch import Backend

# Small odd sizes reach every edge; 64 and 33 are a full and a ragged vector register.
SIZES = [(1, 1, 1, 2), (2, 3, 5, 7), (9, 17, 3, 33), (9, 3, 4, 64)]  # T, B, I, H
INPUTS = ["batched", "unbatched", "packed", "packed-unsorted"]


def compare(
    kind: str,
    T: int,
    B: int,
    I: int,
    H: int,
    inputs: str,
    hx: bool,
    backend: Backend,
    **kwargs: Any,
) -> None:
    dtype = kwargs["dtype"]
    plain, fused = twins(kind, I, H, backend=backend, **kwargs)
    make: Any = lambda xs: xs[0]  # noqa: E731
    if inputs.startswith("packed"):
        lengths = [max(1, T - (3 * b) % (T + 1)) for b in range(B)]
        if inputs == "packed":
            lengths.sort(reverse=True)
        xs, make, batch = sequences(lengths, I, dtype), packer(inputs == "packed"), B
    elif inputs == "unbatched":
        xs, batch = [torch.randn(T, I, dtype=dtype)], None
    else:
        xs, batch = [torch.randn(*((B, T) if plain.batch_first else (T, B)), I, dtype=dtype)], B
    initial = states(plain, batch) if hx else None
    assert_same(run(fused, xs, initial, make), run(plain, xs, initial, make))


@every_layer
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("layers", [1, 2], ids=["L1", "L2"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.float64), ("eager", torch.float64)],
    ids=["cpu-fp32", "cpu-fp64", "eager-fp64"],
)
def test_modes(
    kind: str,
    inputs: str,
    layers: int,
    bidirectional: bool,
    backend: Backend,
    dtype: torch.dtype,
) -> None:
    for bias, batch_first, hx in itertools.product([False, True], repeat=3):
        compare(
            kind,
            *SIZES[1],
            inputs,
            hx,
            backend,
            num_layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            batch_first=batch_first,
            dtype=dtype,
        )


@every_layer
@every_backend
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
def test_sizes(
    kind: str, backend: Backend, size: tuple[int, ...], inputs: str, bidirectional: bool
) -> None:
    compare(kind, *size, inputs, True, backend, bidirectional=bidirectional, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["tanh", "relu", "gru", "lstm"])
def test_hidden_size_one(kind: str) -> None:
    compare(kind, 2, 3, 2, 1, "batched", True, "cpu", dtype=torch.float64)


@every_layer
@given(
    T=st.integers(1, 12),
    B=st.integers(1, 6),
    I=st.integers(1, 9),
    H=st.integers(2, 20),
    inputs=st.sampled_from(INPUTS),
    bidirectional=st.booleans(),
    hx=st.booleans(),
)
def test_any_shape(
    kind: str, T: int, B: int, I: int, H: int, inputs: str, bidirectional: bool, hx: bool
) -> None:
    compare(kind, T, B, I, H, inputs, hx, "cpu", bidirectional=bidirectional, dtype=torch.float64)


@every_layer
@pytest.mark.parametrize("inputs", ["batched", "packed"])
def test_several_chunks(kind: str, inputs: str) -> None:
    """More rows than the CPU engine handles at a time, in both directions."""
    compare(kind, 130, 40, 3, 32, inputs, True, "cpu", bidirectional=True, dtype=torch.float64)


@every_layer
@every_backend
@pytest.mark.parametrize("inputs", ["batched", "packed"])
def test_recompute(kind: str, backend: Backend, inputs: str) -> None:
    options = {"bidirectional": True, "num_layers": 2, "dtype": torch.float64, "recompute": True}
    compare(kind, 9, 5, 3, 8, inputs, True, backend, **options)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_reduced_precision(kind: str, dtype: torch.dtype) -> None:
    """At most twice torch.nn's own error in the same type, both against fp64."""
    T, B, I, H = 20, 5, 16, 32
    exact, fused = twins(kind, I, H, dtype=torch.float64)
    plain, fused = exact.to(dtype), fused.to(dtype)
    xs, initial = [torch.randn(T, B, I, dtype=dtype)], states(plain, B)
    found, same_type = run(fused, xs, initial), run(plain, xs, initial)
    oracle = run(fused.double(), [x.double() for x in xs], [h.double() for h in initial])
    assert all(value.dtype == dtype for value in found.values())
    assert_no_worse(found, same_type, oracle)


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_dropout_draws_as_torch(kind: str) -> None:
    plain, fused = twins(kind, 4, 6, num_layers=3, dropout=0.4)
    xs = [torch.randn(5, 3, 4)]
    torch.manual_seed(3)
    expected = run(plain, xs, None)
    torch.manual_seed(3)
    assert_same(run(fused, xs, None), expected)
    fused.eval()
    plain.eval()
    assert_same(run(fused, xs, None), run(plain, xs, None))


FUSED = {"nn.RNN": fused_rnn.FusedRNN, "nn.GRU": fused_rnn.FusedGRU, "nn.LSTM": fused_rnn.FusedLSTM}
INFOS = [info for info in module_db if info.name in FUSED]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_torch_module_inputs(info: Any, dtype: torch.dtype) -> None:
    """PyTorch's own grid of constructor and forward arguments."""
    count = 0
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=False, training=True):
        make, call = sample.constructor_input, sample.forward_input
        plain = info.module_cls(*make.args, **make.kwargs).to(dtype)
        fused = FUSED[info.name](*make.args, **make.kwargs).to(dtype)
        fused.load_state_dict(plain.state_dict())
        expected = plain(*call.args, **call.kwargs)
        torch.testing.assert_close(fused(*call.args, **call.kwargs), expected)
        count += 1
    assert count > 10


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_torch_module_error_inputs(info: Any) -> None:
    """PyTorch's own bad inputs, with its own exception types and messages."""
    samples = info.module_error_inputs_func(
        info, "cpu", torch.float32, requires_grad=False, training=True
    )
    count = 0
    for sample in samples:
        make = sample.module_error_input.constructor_input
        call = sample.module_error_input.forward_input
        if call is None:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                FUSED[info.name](*make.args, **make.kwargs)
        else:
            layer = FUSED[info.name](*make.args, **make.kwargs)
            with pytest.raises(sample.error_type, match=sample.error_regex):
                layer(*call.args, **call.kwargs)
        count += 1
    assert count > 0


def test_every_layer_is_compared() -> None:
    assert {info.name for info in INFOS} == set(FUSED)
    assert {ours for _, ours, _ in LAYERS.values()} == set(FUSED.values())

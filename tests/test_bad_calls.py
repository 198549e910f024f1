"""Malformed states, parameters and packed input: refused by name, before anything is computed."""

from typing import Any

import pytest
import torch
from helpers import every_layer, twins
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn.ops import functional

T, B, I, H = 4, 2, 3, 5
x = torch.zeros(T, B, I)
h = torch.zeros(1, B, H)


@pytest.fixture(autouse=True)
def _nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a layer ran")

    monkeypatch.setattr(functional, "run", fail)


@pytest.mark.parametrize(
    ("hx", "error", "text"),
    [
        ((h, h, h), RuntimeError, "lstm expects two hidden states"),
        ((h,), RuntimeError, "lstm expects two hidden states"),
        ([], RuntimeError, "lstm expects two hidden states"),
        (torch.stack([h, h]), TypeError, r"a tuple \(h_0, c_0\) of tensors, got Tensor"),
        ((h, None), TypeError, r"of tensors, got \['Tensor', 'NoneType'\]"),
        ((h, h.double()), RuntimeError, "Input and hidden tensors are not the same dtype"),
        ((h, h.to("meta")), RuntimeError, "Input and hidden tensors are not at the same device"),
    ],
)
def test_states_of_an_lstm(hx: Any, error: type[Exception], text: str) -> None:
    for lstm in (fused_rnn.FusedLSTM(I, H), fused_rnn.FusedLSTM(I, H, backend="eager")):
        with pytest.raises(error, match=text):
            lstm(x, hx)


def test_too_many_states_as_torch() -> None:
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        nn.LSTM(I, H)(x, (h, h, h))


@pytest.mark.parametrize("hx", [(h,), (h, h), [h], 0.0])
@pytest.mark.parametrize("kind", ["tanh", "relu", "gru"])
def test_states_of_the_others(kind: str, hx: Any) -> None:
    _, fused = twins(kind, I, H)
    with pytest.raises(TypeError, match=f"hx should be a tensor, got {type(hx).__name__}"):
        fused(x, hx)


@every_layer
@pytest.mark.parametrize("input", [x.tolist(), x.numpy(), None, "text"], ids=type)
def test_input_that_is_no_tensor(kind: str, input: Any) -> None:
    _, fused = twins(kind, I, H)
    name = type(input).__name__
    with pytest.raises(
        TypeError, match=f"input should be a tensor or a PackedSequence, got {name}"
    ):
        fused(input)


@every_layer
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float16])
def test_input_of_another_type(kind: str, dtype: torch.dtype) -> None:
    plain, fused = twins(kind, I, H)
    for layer in (plain, fused):
        with pytest.raises(ValueError, match=f"RNN input dtype \\({dtype}\\) does not match"):
            layer(x.to(dtype))


def parameters(kind: str) -> list[str]:
    return [n for n, _ in twins(kind, I, H, 2)[1].named_parameters() if n != "weight_ih_l0"]


@pytest.mark.parametrize("kind", ["relu", "gru", "projected"])
def test_parameters_of_mixed_types(kind: str) -> None:
    for name in parameters(kind):
        _, fused = twins(kind, I, H, 2)
        setattr(fused, name, nn.Parameter(getattr(fused, name).double()))
        text = f"but {name} has torch.float64 and weight_ih_l0 torch.float32"
        for packed in (False, True):
            with pytest.raises(RuntimeError, match=text):
                fused(PackedSequence(x[0], torch.tensor([2])) if packed else x)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),  # leaves fp64 alone
            pytest.raises(RuntimeError, match=text),
        ):
            fused(x)


@pytest.mark.parametrize("kind", ["relu", "gru", "projected"])
def test_parameters_of_mixed_devices(kind: str) -> None:
    for name in parameters(kind):
        _, fused = twins(kind, I, H, 2)
        setattr(fused, name, nn.Parameter(getattr(fused, name).to("meta")))
        with pytest.raises(RuntimeError, match=f"{name} is on meta and weight_ih_l0 on cpu"):
            fused(x)


def test_learned_states_of_another_type() -> None:
    fused = fused_rnn.FusedLSTM(I, H, learn_h0=True)
    fused.c_0 = nn.Parameter(fused.c_0.double())
    with pytest.raises(RuntimeError, match=r"but c_0 has torch\.float64"):
        fused(x)


def test_autocast_casts_parameters_of_mixed_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fused = fused_rnn.FusedGRU(I, H)
    fused.bias_hh_l0 = nn.Parameter(fused.bias_hh_l0.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(x)[0].dtype == torch.bfloat16


def int64(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch_sizes", "text"),
    [
        (int64(3, 3, 0), r"positive and never increase, got \[3, 3, 0\]"),
        (int64(4, -1, 3), r"positive and never increase, got \[4, -1, 3\]"),
        (int64(-1), "positive and never increase"),
        (int64(), r"positive and never increase, got \[\]"),
        (int64(2, 4), r"positive and never increase, got \[2, 4\]"),
        (int64(3, 1, 2), "positive and never increase"),
        (int64(3, 2), "batch_sizes stand for 5 rows, but the data has 6"),
        (int64(4, 3), "batch_sizes stand for 7 rows, but the data has 6"),
        (int64(3, 3, 3), "batch_sizes stand for 9 rows, but the data has 6"),
        (
            torch.tensor([3, 3], dtype=torch.int32),
            "1-D int64 tensor on the CPU, got 1-D torch.int32",
        ),
        (torch.tensor([[3, 3]]), "1-D int64 tensor on the CPU, got 2-D torch.int64"),
        (torch.tensor([3.0, 3.0]), "1-D int64 tensor on the CPU, got 1-D torch.float32"),
    ],
)
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_batch_sizes(kind: str, batch_sizes: torch.Tensor, text: str) -> None:
    _, fused = twins(kind, I, H)
    packed = PackedSequence(torch.zeros(6, I), batch_sizes)
    with pytest.raises(RuntimeError, match=text):
        fused(packed)
    with pytest.raises(RuntimeError, match=text):
        fused_rnn.explain(fused, packed)


@pytest.mark.parametrize("which", ["sorted_indices", "unsorted_indices"])
def test_indices_of_packed_input(which: str) -> None:
    indices = {"sorted_indices": int64(0, 1, 2), "unsorted_indices": int64(0, 1, 2)}
    indices[which] = int64(1, 0)
    packed = PackedSequence(torch.zeros(6, I), int64(3, 3), **indices)
    text = rf"{which} should be of size \(3,\), as batch_sizes begin, got \(2,\)"
    with pytest.raises(RuntimeError, match=text):
        fused_rnn.FusedGRU(I, H)(packed)

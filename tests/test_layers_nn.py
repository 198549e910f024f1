"""What torch.nn's layers have beside their documentation, and what code for them reads."""

import inspect
import re
from typing import Any

import pytest
import torch
from helpers import every_layer, twins
from torch import nn

import fused_rnn
from fused_rnn.layers.parameters import OPTIONS

# ---- what torch.nn's layers have beside their documentation --------------------------------------


@every_layer
@pytest.mark.parametrize("kwargs", [{}, {"bias": False, "bidirectional": True, "num_layers": 2}])
def test_lists_of_weights_are_torchs(kind: str, kwargs: dict[str, Any]) -> None:
    plain, fused = twins(kind, 3, 5, **kwargs)
    assert fused._flat_weights_names == plain._flat_weights_names
    assert fused._all_weights == plain._all_weights
    assert [w.shape for w in fused._flat_weights] == [w.shape for w in plain._flat_weights]
    fused.weight_hh_l0 = nn.Parameter(torch.zeros_like(plain.weight_hh_l0))
    assert fused._flat_weights[1] is fused.weight_hh_l0
    assert not any(name.startswith(("_flat", "_all")) for name in vars(fused))


INPUTS: dict[str, tuple[bool, tuple[int, ...], torch.Tensor | None]] = {
    "batched": (False, (4, 2, 3), None),
    "batch_first": (True, (2, 4, 3), None),
    "packed": (False, (5, 3), torch.tensor([2, 2, 1])),
}


@every_layer
@pytest.mark.parametrize("case", INPUTS)
def test_methods_of_sizes_are_torchs(kind: str, case: str) -> None:
    batch_first, size, batch_sizes = INPUTS[case]
    plain, fused = twins(kind, 3, 5, 2, batch_first=batch_first, bidirectional=True)
    x, lstm = torch.randn(size), isinstance(plain, nn.LSTM)
    names = ["get_expected_hidden_size", *["get_expected_cell_size"] * lstm]
    sizes = [getattr(plain, name)(x, batch_sizes) for name in names]
    assert [getattr(fused, name)(x, batch_sizes) for name in names] == sizes
    assert hasattr(fused, "get_expected_cell_size") == lstm
    states = tuple(torch.randn(s) for s in sizes)
    for wrong in range(-1, len(sizes)):
        bad = tuple(s[:, :1] if i == wrong else s for i, s in enumerate(states))
        hidden: Any = bad if lstm else bad[0]
        if wrong < 0:
            fused.check_forward_args(x, hidden, batch_sizes)
            continue
        with pytest.raises(RuntimeError) as expected:
            plain.check_forward_args(x, hidden, batch_sizes)
        with pytest.raises(RuntimeError, match=f"^{re.escape(str(expected.value))}$"):
            fused.check_forward_args(x, hidden, batch_sizes)
    hidden = states if lstm else states[0]
    order = torch.tensor([1, 0])
    torch.testing.assert_close(
        fused.permute_hidden(hidden, order), plain.permute_hidden(hidden, order), rtol=0, atol=0
    )
    assert fused.permute_hidden(hidden, None) is hidden


def test_assigning_the_list_of_weights() -> None:
    """As code for torch.nn's layers does; it can be no more than what the attributes say."""
    layer = fused_rnn.FusedLSTM(3, 5, proj_size=2)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    layer._flat_weights = weights
    assert all(a is b for a, b in zip(layer._flat_weights, weights, strict=True))
    for others in (weights[:-1], [torch.zeros_like(weights[0]), *weights[1:]]):
        with pytest.raises(ValueError, match=r"assign to those, as in layer.weight_ih_l0 ="):
            layer._flat_weights = others


CLASSES = (fused_rnn.FusedRNN, fused_rnn.FusedGRU, fused_rnn.FusedLSTM)


@pytest.mark.parametrize("cls", CLASSES)
def test_constructors_take_what_torchs_take_in_its_order(cls: type) -> None:
    theirs = list(inspect.signature(nn.RNNBase.__init__).parameters)[2:]  # without self and mode
    if cls is fused_rnn.FusedRNN:
        theirs.insert(3, "nonlinearity")
    ours = inspect.signature(cls).parameters.values()
    assert [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD] == theirs
    assert {p.name for p in ours if p.kind is p.KEYWORD_ONLY} == {"backend", *OPTIONS}


@pytest.mark.parametrize("cls", CLASSES)
def test_a_docstring_tells_of_every_argument(cls: Any) -> None:
    for function, text in ((cls, cls.__doc__), (cls.forward, cls.forward.__doc__)):
        for name in inspect.signature(function).parameters:
            assert name == "self" or f"        {name}: " in text, f"{cls.__name__}: {name}"

"""Zoneout, recurrent dropout, clipping and c of all steps: against loops over torch.nn's cells."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_close, assert_same
from options_helpers import LENGTHS, B, H, I, T, call, make_inputs, results
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import FusedGRU, FusedLSTM, FusedRNN
from fused_rnn.spec import options
from fused_rnn.spec.layer import OptionTensors

# ---- zoneout, dropout, clipping: against loops over torch.nn's cells ----------------------------


def loop(
    layer: Any, inputs: tuple[Tensor, ...], masks: OptionTensors, p: float, clip: float | None
):
    """The layer, one direction, by torch.nn's cells; returns outputs, h, (c) and all c."""
    kind = layer.mode
    cell: Any = {
        "RNN_TANH": torch.rnn_tanh_cell,
        "RNN_RELU": torch.rnn_relu_cell,
        "GRU": torch.gru_cell,
        "LSTM": torch.lstm_cell,
    }[kind]
    w = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
    x, *states = inputs
    states = [s[0] for s in states]
    zones = [None if z is None else z.view(T, B, H) for z in (masks.zone_h, masks.zone_c)]
    outputs, cells = [], []
    for t in range(T):
        if clip is not None:
            for i, s in enumerate(states):
                states[i] = s.view_as(s)
                states[i].register_hook(lambda g: g.clamp(-clip, clip))
        h = states[0]
        if masks.drop is None:
            new = cell(x[t], tuple(states) if len(states) == 2 else h, *w)
        else:  # h in the product, and outside of it
            dropped = h * masks.drop[0]
            new = cell(x[t], (dropped, states[1]) if len(states) == 2 else dropped, *w)
            if kind == "GRU":
                gx, gh = x[t] @ w[0].T + w[2], dropped @ w[1].T + w[3]
                z = torch.sigmoid(gx[:, H : 2 * H] + gh[:, H : 2 * H])
                new = new + z * (h - dropped)
        found = list(new) if len(states) == 2 else [new]
        for i, (old, value) in enumerate(zip(states, found, strict=True)):
            zone = zones[i]
            if zone is not None:
                found[i] = torch.where(zone[t], old, value)
            elif p:
                found[i] = p * old + (1 - p) * value
        states = found
        outputs.append(states[0])
        cells.append(states[-1])
    return [torch.stack(outputs), *(s[None] for s in states)], torch.stack(cells)


KEYWORDS = {
    "zoneout": {"zoneout": 0.3},
    "dropout": {"recurrent_dropout": 0.4},
    "clip": {"clip_recurrent_grad": 0.05},
    "all": {"zoneout": 0.3, "recurrent_dropout": 0.4, "clip_recurrent_grad": 0.05},
}
LAYERS = {
    "tanh": (FusedRNN, {}),
    "relu": (FusedRNN, {"nonlinearity": "relu"}),
    "gru": (FusedGRU, {}),
    "lstm": (FusedLSTM, {}),
}


def draw(layer: Any, inputs: tuple[Tensor, ...], seed: int = 5) -> OptionTensors:
    """The masks that a call after ``torch.manual_seed(seed)`` draws."""
    torch.manual_seed(seed)
    x, h0, *c0 = inputs
    asked = options.CallOptions(
        zoneout=layer.zoneout,
        recurrent_dropout=layer.recurrent_dropout,
        clip_recurrent_grad=layer.clip_recurrent_grad,
        training=layer.training,
    )
    return options.settle(asked, layer._cell, x, h0, c0[0] if c0 else None)[1]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("what", KEYWORDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_zoneout_dropout_and_clipping(kind: str, what: str, training: bool, backend: Any) -> None:
    cls, extra = LAYERS[kind]
    layer = cls(I, H, dtype=torch.float64, backend=backend, **extra, **KEYWORDS[what])
    layer.train(training)
    inputs = make_inputs(layer)
    masks = draw(layer, inputs)
    if training:
        assert (masks.zone_h is not None) == (layer.zoneout > 0)
        assert (masks.drop is not None) == (layer.recurrent_dropout > 0)
    p = 0.0 if training else layer.zoneout
    expected, _ = loop(layer, inputs, masks, p, layer.clip_recurrent_grad)
    torch.manual_seed(5)
    found = call(layer, inputs)
    assert_same(results(layer, found, inputs), results(layer, expected, inputs))


def test_masks_have_the_probabilities() -> None:
    layer = FusedLSTM(4, 100, zoneout=0.2, recurrent_dropout=0.3)
    inputs = torch.zeros(50, 20, 4), torch.zeros(1, 20, 100), torch.zeros(1, 20, 100)
    masks = draw(layer, inputs)
    assert masks.zone_h is not None
    assert masks.zone_c is not None
    assert masks.drop is not None
    for zone in (masks.zone_h, masks.zone_c):
        assert zone.double().mean() == pytest.approx(0.2, abs=0.01)
    assert not torch.equal(masks.zone_h, masks.zone_c)
    assert masks.drop.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert masks.drop.double().mean() == pytest.approx(1.0, abs=0.03)


def test_clipping_costs_nothing_without_gradients() -> None:
    layer = FusedLSTM(I, H, clip_recurrent_grad=1.0)
    with torch.no_grad():
        assert draw(layer, make_inputs(layer)) == OptionTensors()
        assert "options" not in str(fused_rnn.explain(layer, torch.randn(T, B, I)))
    assert "options" in str(fused_rnn.explain(layer, torch.randn(T, B, I)))


def test_a_generator_decides_the_masks() -> None:
    layer = FusedGRU(I, H, zoneout=0.5, recurrent_dropout=0.5)
    x = torch.randn(T, B, I)
    torch.manual_seed(1)
    first = layer(x)[0]
    assert not torch.equal(layer(x)[0], first)
    torch.manual_seed(1)
    assert torch.equal(layer(x)[0], first)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])

    from fused_rnn.ops.functional import rnn_layer
    from fused_rnn.spec.batch import BatchLayout

    def functional(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        h0, weights = torch.zeros(1, B, H), layer._weights()[0]
        rows = x.flatten(0, 1)
        return rnn_layer(
            layer._cell,
            rows,
            h0,
            None,
            weights,
            BatchLayout(T, B),
            options=options.CallOptions(zoneout=0.5, generator=generator),
        ).out

    assert torch.equal(functional(3), functional(3))
    assert not torch.equal(functional(3), functional(4))


# ---- c of all steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_cell_sequence(backend: Any, proj_size: int) -> None:
    layer = FusedLSTM(I, H, 2, backend=backend, proj_size=proj_size, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    output, final, cells = layer(x, return_cell_sequence=True)
    assert cells.shape == (T, B, H)
    plain = layer(x)
    assert len(plain) == 2
    assert_close(output, plain[0], "output")
    assert_close(cells[-1], final[1][-1], "c_n")
    wanted = torch.stack([layer(x[: t + 1])[1][1][-1] for t in range(T)])
    assert_close(cells, wanted, "cells")
    weight = torch.randn_like(cells)
    mine, theirs = (torch.autograd.grad((c * weight).sum(), x)[0] for c in (cells, wanted))
    assert_close(mine, theirs, "gradient")


def test_cell_sequence_of_every_kind_of_input() -> None:
    layer = FusedLSTM(I, H, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(B, T, I), torch.tensor(LENGTHS)
    output, _, cells = layer(x, lengths=lengths, return_cell_sequence=True)
    assert cells.shape == (B, T, 2 * H)
    for b, n in enumerate(LENGTHS):
        assert not cells[b, n:].any()
        assert not output[b, n:].any()
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    _, _, packed_cells = layer(packed, return_cell_sequence=True)
    assert isinstance(packed_cells, PackedSequence)
    expected = pack_padded_sequence(cells, lengths, batch_first=True, enforce_sorted=False)
    assert_close(packed_cells.data, expected.data, "cells")
    assert layer(x[0], return_cell_sequence=True)[2].shape == (T, 2 * H)

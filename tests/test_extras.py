"""What torch.nn's layers lack, in the eager loop and on the CPU.

Lengths and resets are held against torch.nn, on each stretch of each sequence by itself; the others
against a loop over torch.nn's cells.
"""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_close, assert_same, every_backend, every_layer, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import FusedGRU, FusedLSTM, FusedRNN, extras, unfuse
from fused_rnn.problem import Masks

T, B, I, H = 6, 5, 3, 4
LENGTHS = [6, 2, 5, 1, 6]
both_directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])


def random_reset() -> Tensor:
    reset = torch.rand(T, B) < 0.4
    reset[0, 0], reset[0, 1] = True, False
    return reset


def stretches(reset: Tensor | None, length: int, b: int) -> list[tuple[int, int]]:
    """First and last step, exclusive, of what a sequence falls into."""
    cuts = [] if reset is None else [t for t in range(length) if reset[t, b]]
    ends = sorted({0, *cuts, length})
    return list(itertools.pairwise(ends))


def by_stretches(
    plain: nn.Module, x: Tensor, hx: tuple[Tensor, ...], lengths: list[int], reset: Tensor | None
) -> list[Tensor]:
    """``plain`` on every stretch: outputs with zeros behind them, and the final states.

    ``hx`` [D, B, .] is where the first stretch begins, in reverse where the last one does, as long
    as no reset comes before it.
    """
    D = 2 if plain.bidirectional else 1
    width = plain.proj_size or plain.hidden_size
    outputs = []
    finals: list[list[list[Tensor]]] = [[[], []] for _ in hx]
    for b, length in enumerate(lengths):
        parts = []
        found = stretches(reset, length, b)
        for k, (first, last) in enumerate(found):
            begins = [reset is None or (k == 0 and not reset[0, b]), k == len(found) - 1]
            state = [torch.stack([s[d, b] * begins[d] for d in range(D)]).unsqueeze(1) for s in hx]
            out, final = plain(x[first:last, b : b + 1], tuple(state) if len(hx) == 2 else state[0])
            parts.append(out[:, 0])
            for kept, s in zip(finals, final if len(hx) == 2 else (final,), strict=True):
                if k == len(found) - 1:
                    kept[0].append(s[0, 0])
                if k == 0 and D == 2:
                    kept[1].append(s[1, 0])
        parts.append(x.new_zeros(T - length, D * width))
        outputs.append(torch.cat(parts))
    states = [torch.stack([torch.stack(kept[d]) for d in range(D)]) for kept in finals]
    return [torch.stack(outputs, 1), *states]


def results(layer: nn.Module, found: list[Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed linear loss."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in found]
    loss = sum((o.double() * w).sum() for o, w in zip(found, weights, strict=True))
    assert isinstance(loss, Tensor)
    names = [f"input {i}" for i in range(len(inputs))] + [n for n, _ in layer.named_parameters()]
    grads = torch.autograd.grad(loss, [*inputs, *layer.parameters()])
    named = {f"output {i}": o for i, o in enumerate(found)}
    return named | {f"grad {n}": g for n, g in zip(names, grads, strict=True)}


def make_inputs(layer: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    D, widths = 2 if layer.bidirectional else 1, [layer.proj_size or layer.hidden_size]
    if "LSTM" in type(layer).__name__:
        widths.append(layer.hidden_size)
    shapes = [(T, B, I), *((D, B, w) for w in widths)]
    return tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)


def call(layer: nn.Module, inputs: tuple[Tensor, ...], **keywords: Any) -> list[Tensor]:
    x, *hx = inputs
    output, final, *more = layer(x, tuple(hx) if len(hx) == 2 else hx[0], **keywords)
    return [output, *(final if isinstance(final, tuple) else (final,)), *more]


# ---- lengths and resets -------------------------------------------------------------------------


@every_layer
@every_backend
@both_directions
@pytest.mark.parametrize("what", ["lengths", "reset", "both"])
def test_lengths_and_resets(kind: str, backend: Any, bidirectional: bool, what: str) -> None:
    plain, fused = twins(
        kind, I, H, backend=backend, bidirectional=bidirectional, dtype=torch.float64
    )
    inputs = make_inputs(plain)
    reset = None if what == "lengths" else random_reset()
    lengths = [T] * B if what == "reset" else LENGTHS
    keywords: dict[str, Any] = {} if reset is None else {"reset": reset}
    if what != "reset":
        keywords["lengths"] = torch.tensor(lengths)
    expected = by_stretches(plain, *split(inputs), lengths, reset)
    assert_same(
        results(fused, call(fused, inputs, **keywords), inputs), results(plain, expected, inputs)
    )


def split(inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    return inputs[0], inputs[1:]


@every_layer
def test_length_of_zero(kind: str) -> None:
    """The final state is the initial one, and nothing is put out."""
    _, fused = twins(kind, I, H, dtype=torch.float64, bidirectional=True)
    inputs = make_inputs(fused)
    found = call(fused, inputs, lengths=torch.tensor([0, 6, 0, 3, 1]))
    assert not found[0][:, ::2][:, :2].any()
    for final, initial in zip(found[1:], inputs[1:], strict=True):
        assert torch.equal(final[:, [0, 2]], initial[:, [0, 2]])


def test_lengths_need_not_be_sorted_nor_64_bit() -> None:
    layer = FusedLSTM(I, H, batch_first=True)
    x = torch.randn(B, T, I)
    expected = layer(x, lengths=torch.tensor(LENGTHS))
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    _, (h_n, c_n) = layer(packed)
    found = layer(x, lengths=torch.tensor(LENGTHS, dtype=torch.int32))
    for ours, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(ours, theirs)
    assert_close(found[1][0], h_n, "h_n")
    assert_close(found[1][1], c_n, "c_n")


def test_padding_is_never_looked_at() -> None:
    """NaN behind a sequence's end reaches neither outputs nor gradients."""
    layer = FusedGRU(I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    for b, n in enumerate(LENGTHS):
        x[n:, b] = torch.nan
    x.requires_grad_()
    output, h_n = layer(x, lengths=torch.tensor(LENGTHS))
    (output.sum() + h_n.sum()).backward()
    assert output.isfinite().all()
    assert h_n.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_reset_of_packed_and_batch_first_input() -> None:
    layer, reset = FusedGRU(I, H, bidirectional=True, dtype=torch.float64), random_reset()
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor(LENGTHS)
    output, h_n = layer(x, lengths=lengths, reset=reset)
    pack = {"lengths": lengths, "enforce_sorted": False}
    packed, packed_h = layer(
        pack_padded_sequence(x, **pack), reset=pack_padded_sequence(reset, **pack)
    )
    assert_close(packed.data, pack_padded_sequence(output, **pack).data, "output")
    assert_close(packed_h, h_n, "h_n")
    layer.batch_first = True
    first, first_h = layer(x.transpose(0, 1), lengths=lengths, reset=reset.transpose(0, 1))
    assert_close(first.transpose(0, 1), output, "output")
    assert_close(first_h, h_n, "h_n")
    layer.batch_first = False
    alone, alone_h = layer(x[:, 0], reset=reset[:, 0])
    assert_close(alone, output[:, 0], "output")
    assert_close(alone_h, h_n[:, 0], "h_n")


@every_layer
def test_rollout_in_pieces(kind: str) -> None:
    """Reinforcement learning: two calls with the state carried over are one long call."""
    _, layer = twins(kind, I, H, dtype=torch.float64)
    x, reset = torch.randn(T, B, I, dtype=torch.float64), random_reset()
    output, final = layer(x, reset=reset)
    first, state = layer(x[:2], reset=reset[:2])
    second, last = layer(x[2:], state, reset=reset[2:])
    assert_close(torch.cat([first, second]), output, "output")
    for a, b in zip(last, final, strict=True):
        assert_close(a, b, "state")


# ---- learned initial states ---------------------------------------------------------------------


@every_layer
@both_directions
def test_learned_states(kind: str, bidirectional: bool) -> None:
    cls, extra = type(twins(kind, I, H)[1]), {"proj_size": 1} if kind == "projected" else {}
    layer = cls(I, H, 2, bidirectional=bidirectional, learn_h0=True, dtype=torch.float64, **extra)
    names = ["h_0", "c_0"] if "LSTM" in cls.__name__ else ["h_0"]
    assert not any(getattr(layer, name).any() for name in names), "zero at first, as torch.nn's"
    for name in names:
        nn.init.normal_(getattr(layer, name))
    x = torch.randn(T, B, I, dtype=torch.float64)
    explicit = [getattr(layer, n).detach().unsqueeze(1).repeat(1, B, 1) for n in names]
    hx = [h.requires_grad_() for h in explicit]
    output, _ = layer(x)
    expected, _ = layer(x, tuple(hx) if len(hx) == 2 else hx[0])
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.square().sum(), [getattr(layer, n) for n in names])
    wanted = torch.autograd.grad(expected.square().sum(), hx)
    for name, grad, want in zip(names, grads, wanted, strict=True):
        assert_close(grad, want.sum(1), name)
    again = cls(I, H, 2, bidirectional=bidirectional, learn_h0=True, dtype=torch.float64, **extra)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[0], output)


def test_resets_begin_with_the_learned_state() -> None:
    layer = FusedLSTM(I, H, learn_h0=True, bidirectional=True, dtype=torch.float64)
    nn.init.normal_(layer.h_0)
    nn.init.normal_(layer.c_0)
    x = torch.randn(T, 1, I, dtype=torch.float64)
    reset = torch.tensor([False, False, True, False, True, True])[:, None]
    pieces = [layer(x[a:b])[0] for a, b in ((0, 2), (2, 4), (4, 5), (5, 6))]
    whole = layer(x, reset=reset)[0]
    assert_close(whole, torch.cat(pieces), "output")
    found, wanted = (
        torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        for y in (whole, torch.cat(pieces))
    )
    for (name, _), a, b in zip(layer.named_parameters(), found, wanted, strict=True):
        assert_close(a, b, name)


def test_learned_states_are_read_once() -> None:
    """A parametrization computes them, and may draw random numbers."""
    layer, reads = FusedLSTM(I, H, learn_h0=True), []

    class Count(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            reads.append(state)
            return state

    nn.utils.parametrize.register_parametrization(layer, "h_0", Count())
    reads.clear()
    layer(torch.randn(T, B, I), reset=random_reset())
    assert len(reads) == 1


# ---- zoneout, dropout, clipping: against loops over torch.nn's cells ----------------------------


def loop(layer: Any, inputs: tuple[Tensor, ...], masks: Masks, p: float, clip: float | None):
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


def draw(layer: Any, inputs: tuple[Tensor, ...], seed: int = 5) -> Masks:
    """The masks that a call after ``torch.manual_seed(seed)`` draws."""
    torch.manual_seed(seed)
    x, h0, *c0 = inputs
    found = extras.prepare(
        layer._cell,
        x,
        h0,
        c0[0] if c0 else None,
        lengths=None,
        reset=None,
        restart=None,
        zoneout=layer.zoneout,
        recurrent_dropout=layer.recurrent_dropout,
        clip_recurrent_grad=layer.clip_recurrent_grad,
        return_cell_sequence=False,
        training=layer.training,
        generator=None,
    )
    return Masks() if found is None else found[1]


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
        assert draw(layer, make_inputs(layer)) == Masks()
        assert "extras" not in str(fused_rnn.explain(layer, torch.randn(T, B, I)))
    assert "extras" in str(fused_rnn.explain(layer, torch.randn(T, B, I)))


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

    from fused_rnn.functional import rnn_layer
    from fused_rnn.rows import Rows

    def functional(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        h0, weights = torch.zeros(1, B, H), layer._weights()[0]
        rows = x.flatten(0, 1)
        return rnn_layer(
            layer._cell, rows, h0, None, weights, Rows(T, B), zoneout=0.5, generator=generator
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


# ---- with the rest of PyTorch -------------------------------------------------------------------

ALL: dict[str, Any] = {
    "zoneout": 0.3,
    "recurrent_dropout": 0.4,
    "learn_h0": True,
    "clip_recurrent_grad": 0.5,
}


def everything(reset: Tensor) -> dict[str, Any]:
    return {"lengths": torch.tensor(LENGTHS), "reset": reset}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k == "relu" else []) for k in LAYERS]
)
def test_double_backward(kind: str) -> None:
    cls, extra = LAYERS[kind]
    layer = cls(I, 2, dtype=torch.float64, **extra, **ALL | {"clip_recurrent_grad": 1e3})
    reset, x = random_reset(), torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        output: Tensor = layer(x, **everything(reset))[0]
        return output

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_compile(kind: str) -> None:
    """One graph, whatever T and B; masks are drawn in it."""
    cls, extra = LAYERS[kind]
    layer = cls(I, H, bidirectional=True, **extra, **ALL)
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    keywords: dict[str, Any] = {"return_cell_sequence": True} if kind == "lstm" else {}
    for steps in (T, T - 1, T - 2):
        x = torch.randn(steps, B, I)
        keywords |= {"reset": torch.rand(steps, B) < 0.4, "lengths": torch.tensor([1, 2, 3, 4, 2])}
        found = []
        for function in (layer, compiled):
            torch.manual_seed(2)
            output, _, *more = function(x, **keywords)
            loss = output.square().sum() + sum(m.square().sum() for m in more)
            grads = torch.autograd.grad(loss, list(layer.parameters()))
            found.append([output, *more, *grads])
        for a, b in zip(*found, strict=True):
            assert_close(b, a, "compiled")
    assert count.frame_count == 1


def test_compile_of_packed_input() -> None:
    layer = FusedLSTM(I, H, zoneout=0.3)
    lengths, reset = torch.tensor(sorted(LENGTHS)[::-1]), random_reset()
    packed = pack_padded_sequence(torch.randn(T, B, I), lengths)
    again = pack_padded_sequence(reset, lengths)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for function in (layer, compiled):
        torch.manual_seed(2)
        found.append(function(packed, reset=again, return_cell_sequence=True))
    for i in (0, 2):
        assert_close(found[1][i].data, found[0][i].data, "compiled")


@pytest.mark.filterwarnings("ignore:`torch.jit")  # what jvp itself warns of
def test_torch_func() -> None:
    """vmap over sequences, gradients of each, forward mode."""
    layer = FusedGRU(I, H, zoneout=0.3, clip_recurrent_grad=1.0, dtype=torch.float64).eval()
    x, reset = torch.randn(T, B, I, dtype=torch.float64), random_reset()
    expected = layer(x, reset=reset)[0]
    one = lambda x, r: layer(x, reset=r)[0]  # noqa: E731
    assert_close(torch.vmap(one, in_dims=1, out_dims=1)(x, reset), expected, "vmap")
    loss = lambda x, r: one(x, r).square().sum()  # noqa: E731
    each = torch.vmap(torch.func.grad(loss), in_dims=(1, 1), out_dims=1)(x, reset)
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer(y, reset=reset)[0].square().sum(), y)
    assert_close(each, grad, "vmap of grad")
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(lambda x: layer(x, reset=reset)[0], (x,), (tangent,))
    step = 1e-6
    difference = (
        layer(x + step * tangent, reset=reset)[0] - layer(x - step * tangent, reset=reset)[0]
    )
    assert (found - difference / (2 * step)).abs().max() < 1e-7


def test_vmap_with_masks_of_its_own_or_shared() -> None:
    layer = FusedGRU(I, H, zoneout=0.5, recurrent_dropout=0.5)
    x = torch.randn(T, 1, I).expand(T, B, I)
    one = lambda x: layer(x)[0]  # noqa: E731
    same, different = (torch.vmap(one, in_dims=1, randomness=r)(x) for r in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(kind: str) -> None:
    cls, extra = LAYERS[kind]
    layer = cls(I, H, **extra, **ALL)
    x, reset = torch.randn(T, B, I), random_reset()
    torch.manual_seed(4)
    expected = layer(x, **everything(reset))[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(4)
        found = layer(x, **everything(reset))[0]
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_explain_copy_and_unfuse() -> None:
    layer = FusedLSTM(I, H, **ALL)
    assert "zoneout=0.3" in repr(layer)
    assert "learn_h0=True" in repr(layer)
    assert "zoneout" not in repr(FusedLSTM(I, H))
    assert "extras" in str(fused_rnn.explain(layer, torch.randn(T, B, I)))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.eval().zoneout == 0.3
        layer.eval()
        x = torch.randn(T, B, I)
        assert torch.equal(twin(x)[0], layer(x)[0])
    with pytest.raises(ValueError, match="layers have no zoneout, recurrent_dropout"):
        unfuse(layer)
    old = FusedLSTM(I, H)
    state = old.__getstate__() if hasattr(old, "__getstate__") else old.__dict__
    state = {k: v for k, v in dict(state).items() if k not in ("zoneout", "learn_h0")}
    restored = FusedLSTM.__new__(FusedLSTM)
    restored.__setstate__(state)
    assert restored.zoneout == 0.0
    assert restored(torch.randn(T, B, I))[0].shape == (T, B, H)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"zoneout": 1.0}, ValueError, r"zoneout should be a number in range \[0, 1\), got 1.0"),
        ({"zoneout": "a"}, TypeError, "zoneout should be a number, got: str"),
        ({"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout should be a number in range"),
        ({"learn_h0": 1}, TypeError, "learn_h0 should be of type bool, got: int"),
        ({"clip_recurrent_grad": 0}, ValueError, "should be greater than zero, got 0"),
        ({"clip_recurrent_grad": True}, TypeError, "should be a number or None, got: bool"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FusedLSTM(I, H, **keywords)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"lengths": [1, 2]}, TypeError, "lengths should be a tensor of int64 or int32, got list"),
        ({"lengths": torch.ones(B)}, TypeError, "got torch.float32"),
        (
            {"lengths": torch.ones(3, dtype=torch.int64)},
            RuntimeError,
            r"Expected lengths of size \(5,\), got \(3,\)",
        ),
        ({"lengths": torch.full((B,), 7)}, ValueError, "lengths should be from 0 to 6, got 7 to 7"),
        ({"lengths": torch.full((B,), -1)}, ValueError, "from 0 to 6, got -1 to -1"),
        ({"reset": torch.zeros(T, B)}, TypeError, "reset should be a tensor of bool"),
        (
            {"reset": torch.zeros(B, T, dtype=torch.bool)},
            RuntimeError,
            r"Expected reset of size \(6, 5\), got \(5, 6\)",
        ),
        ({"reset": [True]}, TypeError, "reset should be a bool tensor, as input, got list"),
    ],
)
def test_bad_inputs(keywords: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FusedGRU(I, H)(torch.randn(T, B, I), **keywords)


def test_bad_inputs_of_other_kinds() -> None:
    layer, x = FusedLSTM(I, H), torch.randn(T, B, I)
    packed = pack_padded_sequence(x, torch.tensor(sorted(LENGTHS)[::-1]))
    with pytest.raises(ValueError, match="lengths: only for padded input"):
        layer(packed, lengths=torch.tensor(LENGTHS))
    with pytest.raises(ValueError, match="lengths: only for batched input"):
        layer(x[:, 0], lengths=torch.tensor(3))
    with pytest.raises(TypeError, match="reset should be packed as the input is, got Tensor"):
        layer(packed, reset=random_reset())
    other = pack_padded_sequence(random_reset(), torch.tensor([6, 6, 6, 6, 6]))
    with pytest.raises(RuntimeError, match="Expected reset with batch_sizes"):
        layer(packed, reset=other)
    lengths = torch.tensor([2, 4, 3])
    mixed = pack_padded_sequence(torch.randn(4, 3, I), lengths, enforce_sorted=False)
    order = pack_padded_sequence(random_reset()[:4, :3], lengths.sort(descending=True)[0])
    again = pack_padded_sequence(
        random_reset()[:4, :3], lengths.sort(descending=True)[0], enforce_sorted=False
    )
    for wrong in (order, again):
        with pytest.raises(RuntimeError, match="sequences sorted as those of the input"):
            layer(mixed, reset=wrong)
    layer.batch_first = True
    with pytest.raises(RuntimeError, match=r"Expected reset of size \(6, 5\), got \(5, 6\)"):
        layer(torch.randn(6, 5, I), reset=torch.zeros(5, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="return_cell_sequence"):
        FusedGRU(I, H)(x, return_cell_sequence=True)


@pytest.mark.parametrize("cls", [FusedGRU, FusedLSTM])
@pytest.mark.parametrize("learn_h0", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_resets_of_a_single_step(cls: Any, learn_h0: bool, bidirectional: bool) -> None:
    """An agent's step, in which some environments have begun anew: only states are chosen."""
    options = {"learn_h0": learn_h0, "bidirectional": bidirectional, "dtype": torch.float64}
    layer = cls(I, H, 2, **options)
    loop = cls(I, H, 2, **options, backend="eager")
    loop.load_state_dict(layer.state_dict())
    if learn_h0:
        for twin in (layer, loop):
            nn.init.constant_(twin.h_0, 0.3)
    x = torch.randn(1, 3, I, dtype=torch.float64)
    state = torch.randn(2 * (1 + bidirectional), 3, H, dtype=torch.float64)
    hx = (state, state) if cls is FusedLSTM else state
    results = []
    for twin in (layer, loop):
        given = x.clone().requires_grad_()
        output, _ = twin(given, hx, reset=torch.tensor([[False, True, False]]))
        wanted = [given, *twin.parameters()]
        grads = torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)
        results.append([output, *(g for g in grads if g is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)

"""Lengths, resets and learned states: against torch.nn's layers on every segment."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_close, assert_same, every_backend, every_layer, twins
from options_helpers import (
    LENGTHS,
    B,
    H,
    I,
    T,
    both_directions,
    by_segments,
    call,
    make_inputs,
    random_reset,
    results,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fused_rnn import FusedGRU, FusedLSTM

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
    expected = by_segments(plain, *split(inputs), lengths, reset)
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


# ---- a single step ------------------------------------------------------------------------------


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

"""Stacks whose layers overlap: the same as layer by layer, in whatever order streams allow."""

from typing import Any
from unittest import mock

import pytest
import torch
from helpers import LAYERS, assert_close, assert_same, packer, run, sequences, states, twins
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from wavefront_helpers import overlapping

from fused_rnn import FusedGRU, FusedLSTM, FusedRecurrent, explain
from fused_rnn.cells import peephole_lstm
from fused_rnn.kernels import launch, pieces

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is not switched on"
)


def stack_of(kind: str, layers: int = 3, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    return twins(kind, 3, 8, backend="triton", num_layers=layers, **kwargs)


# ---- numbers, on a CPU ------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("kind", "packed", "hx"),
    [
        ("tanh", False, True),
        ("relu", True, False),
        ("gru", False, False),
        ("gru", True, True),
        ("lstm", False, True),
        ("lstm", True, False),
    ],
)
def test_as_torch_nn(kind: str, packed: bool, hx: bool) -> None:
    exact, fused = stack_of(kind)
    exact = exact.double()
    if packed:
        xs, make = sequences([5, 3, 1, 4], 3, torch.float32), packer(False)
    else:
        xs, make = [torch.randn(5, 4, 3)], lambda xs: xs[0]
    initial = states(fused, 4) if hx else None
    wide = None if initial is None else [h.double() for h in initial]
    expected = run(exact, [x.double() for x in xs], wide, make)
    with overlapping(steps=2) as cut:
        found = run(fused, xs, initial, make)
        with torch.no_grad():
            again = run(fused, xs, initial, make, gradients=False)
    assert_same(found, expected, torch.float32)
    assert all(torch.equal(found[name], value) for name, value in again.items())
    assert cut == [3, 3]


@interpreted
@pytest.mark.parametrize(("kind", "dtype"), [("gru", torch.float16), ("lstm", torch.float32)])
def test_the_order_of_streams_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    _, fused = stack_of(kind, dtype=dtype)
    x, initial = torch.randn(5, 2, 3, dtype=dtype), states(fused, 2)
    first: dict[str, Tensor] = {}
    for seed in range(2):
        with overlapping(steps=2, seed=seed):
            found = run(fused, [x], initial)
        first = first or found
        assert all(torch.equal(found[name], value) for name, value in first.items())


@interpreted
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_draws_what_it_draws_layer_by_layer(p: float) -> None:
    _, fused = stack_of("gru", dropout=p)
    x = torch.randn(3, 2, 3)
    torch.manual_seed(3)
    expected = run(fused, [x], None)
    evaluated = run(fused.eval(), [x], None)
    torch.manual_seed(3)
    with overlapping(steps=2) as cut:
        assert_same(run(fused.train(), [x], None), expected, torch.float32)
        assert_same(run(fused.eval(), [x], None), evaluated, torch.float32)
    assert cut == [3, 3]


@interpreted
def test_a_cell_with_parameters_of_its_own() -> None:
    layer = FusedRecurrent(peephole_lstm, 3, 8, num_layers=2, backend="triton")
    x = torch.randn(5, 4, 3)
    expected = run(layer, [x], None)
    with overlapping(steps=2) as cut:
        assert_same(run(layer, [x], None), expected, torch.float32)
    assert cut


OPTIONS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("tanh", {"zoneout": 0.3}, ("lengths", "reset")),
    ("relu", {}, ("lengths",)),
    ("gru", {"learn_h0": True}, ("reset",)),
    ("gru", {"zoneout": 0.3}, ()),
    ("lstm", {"learn_h0": True}, ("lengths", "reset")),
    ("lstm", {"clip_recurrent_grad": 0.05}, ("reset",)),
]


@interpreted
@pytest.mark.parametrize(("kind", "how", "names"), OPTIONS)
def test_options(kind: str, how: dict[str, Any], names: tuple[str, ...]) -> None:
    """Memory is NaN until it is written: so no sweep or product reads beyond a length."""
    _, ours, extra = LAYERS[kind]
    fused, exact = [
        ours(3, 8, num_layers=3, **extra, **how, backend=b) for b in ("triton", "eager")
    ]
    exact.load_state_dict(fused.state_dict())
    fused, exact = fused.eval(), exact.double().eval()
    x = torch.randn(5, 4, 3)
    given = {"lengths": torch.tensor([5, 2, 0, 3]), "reset": torch.rand(5, 4) < 0.4}
    call = {name: given[name] for name in names}
    expected = run(exact, [x.double()], None, **call)
    with overlapping(steps=2) as cut:
        found = run(fused, [x], None, **call)
        with torch.no_grad():
            again = run(fused, [x], None, gradients=False, **call)
    assert cut == [3, 3]
    assert_same(found, expected, torch.float32)
    assert all(torch.equal(found[name], value) for name, value in again.items())


@interpreted
def test_nothing_but_the_restart_state_is_trained() -> None:
    layer = FusedGRU(3, 8, num_layers=2, backend="triton", learn_h0=True)
    for name, p in layer.named_parameters():
        p.requires_grad_(name == "h_0")
    x, h, reset = torch.randn(5, 4, 3), torch.randn(2, 4, 8), torch.rand(5, 4) < 0.4
    with overlapping(steps=2) as cut:
        (found,) = torch.autograd.grad(layer(x, h, reset=reset)[0].sum(), layer.h_0)
    assert cut == [2]
    (expected,) = torch.autograd.grad(layer(x, h, reset=reset)[0].sum(), layer.h_0)
    assert_close(found, expected.double(), "h_0", torch.float32)


@interpreted
@pytest.mark.parametrize("frozen", [1, 2])
def test_layers_that_need_no_gradient(frozen: int) -> None:
    exact, fused = stack_of("gru")
    for layer in exact.double(), fused:
        for name, p in layer.named_parameters():
            p.requires_grad_(int(name[-1]) >= frozen)
    x = torch.randn(5, 4, 3)
    exact(x.double())[0].sum().backward()
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with overlapping(steps=2) as cut, hooks:
        fused(x)[0].sum().backward()
    assert cut
    assert sum(t.shape == (20, 32) for t in kept) == 3 - frozen  # gates
    for (name, p), q in zip(exact.named_parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert_close(q.grad, p.grad, name, torch.float32)


@interpreted
def test_gradients_of_a_final_state_alone_and_backward_twice() -> None:
    exact, fused = stack_of("lstm")
    x = torch.randn(5, 4, 3, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(exact.double()(wide)[1][0].square().sum(), wide)
    with overlapping(steps=2):
        loss = fused(x)[1][0].square().sum()
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
        (again,) = torch.autograd.grad(loss, x)
    assert_close(found, expected, "dx", torch.float32)
    assert torch.equal(found, again)


@interpreted
def test_second_derivatives() -> None:
    exact, fused = stack_of("gru", layers=2, dropout=0.5)
    exact = exact.double().eval()
    x = torch.randn(4, 2, 3)

    def penalty(layer: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), tuple(layer.parameters())))

    expected = penalty(exact, x.double())
    with overlapping(steps=2) as cut:
        found = penalty(fused.eval(), x)
        torch.manual_seed(1)
        dropped = penalty(fused.train(), x)
    torch.manual_seed(1)
    assert cut
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two, "second derivative", torch.float32, growth=4)
    for one, two in zip(dropped, penalty(fused, x), strict=True):
        assert_close(one, two, "second derivative with dropout", torch.float32, growth=4)


@interpreted
def test_autocast() -> None:
    _, fused = stack_of("lstm")
    x = torch.randn(5, 4, 3)
    with torch.autocast("cpu", torch.float16):
        expected, _ = fused(x)
        with overlapping(steps=2) as cut:
            found, _ = fused(x)
    assert cut
    assert found.dtype == torch.float16
    assert torch.equal(found, expected)


@interpreted
def test_the_reverse_sweep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it goes layer by layer, and so it does where FLOPs are counted."""
    from fused_rnn.engines.wavefront import backward

    def refuse(what: launch.Launch) -> None:
        raise launch.LaunchRefused("no room", 8)

    _, fused = stack_of("gru", dropout=0.5)
    x = torch.randn(5, 4, 3)
    torch.manual_seed(1)
    expected = run(fused, [x], None)
    torch.manual_seed(1)
    with overlapping(steps=2), FlopCounterMode(display=False) as counter:
        with mock.patch("torch._C._len_torch_dispatch_stack", return_value=0):
            out, _ = fused(x)
        torch.autograd.grad(out.sum(), fused.weight_ih_l0)
    assert counter.get_total_flops() > 0
    monkeypatch.setattr(backward, "launch", refuse)
    torch.manual_seed(1)
    with overlapping(steps=2) as cut:
        assert_same(run(fused, [x], None), expected, torch.float32)
    assert cut == [3]


@interpreted
def test_a_refused_launch_goes_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_rnn.engines.wavefront import forward

    def refuse(what: launch.Launch) -> None:
        raise launch.LaunchRefused("no room", 8)

    _, fused = stack_of("lstm")
    x = torch.randn(5, 4, 3)
    expected, _ = fused(x)
    monkeypatch.setattr(forward, "launch", refuse)
    with overlapping(steps=2) as cut:
        monkeypatch.setattr("wavefront_helpers.Shuffled.run", _at_once)
        assert torch.equal(fused(x)[0], expected)
    assert cut == [3]


def _at_once(self: Any, work: Any, stream: int | None, *after: int) -> int:
    if work is not None:
        work()
    return 0


# ---- who overlaps -----------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"bidirectional": True}, "a layer of two directions ends at both ends of time"),
        ({"recompute": True}, "recompute=True keeps the gates of one layer at a time"),
        ({"zoneout": 0.1}, "each layer draws its masks in turn"),
        ({"recurrent_dropout": 0.1}, "each layer draws its masks in turn"),
    ],
)
def test_stacks_that_go_layer_by_layer(how: dict[str, Any], why: str) -> None:
    layer = FusedLSTM(3, 5, num_layers=2, backend="triton", **how)
    x = torch.randn(5, 4, 3)
    with overlapping(steps=2) as cut:
        layer(x)
        assert f"; one layer after the other: {why}" in explain(layer, x)[0].reason
    assert not cut


@interpreted
def test_calls_that_go_layer_by_layer() -> None:
    layer = FusedLSTM(3, 8, num_layers=2, backend="triton")
    x = torch.randn(5, 4, 3)
    rows, reset = [nn.utils.rnn.pack_sequence([t[:5], t[:2]]) for t in (x[:, 0], x[:, 0, :1] > 0)]
    reset = rows._replace(data=reset.data.flatten())
    with overlapping(steps=2) as cut:
        layer(x, return_cell_sequence=True)
        layer(rows, reset=reset)
        reason = explain(layer, x, return_cell_sequence=True)[0].reason
        assert reason.endswith("one layer after the other: c of all steps is asked for")
        reason = explain(layer, rows, reset=reset)[0].reason
        assert reason.endswith("its pieces would not begin at 16 bytes")
    assert not cut


@interpreted
def test_explain_names_the_pieces() -> None:
    layer = FusedGRU(3, 5, num_layers=2, backend="triton")
    x = torch.randn(5, 4, 3)
    assert "one layer after the other: there are no streams on cpu" in explain(layer, x)[1].reason
    with overlapping(steps=2):
        reason = explain(layer, x)[0].reason
    assert "up to 2 layers at a time: forward in pieces of 2 steps, reverse in" in reason
    assert "layer" not in explain(FusedGRU(3, 5, backend="triton"), x)[0].reason


def test_explain_speaks_of_the_sweeps_that_there_are() -> None:
    layer = FusedLSTM(512, 512, num_layers=4, dtype=torch.bfloat16)
    x = torch.randn(512, 8, 512, dtype=torch.bfloat16)
    trained = {one.reason for one in explain(layer, x, gpu=90)}
    assert len(trained) == 1
    assert "reverse in" in trained.pop()
    with torch.no_grad():
        (reason,) = {one.reason for one in explain(layer, x, gpu=90)}
    assert "layers at a time: in " in reason
    assert "reverse" not in reason
    # Layers that cuDNN runs do not overlap, nor packed ones whose rows begin anywhere.
    small = explain(FusedLSTM(64, 64, num_layers=4), torch.randn(128, 8, 64), gpu=90)
    assert {one.backend for one in small} == {"native"}
    assert "layer" not in small[1].reason
    odd = FusedLSTM(3, 50, num_layers=4, dtype=torch.bfloat16, backend="triton")
    rows = nn.utils.rnn.pack_sequence([torch.randn(n, 3, dtype=torch.bfloat16) for n in (2000, 9)])
    assert explain(odd, rows, gpu=90)[3].reason.endswith("its pieces would not begin at 16 bytes")
    way = pieces.Cut(1, 9, 2, "few"), pieces.Cut(3, 3, 2, "in 3 pieces of 3 steps")
    text = "up to 2 layers at a time: forward one by one, reverse in 3 pieces of 3 steps"
    assert str(pieces.Cuts(*way)) == text


def test_explain_for_a_gpu_that_is_not_here() -> None:
    layer = FusedLSTM(512, 512, num_layers=4, dtype=torch.bfloat16)
    long, short = [torch.randn(T, 8, 512, dtype=torch.bfloat16) for T in (1024, 24)]
    assert "up to 4 layers at a time: forward in " in explain(layer, long, gpu=90)[0].reason
    assert "24 steps are too few to cut" in explain(layer, short, gpu=90)[0].reason
    assert (
        "not on AMD GPUs"
        in explain(FusedLSTM(8, 8, 2), short[..., :8].float(), gpu="gfx942")[0].reason
    )

"""A whole stack by cuDNN: as on a GPU, with PyTorch's CPU functions in its place; and on one."""

import copy
import io
import pickle
import warnings
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import assert_same, every_layer, packer, run, sequences, states, twins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn.layers import whole_stack
from fused_rnn.ops import cudnn

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False, "num_layers": 3},
    "batch_first": {"batch_first": True},
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
LAYER = [torch._VF.rnn_relu, torch._VF.rnn_tanh, torch._VF.lstm, torch._VF.gru]  # type: ignore[attr-defined]


def by_pytorch(
    x: Tensor, weights: Any, each: int, hx: Tensor, cx: Tensor | None, how: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """What cuDNN computes, of its arguments."""
    mode, _, _, layers, batch_first, dropout, train, two, sizes = how
    state = hx if cx is None else (hx, cx)
    rest = (list(weights), each >= 4, layers, dropout, train, two)
    if sizes:
        return LAYER[mode](x, torch.tensor(sizes), state, *rest)
    return LAYER[mode](x, state, *rest, batch_first)


MEMORY = torch.zeros(1)


class Pretended:
    """It, as autograd records it: x, the weights, hx and cx are the inputs, in this order.

    ``calls`` are the names of the passes that were made.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(
        self, x: Tensor, weights: Any, each: int, flat: Any, hx: Tensor, cx: Any, *how: Any
    ) -> tuple[Tensor, ...]:
        assert flat is MEMORY
        assert all(t.is_contiguous() for t in (hx, *weights))
        *settings, dropout_state = how
        assert dropout_state is None
        calls, arguments = self.calls, tuple(settings)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
                calls.append("forward")
                ctx.save_for_backward(*inputs)
                ctx.set_materialize_grads(False)
                x, *weights, hx, cx = inputs
                out, h_n, *c_n = by_pytorch(x, weights, each, hx, cx, arguments)
                return out, h_n, c_n[0] if c_n else h_n.new_empty(0)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
                assert arguments[6]  # training: cuDNN has no backward of inference
                calls.append("backward")
                inputs = ctx.saved_tensors
                with torch.enable_grad():
                    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
                    x, *weights, hx, cx = leaves
                    outs = by_pytorch(x, weights, each, hx, cx, arguments)
                pairs = [(o, g) for o, g in zip(outs, grads, strict=False) if g is not None]
                outputs, gradients = zip(*pairs, strict=True)
                wanted = [t for t in leaves if t is not None]
                found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
                made = [None if t is None else next(found) for t in leaves]
                needs = ctx.needs_input_grad  # cuDNN makes those of all weights, or of none
                needs = needs[0], *[any(needs[1:-2])] * (len(needs) - 3), *needs[-2:]
                return tuple([g if need else None for g, need in zip(made, needs, strict=True)])

        return (*Function.apply(x, *weights, hx, cx), x.new_ones(1), x.new_ones(2))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """Tensors on the CPU go where those on a GPU go."""
    made, original = Pretended(), whole_stack._suits_cudnn
    assert not original(nn.LSTM(3, 5), torch.randn(4, 2, 3))  # type: ignore[arg-type]
    monkeypatch.setattr(whole_stack, "_suits_cudnn", lambda module, x: True)
    monkeypatch.setattr(torch, "_cudnn_rnn", made)
    monkeypatch.setattr(whole_stack.native, "in_one_piece", lambda weights, *how: MEMORY)
    return made


def batch(packed: bool, shape: str) -> tuple[list[Tensor], Any, int]:
    if packed:
        return sequences([4, 2, 5], 3, torch.float64), packer(False), 3
    B, T = 4, 5
    sizes = (B, T, 3) if "batch_first" in SHAPES[shape] else (T, B, 3)
    return [torch.randn(sizes, dtype=torch.float64)], lambda xs: xs[0], B


def pair(kind: str, shape: str = "plain", **more: Any) -> tuple[Any, Any]:
    return twins(kind, 3, 6, dtype=torch.float64, backend="native", **SHAPES[shape], **more)


# ---- as on a GPU --------------------------------------------------------------------------------


@every_layer
@every_shape
@PACKED
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_results_and_gradients(
    kind: str, shape: str, packed: bool, given: bool, pretended: Pretended
) -> None:
    plain, fused = pair(kind, shape)
    xs, make, B = batch(packed, shape)
    hx = states(plain, B) if given else None
    for training in (True, False):
        plain.train(training)
        fused.train(training)
        assert_same(run(fused, xs, hx, make), run(plain, xs, hx, make))
    assert pretended.calls == ["forward", "backward"] * 2
    with torch.no_grad():
        found = run(fused, xs, hx, make, gradients=False)
    assert_same(found, run(plain, xs, hx, make, gradients=False))
    assert pretended.calls[4:] == ["forward"]


@every_layer
@every_shape
@PACKED
def test_second_derivatives(kind: str, shape: str, packed: bool, pretended: Pretended) -> None:
    """Which cuDNN does not have: those of a penalty on the first ones."""
    xs, make, _ = batch(packed, shape)
    found = []
    for layer in pair(kind, shape):
        inputs = [x.detach().requires_grad_() for x in xs]
        out = layer(make(inputs))[0]
        out = out if isinstance(out, Tensor) else out.data
        weights = list(layer.parameters())
        first = torch.autograd.grad(out.sin().sum(), [*inputs, *weights], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(penalty, [*inputs, *weights]))  # type: ignore[arg-type]
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    # The first derivatives by the loop, after its own; then its own of out, on which they depend.
    assert pretended.calls == ["forward", "backward", "backward"]


def test_what_needs_no_gradient(pretended: Pretended) -> None:
    _, fused = pair("lstm")
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    fused.weight_hh_l0.requires_grad_(False)
    fused(x)[0].sum().backward()
    assert fused.weight_hh_l0.grad is None
    assert fused.weight_ih_l0.grad is not None
    fused.requires_grad_(False)
    x.requires_grad_()
    fused(x)[1][1].sum().backward()  # of c_n alone
    assert x.grad is not None
    assert fused.bias_ih_l0.grad is not None  # of the first call
    assert pretended.calls == ["forward", "backward"] * 2


def test_second_derivatives_of_what_is_frozen(pretended: Pretended) -> None:
    """Of x alone, after a first pass that kept the graph."""
    _, fused = pair("gru")
    fused.requires_grad_(False)
    fused.weight_hh_l0.requires_grad_()
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    out = fused(x)[0]
    out.sum().backward(retain_graph=True)
    first, of_weight = torch.autograd.grad(out.sum(), [x, fused.weight_hh_l0], create_graph=True)
    torch.testing.assert_close(first, x.grad)
    torch.testing.assert_close(of_weight, fused.weight_hh_l0.grad)
    assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0
    assert fused.weight_ih_l0.grad is None


def test_nothing_is_kept_alive(pretended: Pretended) -> None:
    """What autograd lets go after its pass, as an activation before the layer."""
    _, fused = pair("lstm")
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    activation = x * 2
    seen = weakref.ref(activation)
    loss = fused(activation)[0].sum()
    del activation
    assert seen() is not None
    loss.backward()
    assert seen() is None


def test_checkpoints_go_another_way(pretended: Pretended) -> None:
    """They decide what is saved, and nobody else keeps it."""
    _, fused = pair("lstm")
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(fused(x)[0].sum(), x)
    calls = len(pretended.calls)
    out: Any = checkpoint(lambda x: fused(x)[0], x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), expected)
    assert len(pretended.calls) == calls


def test_written_into_before_backward(pretended: Pretended) -> None:
    """PyTorch's own error, not a wrong gradient."""
    _, fused = pair("lstm")
    loss = fused(torch.randn(5, 4, 3, dtype=torch.float64))[0].sum()
    with torch.no_grad():
        fused.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


def test_unbatched_and_states_that_are_views(pretended: Pretended) -> None:
    plain, fused = pair("lstm")
    x = torch.randn(5, 3, dtype=torch.float64)
    hx = tuple(torch.randn(6, 1, dtype=torch.float64).t() for _ in "hc")
    torch.testing.assert_close(fused(x, hx), plain(x, hx))
    assert pretended.calls == ["forward"]


# ---- what goes another way ----------------------------------------------------------------------


def test_who_does_not_ask_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: dropout between layers, one step, what our kernels may be faster for."""
    monkeypatch.setattr(whole_stack.native, "cudnn", lambda: True)
    monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda x: True)

    class OnAGpu:
        is_cuda, shape, dtype = True, torch.Size((5, 4, 3)), torch.float16

    def suits(layer: Any, **x: Any) -> bool:
        return whole_stack._suits_cudnn(layer, type("X", (OnAGpu,), x)())  # type: ignore[arg-type]

    lstm = fused_rnn.FusedLSTM(3, 6, 2, dropout=0.5)
    assert not suits(lstm)
    assert suits(lstm.eval())
    assert suits(fused_rnn.FusedLSTM(3, 6))
    assert not suits(fused_rnn.FusedLSTM(3, 6), dtype=torch.bfloat16)
    assert not suits(fused_rnn.FusedGRU(3, 600))
    assert suits(fused_rnn.FusedGRU(3, 600), dtype=torch.float64)
    assert suits(fused_rnn.FusedGRU(3, 600, backend="native"))
    assert not suits(fused_rnn.FusedLSTM(3, 6), shape=torch.Size((1, 1, 3)))
    assert not suits(fused_rnn.FusedLSTM(3, 6), shape=torch.Size((10**5, 1, 3)))
    for wrong in ((), (3,)):  # which the general way has an error for
        assert not suits(fused_rnn.FusedLSTM(3, 6), shape=torch.Size(wrong))


def test_flattening_within_a_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models call it in their forward: nothing is to be moved then."""
    layer, calls = fused_rnn.FusedLSTM(3, 6), list[str]()
    monkeypatch.setattr(cudnn, "flatten", lambda *args: calls.append("moved"))

    def forward(x: Tensor) -> Tensor:
        layer.flatten_parameters()
        return layer(x)[0]

    x = torch.randn(4, 2, 3)
    expected = layer(x)[0]
    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.func.vmap(forward, 1, 1)(x.unsqueeze(1))[:, 0], expected)
    assert calls == []
    forward(x)
    assert calls == ["moved"]


# ---- the weights in one piece -------------------------------------------------------------------


def in_one_piece(layer: Any) -> bool:
    return layer.flat_memory([*layer.parameters()]) is not None


def test_twins_are_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each call of cuDNN would copy the weights first."""

    def flatten(stack: Any, input_size: int, weights: list[Tensor]) -> Any:
        return weights[0], [w.data_ptr() for w in weights]

    assert not in_one_piece(fused_rnn.fuse(nn.LSTM(3, 6)))
    monkeypatch.setattr(cudnn, "flatten", flatten)
    assert in_one_piece(fused_rnn.fuse(nn.LSTM(3, 6, num_layers=2)))
    assert in_one_piece(fused_rnn.fuse(nn.Sequential(nn.GRU(3, 6)))[0])


def test_a_file_of_the_old_format_is_read() -> None:
    """Its numbers come after the modules: nobody may move a parameter in between."""
    layer, file = fused_rnn.FusedLSTM(3, 6), io.BytesIO()
    torch.save(layer, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    with mock.patch.object(cudnn, "flatten") as flatten:
        found = torch.load(file, weights_only=False)
    flatten.assert_not_called()
    for p, q in zip(layer.parameters(), found.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.gpu
@every_layer
@every_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_as_torch_nn_on_a_gpu(kind: str, shape: str, dtype: torch.dtype) -> None:
    """The same function, so the same numbers; and no warning that weights are not in one piece."""
    if not torch.cuda.is_available() or not fused_rnn.engines.native.cudnn():
        pytest.skip("no GPU with cuDNN")
    plain, fused = twins(kind, 3, 6, dtype=dtype, backend="native", **SHAPES[shape])
    plain.cuda()
    fused.cuda()
    twin: Any = fused_rnn.fuse(plain)
    twin.backend = "native"
    made = fused, twin, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    x = torch.randn(5, 4, 3, dtype=dtype)
    hx = [h.cuda() for h in states(plain, 5 if "batch_first" in SHAPES[shape] else 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run(plain, [x.cuda()], hx, lambda xs: xs[0])
        for layer in made:
            assert in_one_piece(layer) is (layer is fused or layer is twin)
            layer.flatten_parameters()
            assert in_one_piece(layer)
            found = run(layer, [x.cuda()], hx, lambda xs: xs[0])
            torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_a_weight_elsewhere() -> None:
    """It is used where it is, without a warning; a copy of it is what cuDNN reads."""
    if not torch.cuda.is_available() or not fused_rnn.engines.native.cudnn():
        pytest.skip("no GPU with cuDNN")
    layer = fused_rnn.FusedLSTM(3, 6, device="cuda", backend="native")
    x = torch.randn(5, 4, 3, device="cuda")
    assert in_one_piece(layer)
    layer.weight_hh_l0.data = layer.weight_hh_l0.data.clone().mul_(2)
    assert not in_one_piece(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = layer(x)[0]
    place = layer.weight_hh_l0.data_ptr()
    (grad,) = torch.autograd.grad(found.sum(), layer.weight_hh_l0)
    assert layer.weight_hh_l0.data_ptr() == place
    layer.flatten_parameters()
    assert in_one_piece(layer)
    torch.testing.assert_close(layer(x)[0], found)
    torch.testing.assert_close(torch.autograd.grad(layer(x)[0].sum(), layer.weight_hh_l0)[0], grad)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_second_derivatives_on_a_gpu(kind: str) -> None:
    if not torch.cuda.is_available() or not fused_rnn.engines.native.cudnn():
        pytest.skip("no GPU with cuDNN")
    plain, fused = pair(kind, "both")
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    found = []
    for layer, where in ((plain, "cpu"), (fused.cuda(), "cuda")):
        given = x.to(where).requires_grad_()
        wanted = [given, *layer.parameters()]
        first = torch.autograd.grad(layer(given)[0].sin().sum(), wanted, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append([g.cpu() for g in torch.autograd.grad(penalty, wanted)])  # type: ignore[arg-type]
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)

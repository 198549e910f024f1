"""Options with the rest of PyTorch (double backward, compile, torch.func, autocast), and errors."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_close
from options_helpers import (
    LENGTHS,
    B,
    H,
    I,
    T,
    random_reset,
)
from test_options_masks import LAYERS
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import FusedGRU, FusedLSTM, unfuse

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
    assert "options" in str(fused_rnn.explain(layer, torch.randn(T, B, I)))
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

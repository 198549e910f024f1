"""The layers inside TorchRL's LSTMModule and GRUModule, with resets in mid-trajectory.

TorchRL 0.14 cuts a rollout at its resets, pads the pieces, and passes the layer a mask of the steps
that count. What it does is done here without it, too, since the package does not need it.
"""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    assert_close,
    assert_same,
    every_backend,
    every_layer,
    run,
    states,
    tensors,
    twins,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fused_rnn import FusedGRU, FusedLSTM

B, T, I, H = 4, 9, 3, 5
LENGTHS = torch.tensor([9, 1, 6, 4])


# ---- the call, without TorchRL ------------------------------------------------------------------


@every_layer
@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
def test_a_mask_counts_as_packing_does(kind: str, backend: Any, bidirectional: bool) -> None:
    """As nn.LSTM in TorchRL, which packs the pieces: the states are those at each one's end."""
    options = {"batch_first": True, "bidirectional": bidirectional}
    plain, fused = twins(kind, I, H, 2, backend=backend, **options)
    x, hx = torch.randn(B, T, I), states(plain, B)

    def pack(xs: list[Tensor]) -> PackedSequence:
        return pack_padded_sequence(xs[0], LENGTHS, batch_first=True, enforce_sorted=False)

    def pad(_: nn.Module, __: Any, result: Any) -> Any:
        return pad_packed_sequence(result[0], batch_first=True, total_length=T)[0], result[1]

    def masked(_: nn.Module, args: Any, __: Any) -> Any:
        return args, {"mask": torch.arange(T).unsqueeze(0) < LENGTHS.unsqueeze(1)}

    plain.register_forward_hook(pad)
    fused.register_forward_pre_hook(masked, with_kwargs=True)
    assert_same(run(fused, [x], hx), run(plain, [x], hx, pack))


@every_layer
def test_a_mask_freezes_the_state(kind: str) -> None:
    """As TorchRL's own LSTM and GRU have it, also of a sequence in which no step counts."""
    _, fused = twins(kind, I, H)
    x, states_ = torch.randn(T, B, I), states(fused, B)
    hx = states_ if len(states_) == 2 else states_[0]
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[:3, 1] = True
    _, *found = tensors(fused(x, hx, mask=mask))
    _, *short = tensors(fused(x[:3], hx))
    for mine, before, after in zip(found, states_, short, strict=True):
        assert torch.equal(mine[:, [0, 2, 3]], before[:, [0, 2, 3]])
        assert_close(mine[:, 1], after[:, 1], "state")


def test_a_mask_is_traced_and_batched() -> None:
    layer, x = FusedGRU(I, H), torch.randn(T, B, I)
    mask = torch.arange(T)[:, None] < LENGTHS
    expected = layer(x, mask=mask)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")(x, mask=mask)
    batched = torch.vmap(lambda each, m: layer(each, mask=m))(
        torch.stack([x, x]), torch.stack([mask, mask])
    )
    for found in (compiled, tuple(b[1] for b in batched)):
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs, "traced")


def test_bad_masks() -> None:
    layer, x = FusedLSTM(I, H, batch_first=True), torch.randn(B, T, I)
    mask = torch.ones(B, T, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask should be a tensor of bool, got torch\.float32"):
        layer(x, mask=mask.float())
    with pytest.raises(TypeError, match="mask should be a bool tensor, as input, got list"):
        layer(x, mask=mask.tolist())
    with pytest.raises(RuntimeError, match=r"Expected mask of size \(4, 9\), got \(9, 4\)"):
        layer(x, mask=mask.t())
    with pytest.raises(RuntimeError, match="Input and mask are not at the same device"):
        layer(x, mask=mask.to("meta"))
    with pytest.raises(ValueError, match="lengths and mask say the same: give one of them"):
        layer(x, mask=mask, lengths=LENGTHS)
    with pytest.raises(ValueError, match="mask: only for batched input"):
        layer(x[0], mask=mask[0])
    packed = pack_padded_sequence(x, torch.full((B,), T), batch_first=True)
    with pytest.raises(ValueError, match="mask: only for padded input"):
        layer(packed, mask=mask)
    mask[1, 3] = mask[3, 0] = False
    with pytest.raises(
        ValueError, match=r"true up to a step and false from it, not so in \[1, 3\]"
    ):
        layer(x, mask=mask)
    mask[:] = True
    mask[:, -2:] = False
    assert layer(x, mask=mask)[0].shape == (B, T, H)


@every_layer
def test_resets_do_what_cutting_and_padding_do(kind: str) -> None:
    """The way around TorchRL's own, where each episode begins with zeros."""
    plain, fused = twins(kind, I, H, batch_first=True)
    x, is_init = torch.randn(B, T, I), torch.rand(B, T) < 0.3
    is_init[:, 0] = True
    output = fused(x, reset=is_init)[0]
    for b in range(B):
        cuts = [*is_init[b].nonzero().flatten().tolist(), T]
        for first, last in itertools.pairwise(cuts):
            expected = plain(x[b : b + 1, first:last])[0][0]
            assert_close(output[b, first:last], expected, f"{b}, {first}")


# ---- TorchRL itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchrl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        return pytest.importorskip(
            "torchrl.modules", reason="TorchRL is not installed, and the package does not need it"
        )


@pytest.fixture
def _its_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def module(torchrl: Any, layer: Any) -> Any:
    keys = ["h", "c"] if layer.mode == "LSTM" else ["h"]
    options = {layer.mode.lower(): layer, "in_keys": ["x", *keys]}
    options["out_keys"] = ["y", *(("next", key) for key in keys)]
    return getattr(torchrl, f"{layer.mode}Module")(**options)


def rollout(layer: nn.Module) -> Any:
    from tensordict import TensorDict

    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    is_init = torch.rand(B, T, 1) < 0.3
    is_init[:, 0] = True
    assert is_init[:, 1:].any()
    h, c = torch.randn(2, B, T, rows, H)
    x = torch.randn(B, T, I, requires_grad=True)
    return TensorDict({"x": x, "is_init": is_init, "h": h, "c": c}, [B, T])


@pytest.mark.usefixtures("_its_warnings")
@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("layers", [1, 2])
def test_trajectories(torchrl: Any, kind: str, bidirectional: bool, layers: int) -> None:
    plain, fused = twins(kind, I, H, layers, batch_first=True, bidirectional=bidirectional)
    data = rollout(plain)
    found = []
    for layer in (plain, fused):
        with torchrl.set_recurrent_mode(True):
            result = module(torchrl, layer)(data.clone(False))
        nexts = list(result["next"].values())
        loss = result["y"].square().sum() + sum(s.square().sum() for s in nexts)
        gradients = torch.autograd.grad(loss, [data["x"], *layer.parameters()])
        found.append([result["y"], *nexts, *gradients])
    assert len(found[1]) > 5
    for theirs, mine in zip(*found, strict=True):
        assert_close(mine, theirs, "trajectories")


@pytest.mark.usefixtures("_its_warnings")
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_single_steps(torchrl: Any, kind: str) -> None:
    """A collector's way, step by step, gives what a whole trajectory gives from zeros."""
    plain, fused = twins(kind, I, H, 2, batch_first=True)
    data = rollout(plain)
    ours = module(torchrl, fused)
    found = []
    for policy in (module(torchrl, plain), ours):
        now, outputs = data[:, 0].select("x", "is_init"), []
        with torch.no_grad(), torchrl.set_recurrent_mode(False):
            for t in range(T):
                now = now.update(data[:, t].select("x", "is_init"))
                now = policy(now)
                outputs.append(now["y"])
                now.update(now["next"])
        found.append(torch.stack(outputs, 1))
    assert_close(found[1], found[0], "steps")
    with torch.no_grad(), torchrl.set_recurrent_mode(True):
        whole = ours(data.select("x", "is_init"))
    assert_close(found[1], whole["y"], "whole")
    assert ours.make_tensordict_primer() is not None


@pytest.mark.usefixtures("_its_warnings")
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_there_and_back(torchrl: Any, kind: str) -> None:
    """TorchRL's own conversions take our parameters over."""
    _, fused = twins(kind, I, H, batch_first=True)
    data = rollout(fused)
    policy = module(torchrl, fused)
    with torch.no_grad(), torchrl.set_recurrent_mode(True):
        expected = policy(data.clone(False))["y"]
        for convert in ("make_python_based", "make_cudnn_based"):
            again = getattr(module(torchrl, fused), convert)()
            assert_close(again(data.clone(False))["y"], expected, convert)

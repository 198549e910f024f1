"""fuse and unfuse of layers that are more than their parameters, both ways and in training."""

import copy
import gc
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as new
import torch.nn.utils.parametrize as parametrize
from helpers import LAYERS, assert_same, every_layer, tensors
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from fused_rnn import FusedGRU, FusedLSTM, fuse, unfuse

HH, IH = "weight_hh_l0", "weight_ih_l0"


class WeightDrop(nn.Module):
    """As in AWD-LSTM: the parameter moves here, and each call sets a tensor in its place."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.raw = rnn._parameters.pop(HH)

    def forward(self, x: Tensor) -> Any:
        setattr(self.rnn, HH, nn.functional.dropout(self.raw, 0.5, self.training))
        return self.rnn(x)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def old(function: Any, *names: str, **kwargs: Any) -> Callable[[nn.Module], nn.Module]:
    """A function of torch.nn.utils applied to some weights."""

    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of weight_norm, which is deprecated
            for name in names:
                function(layer, name, **kwargs)
        return layer

    return apply


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": old(weight_norm, HH, IH),
    "spectral_norm": old(spectral_norm, HH),
    "prune": old(prune.l1_unstructured, HH, "bias_ih_l0", amount=3),
    "prune twice": lambda layer: old(prune.random_unstructured, HH, amount=0.3)(
        old(prune.ln_structured, HH, amount=0.4, n=2, dim=0)(layer)
    ),
    "weight drop": WeightDrop,
    "parametrized": old(new.weight_norm, HH, "bias_hh_l0"),
    "parametrized twice": lambda layer: old(
        parametrize.register_parametrization, HH, parametrization=Double()
    )(old(new.weight_norm, HH, IH)(layer)),
}
every_computed = pytest.mark.parametrize("name", COMPUTED)


def models(kind: str, name: str) -> tuple[nn.Module, nn.Module, list[str]]:
    """The same model twice, with a computed weight; and the keys of its state dict."""
    theirs, _, extra = LAYERS[kind]
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(nn.Sequential(COMPUTED[name](theirs(3, 5, **extra, dtype=torch.float64))))
    return found[0], found[1], list(found[0].state_dict())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """The outputs of some steps."""
    found = []
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        x = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator)
        torch.manual_seed(1)
        output = tensors(model(x))[0]
        found.append(output.detach())
        optimizer.zero_grad()
        output.square().sum().backward()
        optimizer.step()
    return found


@every_layer
@every_computed
def test_computed_weights_both_ways(kind: str, name: str) -> None:
    """In training, there and back, with one optimizer, as torch.nn's layer that stays."""
    stays, swapped, keys = models(kind, name)
    identities = {n: id(t) for n, t in swapped.state_dict(keep_vars=True).items()}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (stays, swapped)]
    for swap in (fuse, unfuse, fuse):
        assert swap(swapped) is swapped
        assert list(swapped.state_dict()) == keys
        assert {n: id(t) for n, t in swapped.state_dict(keep_vars=True).items()} == identities
        assert not any(t.is_meta for t in [*swapped.parameters(), *swapped.buffers()])
        expected = train(stays, optimizers[0], 3)
        found = train(swapped, optimizers[1], 3)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    swapped.load_state_dict(stays.state_dict())


@every_computed
def test_the_layers_have_been_swapped(name: str) -> None:
    _, model, _ = models("lstm", name)
    for swap, cls in ((fuse, FusedLSTM), (unfuse, nn.LSTM), (fuse, FusedLSTM)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            swap(model)
        layer = model[0].rnn if name == "weight drop" else model[0]
        assert isinstance(layer, cls)
    assert not any(name.startswith(("_flat", "_all")) for name in vars(layer))


def test_a_parametrization_can_be_removed_from_the_twin() -> None:
    plain = old(new.weight_norm, HH)(nn.GRU(3, 5))
    x = torch.randn(4, 2, 3)
    expected = plain(x)[0]
    fused = fuse(plain)
    assert type(fused).__name__ == "ParametrizedFusedGRU"
    torch.testing.assert_close(copy.deepcopy(fused)(x)[0], expected)
    parametrize.remove_parametrizations(fused, HH)
    assert type(fused) is FusedGRU
    torch.testing.assert_close(fused(x)[0], expected)
    torch.testing.assert_close(plain(x)[0], expected)  # which keeps its own


def test_an_old_hook_can_be_removed_from_the_twin() -> None:
    plain = old(weight_norm, HH)(nn.GRU(3, 5))
    x = torch.randn(4, 2, 3)
    expected = plain(x)[0]
    fused = fuse(plain)
    nn.utils.remove_weight_norm(fused, HH)
    assert isinstance(fused._parameters[HH], nn.Parameter)
    torch.testing.assert_close(fused(x)[0], expected)


# ---- what else a layer may have -----------------------------------------------------------------


def test_nothing_that_was_added_vanishes() -> None:
    """Child modules, buffers, parameters, attributes and hooks of every kind, there and back."""
    calls: list[str] = []
    layer = nn.GRU(3, 5)
    layer.norm = nn.LayerNorm(5)
    layer.inner = nn.LSTM(2, 2)
    layer.scale = nn.Parameter(torch.ones(5))
    layer.register_buffer("seen", torch.zeros(2))
    layer.register_buffer("scratch", torch.zeros(2), persistent=False)
    layer.note = {"kept": 1}  # type: ignore[assignment]
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("forward_pre")),
        layer.register_forward_hook(lambda *_: calls.append("forward")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
        layer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict_pre")),
        layer.register_load_state_dict_post_hook(lambda *_: calls.append("load_state_dict_post")),
    ]
    modules: list[nn.Module] = []
    handles.append(layer.register_load_state_dict_pre_hook(lambda m, *_: modules.append(m)))
    every = ["forward_pre", "forward", "backward", "state_dict_pre", "load_state_dict_post"]
    model = nn.Sequential(layer).eval()
    keys = list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    del layer
    for swap, inner in ((fuse, FusedLSTM), (unfuse, nn.LSTM), (fuse, FusedLSTM)):
        swap(model)
        gc.collect()  # the layer that was swapped is gone
        calls.clear()
        modules.clear()
        output = model[0](torch.randn(4, 2, 3, requires_grad=True))[0]
        output.sum().backward()
        model.load_state_dict(model.state_dict())
        assert calls == every
        assert modules == [model[0]]
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules()] == names
        assert type(model[0].inner) is inner
        assert [name for name, _ in model.named_buffers()] == ["0.seen", "0.scratch"]
        assert model[0].note == {"kept": 1}
        assert not model[0].training
    calls.clear()
    for handle in handles[:-1]:
        handle.remove()
    model[0](torch.randn(4, 2, 3))
    assert calls == []


def test_the_twin_and_the_layer_are_two_modules() -> None:
    """What is added to the one is not in the other."""
    plain = nn.GRU(3, 5)
    fused = fuse(plain)
    fused.register_buffer("seen", torch.zeros(1))
    fused.child = nn.Linear(1, 1)
    setattr(fused, HH, nn.Parameter(torch.zeros(15, 5)))
    assert not hasattr(plain, "seen")
    assert not hasattr(plain, "child")
    assert plain.weight_hh_l0.count_nonzero() > 0


def test_frozen_replaced_and_missing_weights() -> None:
    plain = nn.LSTM(3, 5)
    plain.weight_ih_l0.requires_grad_(False)
    del plain.weight_hh_l0
    plain.register_buffer(HH, torch.randn(20, 5))
    raw = plain._parameters.pop("bias_ih_l0")
    fused = fuse(plain)
    assert [name for name, _ in fused.named_parameters()] == [IH, "bias_hh_l0"]
    assert not any(p.is_meta for p in fused.parameters())
    back = unfuse(fused)
    for layer in (plain, fused, back):
        setattr(layer, "bias_ih_l0", raw.detach())  # noqa: B010
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(back(x), plain(x), rtol=0, atol=0)


# ---- what is left alone -------------------------------------------------------------------------


class Own(nn.LSTM):
    pass


class OwnFused(FusedLSTM):
    pass


def with_forward() -> nn.Module:
    layer = nn.LSTM(3, 5)
    layer.forward = lambda x: x  # type: ignore[method-assign, assignment]
    return layer


def with_method() -> nn.Module:
    layer = nn.LSTM(3, 5)
    layer.again = layer.reset_parameters  # type: ignore[assignment]
    return layer


def with_child(layer: nn.Module, name: str) -> nn.Module:
    setattr(layer, name, nn.Linear(2, 2))
    return layer


def compiled() -> nn.Module:
    layer = nn.LSTM(3, 5)
    layer.compile(backend="eager")
    return layer


UNFIT = "has attributes that its twin cannot take over"
LEFT_ALONE: dict[str, tuple[Any, Callable[[], nn.Module], str]] = {
    "a subclass": (fuse, lambda: Own(3, 5), "Own '0' is a subclass of a recurrent layer"),
    "a subclass of ours": (unfuse, lambda: OwnFused(3, 5), "OwnFused '0' is a subclass of a"),
    "a parametrized subclass": (
        fuse,
        lambda: old(new.weight_norm, HH)(Own(3, 5)),
        "ParametrizedOwn '0' is a subclass of a recurrent layer",
    ),
    "another forward": (fuse, with_forward, f"LSTM '0' {UNFIT} (forward)"),
    "a method bound to it": (fuse, with_method, f"LSTM '0' {UNFIT} (again)"),
    "compiled in place": (fuse, compiled, f"LSTM '0' {UNFIT} (_compiled_call_impl)"),
    "a child of our name": (
        fuse,
        lambda: with_child(nn.LSTM(3, 5), "backend"),
        f"LSTM '0' {UNFIT} (backend)",
    ),
    "a child of a property's name": (
        fuse,
        lambda: with_child(nn.LSTM(3, 5), "_cell"),
        f"LSTM '0' {UNFIT} (_cell)",
    ),
    "a child of torch.nn's name": (
        unfuse,
        lambda: with_child(FusedLSTM(3, 5), "_init_flat_weights"),
        f"FusedLSTM '0' {UNFIT} (_init_flat_weights)",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_a_warning(case: str) -> None:
    swap, make, message = LEFT_ALONE[case]
    layer = make()
    model = nn.Sequential(layer, nn.ReLU())
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        swap(model)
    assert [w.filename for w in caught] == [__file__]
    assert model[0] is layer
    with pytest.warns(UserWarning, match=re.escape(message.replace(" '0'", ""))):
        assert swap(layer) is layer


@pytest.mark.parametrize("swap", [fuse, unfuse])
@pytest.mark.parametrize("what", ["abc", nn.LSTM, None])
def test_what_is_no_module_is_refused(swap: Any, what: Any) -> None:
    message = f"{swap.__name__} takes an nn.Module, got {type(what).__name__}"
    with pytest.raises(TypeError, match=f"^{message}$"):
        swap(what)


def test_arguments_are_checked_first() -> None:
    """Also where there is nothing to swap."""
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"):
        fuse(nn.ReLU(), backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        fuse(nn.ReLU(), recompute=1)  # type: ignore[arg-type]


def test_an_error_leaves_all_layers_as_they_were() -> None:
    model = nn.Sequential(FusedGRU(3, 5), FusedGRU(5, 5, zoneout=0.1))
    with pytest.raises(ValueError, match=r"torch\.nn's layers have no zoneout"):
        unfuse(model)
    assert [type(layer) for layer in model] == [FusedGRU, FusedGRU]


# ---- tools that look for torch.nn's layers ------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_dynamic_quantization_of_what_was_unfused(kind: str) -> None:
    """It passes our layers by, since they are no nn.RNNBase."""
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no quantized operators for x86")
    theirs, ours, _ = LAYERS[kind]
    model = nn.Sequential(ours(8, 16, 2, bidirectional=True)).eval()
    assert not isinstance(model[0], nn.RNNBase)
    x = torch.randn(6, 3, 8)
    expected = tensors(model(x))
    unfuse(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {theirs})
    assert type(quantized[0]).__module__ == "torch.ao.nn.quantized.dynamic.modules.rnn"
    for a, b in zip(tensors(quantized(x)), expected, strict=True):
        assert (a - b).abs().max() < 0.05
        assert not torch.equal(a, b)


def test_initialisation_by_class_comes_before_fuse() -> None:
    """As documented: the parameters are shared, so what is drawn for torch.nn's layer stays."""

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.RNNBase):
            for parameter in module.parameters():
                nn.init.constant_(parameter, 0.25)

    model = fuse(nn.Sequential(nn.GRU(3, 5)).apply(initialise))
    assert all((p == 0.25).all() for p in model.parameters())


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_unfused_computed_weights_are_copied_and_not_stepped(norm: str) -> None:
    """torch.nn's list of weights holds no graph; making it takes no step of a power iteration."""
    layer = nn.GRU(3, 5)
    getattr(new, norm)(layer, HH)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    plain = unfuse(fuse(layer))
    assert_same(dict(plain.state_dict()), state)
    assert all(module.training for module in plain.modules())
    x = torch.randn(4, 2, 3)
    other = copy.deepcopy(plain)
    torch.testing.assert_close(other.eval()(x), plain.eval()(x), rtol=0, atol=0)

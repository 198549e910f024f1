"""Swap torch.nn's recurrent layers inside a model for their fused twins, and back."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
    type_before_parametrizations,
)

from fused_rnn.engines.dispatch import Backend, check_backend
from fused_rnn.layers.base import FusedRecurrent, FusedRNNBase
from fused_rnn.layers.checks import check_options
from fused_rnn.layers.lstm import FusedLSTM
from fused_rnn.layers.parameters import OPTIONS
from fused_rnn.layers.rnn import FusedGRU, FusedRNN

_Twins = Mapping[type[nn.Module], type[nn.Module]]
_FUSED: _Twins = {nn.RNN: FusedRNN, nn.GRU: FusedGRU, nn.LSTM: FusedLSTM}
_PLAIN: _Twins = {fused: plain for plain, fused in _FUSED.items()}

# What only one of the twins keeps in its __dict__.
_THEIRS = frozenset({"_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"})
_OURS = frozenset({"_entries", "_sizes", "backend", *OPTIONS})


def fuse(model: nn.Module, *, backend: Backend = "auto", recompute: bool = False) -> nn.Module:
    """Swap every nn.RNN, nn.GRU and nn.LSTM in ``model`` for its fused twin, in place.

    The twins share the parameters themselves, so an optimizer that already holds them goes on
    working, and the keys of state dicts stay. Hooks, buffers, child modules, training mode and
    attributes go along, and so does what makes a weight of other parameters: weight_norm,
    spectral_norm and pruning, both the hooks of torch.nn.utils and parametrizations, and weights
    that a parent module sets at each call.

    A layer that cannot be swapped is left alone, with a warning that says why: an instance of a
    subclass (which may compute anything), one whose ``forward`` was replaced, one that was compiled
    in place, one with an attribute of a name that means something else to its twin.

    Args:
        model: any module.
        backend: of the twins: "auto" (what is fastest), "triton", "cpu", "native" or "eager".
        recompute: whether the twins save only their states for backward, and compute the gates a
            second time.

    Returns:
        ``model``, or its twin where ``model`` itself is a recurrent layer

    Raises:
        TypeError: ``model`` is not a module, or ``recompute`` not a bool.
        ValueError: ``backend`` is not a backend's name.
    """
    _check_module("fuse", model)
    check_backend(backend)
    check_options(recompute, 0.0, 0.0, False, None)
    return _swap(model, _FUSED, {"backend": backend, "recompute": recompute})


def unfuse(model: nn.Module) -> nn.Module:
    """The inverse of :func:`fuse`: swap the fused layers in ``model`` for torch.nn's, in place.

    The twins share the parameters themselves; hooks, buffers, child modules, training mode and
    attributes go along, and so does what makes a weight of other parameters. A layer that cannot be
    swapped (of a subclass, with a ``forward`` of its own, compiled in place) is left alone, with a
    warning that says why.

    It is for tools that look for torch.nn's layers: quantize_dynamic, torch.jit.script, and the way
    to ONNX, ``torch.onnx.export(unfuse(model), ..., dynamo=True)``, which takes any T and B for an
    LSTM or GRU with ``batch_first`` and ``Dim.AUTO`` (docs/faq.md has what else it takes).
    torch.export needs no detour.

    Args:
        model: any module.

    Returns:
        ``model``, or its twin where ``model`` itself is a fused layer

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a layer does what torch.nn's cannot (zoneout, learned initial states and so on);
            then nothing is swapped.
    """
    _check_module("unfuse", model)
    return _swap(model, _PLAIN, {})


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes an nn.Module, got {type(model).__name__}")


def _swap(model: nn.Module, twins: _Twins, extra: dict[str, Any]) -> nn.Module:
    parents = list(model.modules())
    places = [("", model)]
    places += [(n, c) for p in parents for n, c in p._modules.items() if c is not None]
    swapped: dict[nn.Module, str] = {}  # a layer that stands in two places keeps one twin
    # Nor has the layer of any cell a twin in torch.nn.
    kinds = (*twins, FusedRecurrent) if twins is _PLAIN else tuple(twins)
    for name, layer in places:
        if isinstance(layer, kinds):
            swapped.setdefault(layer, name)
    for layer in list(swapped):
        cls = twins.get(type_before_parametrizations(layer))
        if reason := _why_not(layer, cls):
            kind, name = type(layer).__name__, swapped.pop(layer)
            label = f"{kind} '{name}'" if name else kind
            warnings.warn(f"{label} {reason}", stacklevel=3)
    # All of them are made before the first one is put in its place, so an error leaves all alone.
    done = {
        layer: _twin(layer, twins[type_before_parametrizations(layer)], extra) for layer in swapped
    }
    for parent in [*(p for p in parents if p not in done), *done.values()]:
        for name, child in parent._modules.items():
            if child in done:
                parent._modules[name] = done[child]
    return done.get(model, model)


def _why_not(layer: nn.Module, cls: type[nn.Module] | None) -> str | None:
    """Why ``layer`` has no twin of class ``cls``; None if it has one.

    Raises:
        ValueError: torch.nn's layer could not do what ``layer`` does.
    """
    if isinstance(layer, FusedRecurrent):
        return "has no twin in torch.nn: left as it is"
    if cls is None:
        return "is a subclass of a recurrent layer: left as it is"
    if isinstance(layer, FusedRNNBase):
        options = {name: default for name, default in OPTIONS.items() if name != "recompute"}
        used = [name for name, default in options.items() if getattr(layer, name) != default]
        if used:
            raise ValueError(f"torch.nn's layers have no {', '.join(used)}")
    fusing, own = issubclass(cls, FusedRNNBase), layer.__dict__
    kind = type_before_parametrizations(layer)
    # A method that is bound to the layer, as of layer.compile(), would go on running the layer.
    unfit = {n for n, v in own.items() if n == "forward" or getattr(v, "__self__", None) is layer}
    if own.get("_compiled_call_impl") is not None:
        unfit.add("_compiled_call_impl")
    names = {*own, *layer._parameters, *layer._buffers, *layer._modules}
    names -= _THEIRS if fusing else _OURS
    unfit |= names & (_OURS if fusing else _THEIRS)
    unfit |= {n for n in names if hasattr(cls, n) and not hasattr(kind, n)}
    if not unfit:
        return None
    lost = ", ".join(sorted(unfit))
    return f"has attributes that its twin cannot take over ({lost}): left as it is"


def _twin(layer: nn.Module, cls: type[nn.Module], extra: dict[str, Any]) -> nn.Module:
    """A module of class ``cls`` with all that ``layer`` has; parameters and hooks are shared."""
    own = _OURS if isinstance(layer, FusedRNNBase) else _THEIRS
    state = {name: value for name, value in layer.__dict__.items() if name not in own}
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        state[name] = state[name].copy()
    parametrized = is_parametrized(layer)
    parametrizations = state["_modules"].pop("parametrizations") if parametrized else {}
    if isinstance(layer, FusedRNNBase):
        names = layer._flat_weights_names
        state |= {"_flat_weights_names": names, "_all_weights": layer._all_weights}
        state["_flat_weights"] = [None] * len(names)
    twin = cls.__new__(cls)
    state["_load_state_dict_pre_hooks"] = _rebound(state["_load_state_dict_pre_hooks"], twin)
    twin.__setstate__(state | extra)
    for name in parametrizations:
        # Make the properties of the twin's class by way of a placeholder.
        twin.register_parameter(name, nn.Parameter(torch.zeros(0)))
        register_parametrization(twin, name, nn.Identity())
        twin.parametrizations[name] = parametrizations[name]  # type: ignore[operator]
    twin._modules = {name: twin._modules[name] for name in layer._modules}
    if isinstance(twin, nn.RNNBase):
        _list_weights(twin)
    else:
        twin.flatten_parameters()  # type: ignore[operator]
    return twin


def _list_weights(layer: nn.RNNBase) -> None:
    """Fill torch.nn's list of weights, which a call makes anew where they are computed.

    Without a graph, so that the layer can be copied, and without a step of what computes them:
    spectral_norm takes one at each read in training.
    """
    computing = [m for m in layer.modules() if m is not layer and m.training]
    for module in computing:
        module.training = False
    with torch.no_grad():
        layer._init_flat_weights()
    for module in computing:
        module.training = True


def _rebound(hooks: Any, twin: nn.Module) -> Any:
    """``hooks``, of which those that are bound to their module are bound to ``twin``."""
    if not any(getattr(hook, "with_module", False) for hook in hooks.values()):
        return hooks
    pairs = [
        (key, type(hook)(hook.hook, twin) if getattr(hook, "with_module", False) else hook)
        for key, hook in hooks.items()
    ]
    return type(hooks)(pairs)

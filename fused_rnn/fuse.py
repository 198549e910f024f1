"""Swap torch.nn's recurrent layers inside a model for their fused twins, and back."""

import warnings
from typing import Any

from torch import nn

from fused_rnn.base import EXTRAS, FusedRNNBase
from fused_rnn.dispatch import Backend
from fused_rnn.layers import FusedGRU, FusedLSTM, FusedRNN

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: FusedRNN,
    nn.GRU: FusedGRU,
    nn.LSTM: FusedLSTM,
}
_CONFIG = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")


def fuse(model: nn.Module, *, backend: Backend = "auto", recompute: bool = False) -> nn.Module:
    """Swap every nn.RNN, nn.GRU and nn.LSTM in ``model`` for its fused twin, in place.

    The twins share the parameters themselves, so an optimizer that already holds them goes on
    working. Hooks, training mode and attributes go along. A subclass of nn.LSTM (which may compute
    anything, and which a parametrized layer is, too) is left alone, with a warning.

    Args:
        model: any module.
        backend: the twins' backend.
        recompute: the twins' ``recompute``.

    Returns:
        ``model``, or its twin where ``model`` itself is a recurrent layer
    """
    return _swap(model, _TWINS, {"backend": backend, "recompute": recompute})


def unfuse(model: nn.Module) -> nn.Module:
    """The inverse of :func:`fuse`: swap the fused layers in ``model`` for torch.nn's, in place.

    This is the way to ONNX, which has operators for those, with any number of time steps. The
    exporter that makes them is ``torch.onnx.export(unfuse(model), ..., dynamo=False)``; it needs
    the ``onnx`` package. Let the batch size vary only if the model takes the states as inputs:
    torch.nn's default states are zeros of the batch size of the export.

    Raises:
        ValueError: a layer does what torch.nn's cannot (zoneout, learned initial states and so on).

    (``torch.export`` needs no detour: it takes the fused layers with symbolic T and B.)
    """
    return _swap(model, {fused: plain for plain, fused in _TWINS.items()}, {})


def _swap(
    model: nn.Module, twins: dict[type[nn.Module], type[nn.Module]], extra: dict[str, Any]
) -> nn.Module:
    done: dict[nn.Module, nn.Module] = {}  # a layer that stands in two places keeps one twin
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and type(child) in twins:
                if child not in done:
                    done[child] = _twin(child, twins[type(child)], extra)
                parent._modules[name] = done[child]
            elif isinstance(child, tuple(twins)):
                warnings.warn(
                    f"{type(child).__name__} '{name}' is a subclass of a recurrent layer: "
                    "left as it is",
                    stacklevel=3,
                )
    if type(model) in twins:
        return _twin(model, twins[type(model)], extra)
    return model


def _twin(layer: nn.Module, cls: type[nn.Module], extra: dict[str, Any]) -> nn.Module:
    if isinstance(layer, FusedRNNBase):
        used = [name for name in EXTRAS if name != "recompute" and getattr(layer, name)]
        if used:
            raise ValueError(f"torch.nn's layers have no {', '.join(used)}")
    config = {name: getattr(layer, name) for name in _CONFIG} | extra
    if isinstance(layer, (nn.RNN, FusedRNN)):
        config["nonlinearity"] = layer.nonlinearity
    if isinstance(layer, (nn.LSTM, FusedLSTM)):
        config["proj_size"] = layer.proj_size
    twin = cls(**config, device="meta")
    # Set afterwards: the constructor would warn of dropout in one layer, as it has done before.
    twin.dropout = layer.dropout
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(twin, name, parameter)
    own = twin.__dict__
    private = {"_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"}
    private |= {"_parameters", "_modules", "_layout", "backend", *EXTRAS}
    own.update({k: v for k, v in layer.__dict__.items() if k not in private})
    if isinstance(twin, nn.RNNBase):
        twin.flatten_parameters()
    return twin

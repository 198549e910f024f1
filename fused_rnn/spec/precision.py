"""What products are computed in: autocast's type; for fp32 on a GPU, by the switch of nn.LSTM."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

# From whom a setting of "none" is inherited; read in every call of a layer.
_HOLDERS: tuple[Any, ...] = (torch.backends.cudnn.rnn, torch.backends.cudnn, torch.backends)
_MATMUL: Any = torch.backends.cuda.matmul


def rnn_precision() -> Literal["ieee", "tf32"]:
    """The setting for recurrent layers: "tf32" (PyTorch's default) or "ieee".

    ``torch.backends.cudnn.rnn.fp32_precision``, or what it inherits from.
    """
    for holder in _HOLDERS:
        setting = holder.fp32_precision
        if setting != "none":
            return "tf32" if setting == "tf32" else "ieee"
    return "ieee"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in for an input ``x``, or None where it leaves things alone.

    As everywhere in autocast, fp64 stays as it is, and so do integers.
    """
    device = x.device
    if not _autocast_is_on(device) or not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device.type)


def _autocast_is_on(device: torch.device) -> bool:
    kind = device.type
    if kind in ("cpu", "cuda"):
        return torch.is_autocast_enabled(kind)
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: types have been settled."""
    if _autocast_is_on(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class matmul_precision(AbstractContextManager[None]):
    """Let fp32 matrix products on CUDA follow ``setting``, and restore the user's own after."""

    def __init__(self, setting: Literal["ieee", "tf32"]) -> None:
        self.setting = setting

    def __enter__(self) -> None:
        self.before = _MATMUL.fp32_precision
        if self.before != self.setting:
            _MATMUL.fp32_precision = self.setting

    def __exit__(self, *error: object) -> None:
        if self.before != self.setting:
            _MATMUL.fp32_precision = self.before

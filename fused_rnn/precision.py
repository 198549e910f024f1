"""How precisely fp32 products are computed on a GPU: by the switch that nn.LSTM follows there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch


def rnn_precision() -> Literal["ieee", "tf32"]:
    """The setting for recurrent layers: "tf32" (PyTorch's default) or "ieee".

    ``torch.backends.cudnn.rnn.fp32_precision``, or what it inherits from; before PyTorch 2.9
    ``torch.backends.cudnn.allow_tf32``.
    """
    holders: tuple[Any, ...] = (torch.backends.cudnn.rnn, torch.backends.cudnn, torch.backends)
    for holder in holders:
        setting = getattr(holder, "fp32_precision", None)
        if setting is None:
            return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
        if setting != "none":
            return "tf32" if setting == "tf32" else "ieee"
    return "ieee"


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """Let fp32 matrix products on CUDA follow ``setting``, and restore the user's own after."""
    matmul: Any = torch.backends.cuda.matmul
    try:
        name, value, before = "fp32_precision", setting, matmul.fp32_precision
    except AttributeError:  # before PyTorch 2.9
        name, value, before = "allow_tf32", setting == "tf32", matmul.allow_tf32  # type: ignore[assignment]
    if value == before:
        yield
        return
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)

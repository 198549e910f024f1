"""Cells, each in a few lines of PyTorch: torch.nn's own, and a zoo of others.

They are derived when they are first asked for, ``from fused_rnn.cells import slstm``; docs/cells.md
has a table of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fused_rnn.cells.builtin import GRU, LSTM, RNN_RELU, RNN_TANH
    from fused_rnn.cells.continuous import antisymmetric_rnn, cfc, leaky_rnn, learned_leaky_rnn
    from fused_rnn.cells.gated import (
        coupled_lstm,
        janet,
        layer_norm_lstm,
        minimal_gated_unit,
        peephole_lstm,
        slstm,
    )
    from fused_rnn.cells.spiking import lif
    from fused_rnn.spec.cells import Cell

__all__ = [
    "GRU",
    "LSTM",
    "RNN_RELU",
    "RNN_TANH",
    "antisymmetric_rnn",
    "cfc",
    "coupled_lstm",
    "janet",
    "layer_norm_lstm",
    "leaky_rnn",
    "learned_leaky_rnn",
    "lif",
    "minimal_gated_unit",
    "peephole_lstm",
    "slstm",
]

_PLACES = {
    "builtin": ("GRU", "LSTM", "RNN_RELU", "RNN_TANH"),
    "continuous": ("antisymmetric_rnn", "cfc", "leaky_rnn", "learned_leaky_rnn"),
    "gated": (
        "coupled_lstm",
        "janet",
        "layer_norm_lstm",
        "minimal_gated_unit",
        "peephole_lstm",
        "slstm",
    ),
    "spiking": ("lif",),
}


def __getattr__(name: str) -> "Cell":
    for module, names in _PLACES.items():
        if name in names:
            cell: Cell = getattr(import_module(f"{__name__}.{module}"), name)
            return cell
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

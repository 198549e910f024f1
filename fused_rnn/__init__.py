"""Drop-in recurrent layers for PyTorch whose time loop is one fused sweep, forward and backward."""

from fused_rnn._version import __version__
from fused_rnn.cells.definition import cell, surrogate
from fused_rnn.layers.base import FusedRecurrent
from fused_rnn.layers.lstm import FusedLSTM
from fused_rnn.layers.recording import Tracer
from fused_rnn.layers.rnn import FusedGRU, FusedRNN
from fused_rnn.tools.explain import explain
from fused_rnn.tools.fuse import fuse, unfuse
from fused_rnn.tools.show import show
from fused_rnn.tools.tune import tune

__all__ = [
    "FusedGRU",
    "FusedLSTM",
    "FusedRNN",
    "FusedRecurrent",
    "Tracer",
    "__version__",
    "cell",
    "explain",
    "fuse",
    "show",
    "surrogate",
    "tune",
    "unfuse",
]

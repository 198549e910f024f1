"""Drop-in recurrent layers for PyTorch whose time loop is one fused sweep, forward and backward."""

from fused_rnn._version import __version__
from fused_rnn.explain import explain
from fused_rnn.fuse import fuse, unfuse
from fused_rnn.graphs import Tracer
from fused_rnn.layers import FusedGRU, FusedLSTM, FusedRNN
from fused_rnn.tuning import tune

__all__ = [
    "FusedGRU",
    "FusedLSTM",
    "FusedRNN",
    "Tracer",
    "__version__",
    "explain",
    "fuse",
    "tune",
    "unfuse",
]

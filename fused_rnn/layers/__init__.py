"""The modules: parameters, checks, the stack of layers, and swapping them into a model."""

from fused_rnn.layers.lstm import FusedLSTM
from fused_rnn.layers.rnn import FusedGRU, FusedRNN

__all__ = ["FusedGRU", "FusedLSTM", "FusedRNN"]

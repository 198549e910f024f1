"""torch.nn's cells, in its order of gates and by its formulas.

https://docs.pytorch.org/docs/stable/nn.html#recurrent-layers
"""

from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells.definition import define
from fused_rnn.spec.cells import Cell, TorchFunctions


def _rnn_tanh(gates: Any, state: Any) -> Tensor:
    return torch.tanh(gates.a)


def _rnn_relu(gates: Any, state: Any) -> Tensor:
    return torch.relu(gates.a)


def _gru(gates: Any, state: Any) -> Tensor:
    r, z = torch.sigmoid(gates.r), torch.sigmoid(gates.z)
    # The reset gate acts after the recurrent product, as in cuDNN.
    n = torch.tanh(gates.n_x + r * gates.n_h)
    return torch.lerp(n, state.h, z)


def _lstm(gates: Any, state: Any) -> tuple[Tensor, Tensor]:
    i, f, o = torch.sigmoid(gates.i), torch.sigmoid(gates.f), torch.sigmoid(gates.o)
    c = f * state.c + i * torch.tanh(gates.g)
    return o * torch.tanh(c), c


_VF = torch._VF

RNN_TANH = define(
    "rnn_tanh", _rnn_tanh, "a", "h", torch=TorchFunctions(_VF.rnn_tanh, torch.rnn_tanh_cell, 1)
)
RNN_RELU = define(
    "rnn_relu", _rnn_relu, "a", "h", torch=TorchFunctions(_VF.rnn_relu, torch.rnn_relu_cell, 0)
)
GRU = define("gru", _gru, "rzn", "h", apart="n", torch=TorchFunctions(_VF.gru, torch.gru_cell, 3))
LSTM = define("lstm", _lstm, "ifgo", "hc", torch=TorchFunctions(_VF.lstm, torch.lstm_cell, 2))
CELLS: dict[str, Cell] = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, GRU, LSTM)}

"""What a cell is: its gates, its states and one step, in torch.nn's order and formulas.

A gate owns ``H`` rows of the weights; ``gates * H`` rows make ``weight_ih`` and ``weight_hh``.
``step`` is the definition of the cell: the eager reference runs it as it stands, and every faster
backend is tested against it. Formulas: https://docs.pytorch.org/docs/stable/nn.html#recurrent-layers
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, Tensor | None]  # h [B, H] and, for the LSTM, c [B, H]


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        name: what the backends know the cell by.
        gates: blocks of ``H`` rows in the weights.
        has_c: whether a cell state c is carried beside h.
        step: ``(gx [B, gates*H], gh [B, gates*H], state) -> state`` for one time step, where
            ``gx = x W_ih^T + b_ih`` and ``gh = h W_hh^T + b_hh``.
    """

    name: str
    gates: int
    has_c: bool
    step: Callable[[Tensor, Tensor, State], State]


def _rnn_tanh(gx: Tensor, gh: Tensor, state: State) -> State:
    return torch.tanh(gx + gh), None


def _rnn_relu(gx: Tensor, gh: Tensor, state: State) -> State:
    return torch.relu(gx + gh), None


def _gru(gx: Tensor, gh: Tensor, state: State) -> State:
    xr, xz, xn = gx.chunk(3, dim=-1)
    hr, hz, hn = gh.chunk(3, dim=-1)
    r = torch.sigmoid(xr + hr)
    z = torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)  # the reset gate acts after the recurrent product, as in cuDNN
    return (1 - z) * n + z * state[0], None


def _lstm(gx: Tensor, gh: Tensor, state: State) -> State:
    i, f, g, o = (gx + gh).chunk(4, dim=-1)
    assert state[1] is not None
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


RNN_TANH = Cell("rnn_tanh", gates=1, has_c=False, step=_rnn_tanh)
RNN_RELU = Cell("rnn_relu", gates=1, has_c=False, step=_rnn_relu)
GRU = Cell("gru", gates=3, has_c=False, step=_gru)
LSTM = Cell("lstm", gates=4, has_c=True, step=_lstm)
BY_NAME = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, GRU, LSTM)}


def register(cell: Cell) -> None:
    """Make another cell known by its name; the eager loop then runs it, traced or not.

    Raises:
        ValueError: the name is taken.
    """
    if cell.name in BY_NAME:
        raise ValueError(f"there is a cell {cell.name!r} already")
    BY_NAME[cell.name] = cell

"""The cells, each in one record, in torch.nn's order of gates and by its formulas.

https://docs.pytorch.org/docs/stable/nn.html#recurrent-layers
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fused_rnn.engines.cpu import cells as cpu
from fused_rnn.kernels.cell import CellFunctions, KernelCell
from fused_rnn.spec.cells import Cell, State, TorchFunctions


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


# What a step saves for the reverse sweep, of pre-activations [N, H, S].


def _activate_tanh(gates: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    gates.tanh_()


def _activate_relu(gates: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    gates.relu_()


def _activate_gru(gates: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    gates[..., :2].sigmoid_()
    gates[..., 2].addcmul_(gates[..., 0], gates[..., 3]).tanh_()


def _activate_lstm(gates: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    candidate = torch.tanh(gates[..., 2])
    gates.sigmoid_()
    gates[..., 2] = candidate


@lru_cache
def _functions(name: str) -> CellFunctions:
    from fused_rnn.kernels import cells  # imports Triton

    functions: CellFunctions = getattr(cells, name)
    return functions


RNN_TANH = Cell(
    "rnn_tanh",
    gates=1,
    has_c=False,
    step=_rnn_tanh,
    torch=TorchFunctions(torch._VF.rnn_tanh, torch.rnn_tanh_cell, cudnn_mode=1),
    sweep=cpu.TanhSweep,
    kernels=KernelCell(
        "rnn_tanh",
        states=1,
        x_slots=(0,),
        h_slots=(0,),
        functions=lambda: _functions("RNN_TANH"),
        activate=_activate_tanh,
        needs_h=False,
        keeps_gates=False,
        factors=1,
    ),
)
RNN_RELU = Cell(
    "rnn_relu",
    gates=1,
    has_c=False,
    step=_rnn_relu,
    torch=TorchFunctions(torch._VF.rnn_relu, torch.rnn_relu_cell, cudnn_mode=0),
    sweep=cpu.ReluSweep,
    kernels=KernelCell(
        "rnn_relu",
        states=1,
        x_slots=(0,),
        h_slots=(0,),
        functions=lambda: _functions("RNN_RELU"),
        activate=_activate_relu,
        needs_h=False,
        keeps_gates=False,
        factors=1,
    ),
)
GRU = Cell(
    "gru",
    gates=3,
    has_c=False,
    step=_gru,
    torch=TorchFunctions(torch._VF.gru, torch.gru_cell, cudnn_mode=3),
    sweep=cpu.GruSweep,
    kernels=KernelCell(
        "gru",
        states=1,
        x_slots=(0, 1, 2),  # r, z, n
        h_slots=(0, 1, 3),
        functions=lambda: _functions("GRU"),
        activate=_activate_gru,
        factors=5,
    ),
)
LSTM = Cell(
    "lstm",
    gates=4,
    has_c=True,
    step=_lstm,
    torch=TorchFunctions(torch._VF.lstm, torch.lstm_cell, cudnn_mode=2),
    sweep=cpu.LstmSweep,
    kernels=KernelCell(
        "lstm",
        states=2,
        x_slots=(0, 1, 2, 3),  # i, f, g, o
        h_slots=(0, 1, 2, 3),
        functions=lambda: _functions("LSTM"),
        activate=_activate_lstm,
        needs_h=False,
    ),
)
CELLS = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, GRU, LSTM)}


def register(cell: Cell) -> None:
    """Make another cell known by its name; docs/adding_a_cell.md has an example.

    The eager loop then runs it, traced or not, and the other engines for which it has a part.

    Args:
        cell: the cell.

    Raises:
        ValueError: the name is taken, or the parts of the cell contradict each other.
    """
    if cell.name in CELLS:
        raise ValueError(f"there is a cell {cell.name!r} already")
    kernels = cell.kernels
    if kernels is not None and (len(kernels.h_slots), kernels.states) != (
        cell.gates,
        1 + cell.has_c,
    ):
        raise ValueError(
            f"the cell {cell.name!r} has {cell.gates} gates and {1 + cell.has_c} states, but its "
            f"kernels {len(kernels.h_slots)} and {kernels.states}"
        )
    CELLS[cell.name] = cell

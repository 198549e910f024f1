"""A single time step on a GPU: PyTorch's own cell, one call for each direction.

Autograd records it. There is no loop to fuse, so what counts is what a sweep spends before and
after it. Only ``backend="auto"`` comes here: an engine that is asked for by name runs also a single
step itself, for the results of one long call to the last bit. (On a CPU torch.nn's own functions
run a single step, see :mod:`fused_rnn.native`.)
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fused_rnn.precision import matmul_precision, rnn_precision
from fused_rnn.problem import Layer, Outputs, Saved

_CELLS: dict[str, Any] = {
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "gru": torch.gru_cell,
    "lstm": torch.lstm_cell,
}


def suits(layer: Layer, device: torch.device, dtype: torch.dtype, projected: bool) -> bool:
    """Whether a layer runs here.

    16-bit types do on CUDA alone: elsewhere the cells round every intermediate result. Projections,
    extras and other cells do not, which PyTorch does not know.
    """
    wide = device.type == "cuda" or dtype in (torch.float32, torch.float64)
    wide = wide and device.type != "cpu"
    plain = not projected and layer.extras is None and layer.cell.name in _CELLS
    return layer.rows.T == 1 and wide and plain


def forward(layer: Layer, inputs: Saved) -> Outputs:
    """One step of one layer; ``inputs`` as in :class:`fused_rnn.problem.Engine`."""
    x, h0, c0, *flat = inputs
    assert x is not None
    assert h0 is not None
    cell = _CELLS[layer.cell.name]
    h: list[Tensor] = []
    c: list[Tensor] = []
    with _precision(x):
        for d, w in enumerate(layer.unflatten(flat)):
            if c0 is None:
                h.append(cell(x, h0[d], *w[:4]))
            else:
                new = cell(x, (h0[d], c0[d]), *w[:4])
                h.append(new[0])
                c.append(new[1])
    out = h[0] if len(h) == 1 else torch.cat(h, dim=1)
    return Outputs(out, torch.stack(h), torch.stack(c) if c else None)


def _precision(x: Tensor) -> AbstractContextManager[Any]:
    return matmul_precision(rnn_precision()) if x.is_cuda else nullcontext()

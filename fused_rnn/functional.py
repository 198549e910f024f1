"""One recurrent layer as a function of tensors, whichever backend runs it."""

from collections.abc import Sequence

from torch import Tensor

from fused_rnn import ops, transforms
from fused_rnn.cells import Cell
from fused_rnn.dispatch import Backend
from fused_rnn.ops import TracedRows
from fused_rnn.precision import autocast_dtype, without_autocast
from fused_rnn.problem import Layer, Outputs, Saved, Weights
from fused_rnn.rows import Rows


def rnn_layer(
    cell: Cell,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    rows: Rows | TracedRows,
    backend: Backend = "auto",
    recompute: bool = False,
) -> Outputs:
    """Run one recurrent layer over a batch of sequences.

    Under autocast everything is computed in the autocast dtype, as ``nn.LSTM`` does on a GPU.

    Args:
        cell: one of :mod:`fused_rnn.cells`.
        x: input rows [N, I] in order of time, see :class:`fused_rnn.rows.Rows`.
        h0: initial hidden state [D, B, R], with R the projection size or else H.
        c0: initial cell state [D, B, H], or None for a cell without one.
        weights: parameters of each of the D directions; the second one sweeps in reverse.
        rows: where the rows of each time step lie.
        backend: "auto", "triton", "cpu" or "eager".
        recompute: save only the states for backward and compute the gates a second time.

    Returns:
        out [N, D*R], h_n [D, B, R] and c_n [D, B, H] or None

    Raises:
        RuntimeError: ``backend`` cannot run this layer.
        ValueError: ``backend`` is not a backend's name.
    """
    inputs = (x, h0, c0, *(p for w in weights for p in w))
    dtype = autocast_dtype(x)
    if dtype is None:
        return _run(cell, rows, len(weights), recompute, inputs, backend)
    inputs = tuple([t if t is None else t.to(dtype) for t in inputs])
    with without_autocast(x.device):
        return _run(cell, rows, len(weights), recompute, inputs, backend)


def _run(
    cell: Cell,
    rows: Rows | TracedRows,
    directions: int,
    recompute: bool,
    inputs: Saved,
    backend: Backend,
) -> Outputs:
    if isinstance(rows, TracedRows):
        return ops.run(cell.name, rows, directions, recompute, inputs, backend)
    return transforms.run(Layer(cell, rows, directions, recompute), inputs, backend)

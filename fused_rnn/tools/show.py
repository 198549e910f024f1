"""What is derived from a cell's step, as text."""

from fused_rnn.derive import kernels
from fused_rnn.spec.cells import Cell


def show(cell: Cell) -> str:
    """The Triton functions that the kernels call for a cell, derived from its step.

    They are ``step``; ``factors`` and ``adjoint``, whose product is the gradient of the step, see
    :class:`fused_rnn.kernels.cell.CellFunctions`; and ``others``, which zoneout needs.

    Args:
        cell: what :func:`fused_rnn.cell` made, or one of :mod:`fused_rnn.cells`.

    Returns:
        the text, to be printed

    Raises:
        TypeError: it is no cell.
        ValueError: the kernels cannot run it, and why.

    Example:
        >>> from fused_rnn import cell, show
        >>> @cell(gates="a", states="h")
        ... def leaky(gates, state):
        ...     return 0.9 * state.h + 0.1 * torch.tanh(gates.a)
        >>> print(show(leaky).partition("@triton.jit")[2].partition("return")[0].strip())
        def leaky_step(pre, state, params, H: tl.constexpr, FAST: tl.constexpr):
            gate_a = pre[0]
            state_h = state[0]
            v0 = tanh(gate_a, FAST)
            v1 = state_h * 0.9
            v2 = v0 * 0.1
            v3 = v1 + v2
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"a cell is needed, got {type(cell).__name__}")
    return kernels.source(cell)

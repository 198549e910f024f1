"""What a cell is: its gates, its states, one step, and how each engine runs it.

A gate owns ``H`` rows of the weights; ``gates * H`` rows make ``weight_ih`` and ``weight_hh``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fused_rnn.kernels.cell import KernelCell

State = tuple[Tensor, Tensor | None]  # h [B, H] and, for the LSTM, c [B, H]


class TorchFunctions(NamedTuple):
    """PyTorch's own functions for a cell.

    Attributes:
        layer: of a layer, as ``torch._VF.lstm``.
        step: of a single step, as ``torch.lstm_cell``.
        cudnn_mode: cuDNN's number for the cell.
    """

    layer: Callable[..., Any]
    step: Callable[..., Any]
    cudnn_mode: int


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell: all that the package knows of it.

    Attributes:
        name: what reasons and errors call it.
        gates: blocks of ``H`` rows in the weights.
        has_c: whether a cell state c is carried beside h.
        step: ``(gx [B, gates*H], gh [B, gates*H], state) -> state`` for one time step, where
            ``gx = x W_ih^T + b_ih`` and ``gh = h W_hh^T + b_hh``. It is the definition of the cell:
            the eager loop runs it as it stands, and every engine is tested against it.
        torch: PyTorch's own functions for it, or None.
        parameters: names of its own parameters, each one number for every unit.
        sweep: its class for the CPU engine, a :class:`fused_rnn.engines.cpu.sweep.Sweep`, or None.
        kernels: how the Triton kernels run it, or None.
    """

    name: str
    gates: int
    has_c: bool
    step: Callable[[Tensor, Tensor, State], State]
    torch: TorchFunctions | None = None
    sweep: Callable[..., Any] | None = None
    kernels: KernelCell | None = None
    parameters: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """Blocks of ``H`` rows in the weights."""
        return self.gates

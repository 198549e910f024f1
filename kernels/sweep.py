"""What a sweep is asked for: the layer, its layout, options and plan. No kernel is imported."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn.kernels.cell import KernelCell
from fused_rnn.kernels.plan import Plan, Precision


class DeviceLayout(NamedTuple):
    """Where the rows of each time step lie.

    Attributes:
        T: time steps of the longest sequence.
        B: sequences, sorted by decreasing length.
        N: rows in all.
        offsets: int64 [T + 1] on the device, the first row of each step and N; None if every step
            owns B rows.
    """

    T: int
    B: int
    N: int
    offsets: Tensor | None = None


@dataclass(frozen=True)
class SweepOptions:
    """What sweeps can do beside a plain recurrence; each may be absent.

    Attributes:
        lengths: steps of each sequence of a uniform batch, int32 [B].
        reset: uint8 [D, N], whether a row's step begins anew.
        restart_h: [D, H], the h that it begins with, or None for zeros.
        restart_c: [D, K * H], the states beside h, or None for zeros.
        zone_h: uint8 [N, D * H], whether a unit keeps its h in a row's step.
        zone_c: uint8 [N, D * K * H], whether it keeps each of the states beside h.
        zoneout: without such masks, how much of the old state is kept.
        drop: [D, B, H], factors of h on its way into the recurrent product.
        clip: bound of the gradients of the states from step to step.
    """

    lengths: Tensor | None = None
    reset: Tensor | None = None
    restart_h: Tensor | None = None
    restart_c: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    zoneout: float | None = None
    drop: Tensor | None = None
    clip: float | None = None

    @property
    def zoned(self) -> bool:
        """Whether a state is more than what the cell's step returns."""
        return self.zone_h is not None or self.zoneout is not None

    def tensors(self) -> dict[str, Tensor | None]:
        """As the kernels take them, in their order."""
        return {
            "lengths": self.lengths,
            "reset": self.reset,
            "restart_h": self.restart_h,
            "restart_c": self.restart_c,
            "zone_h": self.zone_h,
            "zone_c": self.zone_c,
            "drop": self.drop,
        }

    @property
    def operand_differs(self) -> bool:
        """Whether the product takes something else than h0 and the h that are put out."""
        return not (self.lengths is None and self.reset is None and self.drop is None)


NONE = SweepOptions()


class Gradients(NamedTuple):
    """What a reverse sweep finds; all but dgates in fp32.

    Attributes:
        dgates: [D, N, H, S] in the dtype of the weights, by slots.
        dh0: [D, B, H].
        dc0: [D, B, K * H], or None for a cell of one state.
        drestart_h: [D, B, H], with a restart state.
        drestart_c: [D, B, K * H], with a restart state of a cell with c.
        dvectors: [D, batch tiles, P, H], to be summed over the tiles; None without parameters.
    """

    dgates: Tensor
    dh0: Tensor
    dc0: Tensor | None
    drestart_h: Tensor | None
    drestart_c: Tensor | None
    dvectors: Tensor | None


class Sweep(NamedTuple):
    """What both sweeps of a layer have in common.

    The recurrent weights of a head are its own, and its units meet no others: to the kernels each
    head is a direction of its own, with columns of its own in what all heads of a direction share.

    Attributes:
        cell: the cell.
        layout: where the rows of each step lie.
        reverse: per direction, whether it runs from the last step to the first.
        precision: "ieee" or "tf32", for fp32 products.
        plan: how they run, see `planner.make_plan`.
        options: what they do beside a plain recurrence.
        heads: of each direction.
    """

    cell: KernelCell
    layout: DeviceLayout
    reverse: tuple[bool, ...]
    precision: Precision
    plan: Plan
    options: SweepOptions = NONE
    heads: int = 1

    def empty(self, *shape: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        """Memory that a sweep fills; zeros where it leaves out steps beyond a sequence's end."""
        make = torch.empty if self.options.lengths is None else torch.zeros
        return make(shape, dtype=dtype, device=like.device)

    def numbers(self) -> dict[str, int | float | None]:
        """The numbers that both kernels take last."""
        return {
            "T": self.layout.T,
            "B": self.layout.B,
            "N": self.layout.N,
            "first_tile": 0,
            "first_direction": 0,
            "reverse": _direction_bits(self.reverse),
        }


@lru_cache
def _direction_bits(reverse: tuple[bool, ...]) -> int:
    """Bit d says whether direction d runs from the last step to the first."""
    return sum([1 << d for d, r in enumerate(reverse) if r])

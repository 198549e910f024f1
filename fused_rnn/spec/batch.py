"""Where the rows of each time step lie: one layout for uniform and for variable-length batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class BatchLayout:
    """A batch of sequences as rows in order of time, the layout of ``PackedSequence.data``.

    Step ``t`` owns ``batch_sizes[t]`` consecutive rows, one per sequence that is still running;
    sequences are sorted by decreasing length, so row ``b`` of every step belongs to sequence ``b``.
    A uniform batch ``[T, B, ...]`` is the special case in which every step owns ``B`` rows.

    Attributes:
        T: time steps of the longest sequence.
        B: sequences.
        batch_sizes: rows of each step, non-increasing, or None where all own ``B``.
    """

    T: int
    B: int
    batch_sizes: tuple[int, ...] | None = None

    @classmethod
    def packed(cls, batch_sizes: Tensor) -> "BatchLayout":
        """The rows of a PackedSequence, from its ``batch_sizes`` (int64 [T], on the CPU).

        Raises:
            RuntimeError: they are not of this kind, not positive, or increase.
        """
        wide = batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1
        if not wide or batch_sizes.device.type != "cpu":
            raise RuntimeError(
                "batch_sizes should be a 1-D int64 tensor on the CPU, got "
                f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
            )
        values = batch_sizes.tolist()
        if not values or values[-1] < 1 or values != sorted(values, reverse=True):
            raise RuntimeError(f"batch_sizes should be positive and never increase, got {values}")
        sizes = tuple(values)
        if sizes[0] == sizes[-1]:
            return cls(len(sizes), sizes[0])
        return cls(len(sizes), sizes[0], sizes)

    @property
    def N(self) -> int:
        """Rows in all."""
        return self.T * self.B if self.batch_sizes is None else self._ragged_rows

    @cached_property
    def _ragged_rows(self) -> int:
        return sum(self.batch_sizes or ())

    def pieces(self, steps: int) -> "tuple[tuple[int, BatchLayout], ...]":
        """The layout cut into pieces of so many steps, each with its first row.

        A piece has the sequences that are running at its first step.
        """
        sizes, B = self.batch_sizes, self.B
        if sizes is None:
            starts = range(0, self.T, steps)
            return tuple([(t * B, BatchLayout(min(steps, self.T - t), B)) for t in starts])
        row, pieces = 0, []
        for t in range(0, self.T, steps):
            piece = BatchLayout(min(steps, self.T - t), sizes[t], sizes[t : t + steps])
            pieces.append((row, piece))
            row += piece.N
        return tuple(pieces)

    def offsets_at_once(self, pieces: "Sequence[BatchLayout]", device: torch.device) -> None:
        """Bring the offsets of pieces to a device in one copy, where they have any."""
        if self.batch_sizes is None:
            return
        width = pieces[0].T + 1 + (pieces[0].T + 1) % 2  # each begins at 16 bytes

        def make() -> Tensor:
            rows = [(0, *accumulate(p.batch_sizes or ())) for p in pieces]
            padded = [(*row, *[0] * (width - len(row))) for row in rows]
            return to_device(torch.tensor(padded), device)

        together = self._once(("offsets of pieces", pieces[0].T, device), make)
        for piece, row in zip(pieces, together.unbind(), strict=True):
            piece._kept["offsets", device] = row[: piece.T + 1]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of ``tensor`` [N, ...], one per time step."""
        return torch.split(tensor, self.B if self.batch_sizes is None else list(self.batch_sizes))

    def previous(self, state: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """The state [N, H] that each row's step started from, as a copy.

        Args:
            state: state after each step, [N, H].
            initial: state before the first step, [B, H].
            reverse: whether the sweep runs from the last step to the first.
        """
        initial = initial.to(state.dtype)
        if self.batch_sizes is None:
            rest = state[self.B :] if reverse else state[: self.N - self.B]
            return torch.cat([rest, initial] if reverse else [initial, rest])
        index = self._previous_rows(state.device, reverse)
        return torch.cat([initial, state]).index_select(0, index)

    def recurrent_product(
        self, dgates: Tensor, state: Tensor, initial: Tensor, reverse: bool, from_zero: bool
    ) -> Tensor:
        """``dgates^T previous``: the gradient [G, H] of weights that the previous state met.

        With ``from_zero`` the ``initial`` state is zero, and its product is left out.
        """
        if self.batch_sizes is not None:
            return dgates.t() @ self.previous(state, initial, reverse)
        n = self.N - self.B  # the rows lie side by side: no copy
        later, earlier = slice(self.B, None), slice(0, n)
        first = slice(n, None) if reverse else slice(0, self.B)
        rest, before = (earlier, later) if reverse else (later, earlier)
        product = dgates[rest].t() @ state[before]
        if from_zero:
            return product
        return product.addmm_(dgates[first].t(), initial.to(state.dtype))

    def offsets(self, device: torch.device) -> Tensor | None:
        """The first row of each step and N, int64 [T + 1]; None where all steps own ``B``."""
        return None if self.batch_sizes is None else self._offsets(device)

    def last(self, state: Tensor, reverse: bool) -> Tensor:
        """The state [B, H] after each sequence's final step of the sweep, as a copy.

        Args:
            state: state after each step, [N, H].
            reverse: whether the sweep runs from the last step to the first.
        """
        if reverse:
            return state[: self.B].clone()
        if self.batch_sizes is None:
            return state[self.N - self.B :].clone()
        return state.index_select(0, self._last_rows(state.device))

    # Offsets are copied to a device once, and all else is made from them there: the host waits for
    # nothing, and both sweeps of all layers of a stack share it.

    @cached_property
    def _kept(self) -> dict[Any, Tensor]:
        return {}

    def _once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        tensor = self._kept.get(key)
        if tensor is None:
            tensor = self._kept[key] = make()
        return tensor

    def _offsets(self, device: torch.device) -> Tensor:
        def make() -> Tensor:
            assert self.batch_sizes is not None
            return to_device(torch.tensor((0, *accumulate(self.batch_sizes))), device)

        return self._once(("offsets", device), make)

    def _previous_rows(self, device: torch.device, reverse: bool) -> Tensor:
        """The row of ``cat([initial, state])`` that each row's step started from, int64 [N]."""

        def make() -> Tensor:
            offsets = self._offsets(device)
            sizes, row = offsets.diff(), torch.arange(self.N, device=device)
            if not reverse:  # the row of the step before is as far away as that step has rows
                away = torch.constant_pad_nd(self.B - sizes[:-1], (1, 0))
                return row + away.repeat_interleave(sizes, output_size=self.N)
            following = torch.constant_pad_nd(sizes[1:], (0, 1))
            steps = torch.stack([offsets[:-1], self.B + sizes, following])
            first, away, running = steps.repeat_interleave(sizes, 1, output_size=self.N)
            b = row - first
            return torch.where(b < running, row + away, b)

        return self._once(("previous", device, reverse), make)

    def _last_rows(self, device: torch.device) -> Tensor:
        """Each sequence's last row, int64 [B]."""

        def make() -> Tensor:
            offsets, b = self._offsets(device), torch.arange(self.B, device=device)
            length = (offsets.diff() > b[:, None]).sum(1)
            return offsets[length - 1] + b

        return self._once(("last", device), make)


@dataclass(frozen=True)
class TracedLayout:
    """What a tracer knows of a :class:`BatchLayout`: sizes may be symbolic.

    Attributes:
        B: sequences.
        batch_sizes: rows of each step, int64 [T] on the CPU, or None where all own ``B``.
    """

    B: int
    batch_sizes: Tensor | None = None

    @classmethod
    def packed(cls, input: PackedSequence, hx: Sequence[Tensor] | None) -> "TracedLayout":
        """The layout of ``input``; values of a tensor are looked at only where no shape tells B."""
        if hx is not None:
            B = hx[0].shape[1]
        elif input.sorted_indices is not None:
            B = input.sorted_indices.shape[0]
        else:
            B = int(input.batch_sizes[0])
        return cls(B, input.batch_sizes)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on ``device``, for which the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

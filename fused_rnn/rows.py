"""Where the rows of each time step lie: one layout for uniform and for variable-length batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Consecutive steps of one batch size: ``steps`` times ``batch`` rows from row ``first``."""

    steps: int
    batch: int
    first: int

    @property
    def span(self) -> slice:
        """Its rows."""
        return slice(self.first, self.first + self.steps * self.batch)


@dataclass(frozen=True)
class Rows:
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
    def packed(cls, batch_sizes: Tensor) -> "Rows":
        """The rows of a PackedSequence, from its ``batch_sizes`` (int64 [T], on the CPU)."""
        sizes = tuple(batch_sizes.tolist())
        if sizes[0] == sizes[-1]:
            return cls(len(sizes), sizes[0])
        return cls(len(sizes), sizes[0], sizes)

    @property
    def N(self) -> int:
        """Rows in all."""
        return self.T * self.B if self.batch_sizes is None else sum(self.batch_sizes)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of ``tensor`` [N, ...], one per time step."""
        return torch.split(tensor, self.B if self.batch_sizes is None else list(self.batch_sizes))

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Cut time wherever the batch size changes, and into pieces of about ``rows`` rows."""
        if self.batch_sizes is None:
            runs = [(self.B, self.T)]
        else:
            runs = [(batch, len(list(same))) for batch, same in groupby(self.batch_sizes)]
        first = 0
        for batch, left in runs:
            longest = max(1, -(-rows // batch))
            while left:
                steps = min(left, longest)
                yield Chunk(steps, batch, first)
                first += steps * batch
                left -= steps

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
        sizes = torch.tensor(self.batch_sizes)
        b = torch.arange(self.B)
        length = (sizes[None, :] > b[:, None]).sum(1)
        index = (sizes.cumsum(0) - sizes)[length - 1] + b
        return state.index_select(0, index.to(state.device))

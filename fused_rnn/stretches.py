"""Lengths and resets on a CPU: every stretch of a sequence becomes a sequence of a packed batch.

So the sweeps need not know of either, and stretches of one sequence run side by side. It takes a
look at the values, for which a GPU would have to be waited for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.problem import Masks
from fused_rnn.rows import Rows


@dataclass(frozen=True)
class Stretches:
    """The S stretches of B sequences, by decreasing length.

    Attributes:
        rows: where their steps lie.
        steps: the row in the uniform batch of each of ``rows``.
        sequence: [S], to which each belongs.
        first: [S], whether it is the first one of its sequence.
        last: [S], whether it is the last one.
        continues: [S], whether it takes up the initial state, no reset being before it.
    """

    rows: Rows
    steps: Tensor
    sequence: Tensor
    first: Tensor
    last: Tensor
    continues: Tensor

    @classmethod
    def of(cls, rows: Rows, masks: Masks) -> "Stretches | None":
        """Those of a uniform batch; None if it has no steps at all."""
        T, B = rows.T, rows.B
        lengths = torch.full((B,), T) if masks.lengths is None else masks.lengths.clamp(0, T)
        reset = torch.zeros(T, B, dtype=torch.bool)
        if masks.reset is not None:
            reset = masks.reset.view(T, B)
        begins = reset.index_fill(0, torch.zeros(1, dtype=torch.int64), True)
        begins = begins & (torch.arange(T)[:, None] < lengths)
        b, t = begins.t().nonzero().unbind(1)
        if b.numel() == 0:
            return None
        last = torch.cat([b[1:] != b[:-1], torch.ones(1, dtype=torch.bool)])
        end = torch.where(last, lengths[b], t.roll(-1))
        length, order = (end - t).sort(descending=True, stable=True)
        b, t, last = b[order], t[order], last[order]
        within = torch.arange(int(length[0]))[:, None] < length
        steps = ((t + torch.arange(int(length[0]))[:, None]) * B + b)[within]
        return cls(
            Rows.packed(within.sum(1)), steps, b, t == 0, last, (t == 0) & ~reset[0].gather(0, b)
        )

    def initial(self, state: Tensor, restart: Tensor | None) -> Tensor:
        """What each begins with [D, S, .], of the initial state [D, B, .] and that of a restart."""
        found = state[:, self.sequence]
        other = found.new_zeros(()) if restart is None else restart[:, None]
        takes = torch.stack([self.continues, self.last])[: len(found), :, None]
        return torch.where(takes, found, other)

    def final(self, state: Tensor, initial: Tensor) -> Tensor:
        """The final states [D, B, .] of the sequences; one without steps keeps its initial one."""
        found = []
        for direction, ends in zip(range(len(state)), (self.last, self.first), strict=False):
            mine = state[direction, ends]
            found.append(initial[direction].index_copy(0, self.sequence[ends], mine))
        return torch.stack(found)

    def spread(self, packed: Tensor, N: int) -> Tensor:
        """Rows of all stretches as those of the uniform batch [N, .], with zeros elsewhere."""
        return packed.new_zeros(N, packed.shape[1]).index_copy(0, self.steps, packed)

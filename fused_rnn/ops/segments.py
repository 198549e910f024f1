"""Lengths and resets on a CPU: every segment of a sequence becomes a sequence of a packed batch.

A segment is what lies between two resets, or a reset and an end. So the sweeps need not know of
either, and segments of one sequence run side by side. It takes a look at the values, for which a
GPU would have to be waited for.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_rnn.engines.dispatch import Backend
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.layer import NO_TENSORS, LayerInputs, LayerSpec, Options, OptionTensors, Outputs


def suit(spec: LayerSpec, inputs: LayerInputs, backend: Backend) -> bool:
    """Whether segments do for a layer: a uniform batch on a CPU with lengths and resets alone."""
    uniform = inputs.x.device.type == "cpu" and spec.layout.batch_sizes is None
    uniform = uniform and backend in ("auto", "cpu", "native")
    return uniform and spec.options == Options() and all([t is None for t in inputs.options[4:]])


def are_restarts(spec: LayerSpec, inputs: LayerInputs) -> bool:
    """Whether resets are no more than other initial states: in a single step of all sequences."""
    return spec.layout.T == 1 and inputs.options.lengths is None


def restarted(spec: LayerSpec, inputs: LayerInputs) -> tuple[LayerSpec, LayerInputs]:
    """A single step with the resets in its initial states."""
    _, reset, restart_h, restart_c, *_ = inputs.options
    assert reset is not None
    h0, c0 = _restarted(inputs.h0, reset, restart_h), inputs.c0
    if c0 is not None:
        c0 = _restarted(c0, reset, restart_c)
    inputs = inputs._replace(h0=h0, c0=c0, options=NO_TENSORS)
    return replace(spec, options=None, from_zero=False), inputs


def _restarted(state: Tensor, reset: Tensor, restart: Tensor | None) -> Tensor:
    """The initial state [D, B, .] of a single step, which the reverse direction takes as it is."""
    new = state.new_zeros(()) if restart is None else restart[0]
    first = torch.where(reset[:, None], new, state[0])
    return torch.cat([first[None], state[1:]])


@dataclass(frozen=True)
class Segments:
    """The S segments of B sequences, by decreasing length.

    Attributes:
        layout: where their steps lie.
        steps: the row in the uniform batch of each of their rows.
        sequence: [S], to which each belongs.
        first: [S], whether it is the first one of its sequence.
        last: [S], whether it is the last one.
        continues: [S], whether it takes up the initial state, no reset being before it.
    """

    layout: BatchLayout
    steps: Tensor
    sequence: Tensor
    first: Tensor
    last: Tensor
    continues: Tensor

    @classmethod
    def of(cls, layout: BatchLayout, options: OptionTensors) -> "Segments | None":
        """Those of a uniform batch; None if it has no steps at all."""
        T, B = layout.T, layout.B
        lengths = torch.full((B,), T) if options.lengths is None else options.lengths.clamp(0, T)
        reset = torch.zeros(T, B, dtype=torch.bool)
        if options.reset is not None:
            reset = options.reset.view(T, B)
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
        packed = BatchLayout.packed(within.sum(1))
        return cls(packed, steps, b, t == 0, last, (t == 0) & ~reset[0].gather(0, b))

    def pack(self, spec: LayerSpec, inputs: LayerInputs) -> tuple[LayerSpec, LayerInputs]:
        """The layer on the packed batch."""
        x, h0, c0, weights, options = inputs
        h0 = self._initial(h0, options.restart_h)
        c0 = None if c0 is None else self._initial(c0, options.restart_c)
        packed = LayerInputs(x[self.steps], h0, c0, weights)
        return replace(spec, layout=self.layout, options=None, from_zero=False), packed

    def outputs(self, packed: Outputs, inputs: LayerInputs) -> Outputs:
        """The outputs of the uniform batch with ``inputs``, of those of the packed one."""
        out = packed.out.new_zeros(inputs.x.shape[0], packed.out.shape[1])
        c_n = None
        if inputs.c0 is not None and packed.c_n is not None:
            c_n = self._final(packed.c_n, inputs.c0)
        out = out.index_copy(0, self.steps, packed.out)
        return Outputs(out, self._final(packed.h_n, inputs.h0), c_n)

    def _initial(self, state: Tensor, restart: Tensor | None) -> Tensor:
        """What each begins with [D, S, .], of the initial state [D, B, .] and that of a restart."""
        initial = state[:, self.sequence]
        other = initial.new_zeros(()) if restart is None else restart[:, None]
        takes = torch.stack([self.continues, self.last])[: len(initial), :, None]
        return torch.where(takes, initial, other)

    def _final(self, state: Tensor, initial: Tensor) -> Tensor:
        """The final states [D, B, .] of the sequences; one without steps keeps its initial one."""
        final = []
        for direction, ends in zip(range(len(state)), (self.last, self.first), strict=False):
            mine = state[direction, ends]
            final.append(initial[direction].index_copy(0, self.sequence[ends], mine))
        return torch.stack(final)

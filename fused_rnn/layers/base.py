"""What a call of a layer does: the stack of its layers, bottom up."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.layers import recording, whole_stack
from fused_rnn.layers.call import StackCall, describe, describe_layer
from fused_rnn.layers.parameters import RecurrentModule, States
from fused_rnn.ops import functional
from fused_rnn.spec.context import tracing
from fused_rnn.spec.precision import without_autocast


class FusedRNNBase(RecurrentModule):
    """The common part of FusedRNN, FusedGRU and FusedLSTM: a module whose layers run as a stack."""

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: States | None,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
        return_cell_sequence: bool = False,
    ) -> tuple[Any, ...]:
        """``output``, the final states, and c of all steps if it is asked for."""
        if recording.recording(input):
            keywords = {"lengths": lengths, "reset": reset, "mask": mask}
            return recording.record(self, input, hx, keywords, return_cell_sequence)
        options = lengths is not None or reset is not None or mask is not None
        if not (options or return_cell_sequence or tracing()):
            prepared = whole_stack.prepare(self, input, hx)
            if prepared is not None:
                return whole_stack.call(self, input, prepared)
        call = describe(self, input, hx, lengths, reset, mask, return_cell_sequence)
        sequences, states = run_stack(self, call)
        return call.shape.restore(sequences, states)


def run_stack(module: RecurrentModule, call: StackCall) -> tuple[tuple[Tensor, ...], States]:
    """All layers, bottom up: the output rows [N, D*R] of the last one, and the final states.

    Where they are asked for, c of all steps [N, D*H] stands behind the output.
    """
    x, last = call.x, module.num_layers - 1
    finals: list[States] = []
    with nullcontext() if call.dtype is None else without_autocast(x.device):
        for number in range(module.num_layers):
            spec, inputs = describe_layer(module, call, number, x)
            out, h_n, c_n, c_seq = functional.run(spec, inputs, module.backend)
            finals.append((h_n,) if c_n is None else (h_n, c_n))
            x = out
            if module.dropout > 0 and number < last:
                x = F.dropout(x, module.dropout, module.training)
    sequences = (x,) if c_seq is None else (x, c_seq)
    if last == 0:
        return sequences, finals[0]
    return sequences, tuple([torch.cat(same) for same in zip(*finals, strict=True)])

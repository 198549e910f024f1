"""Forward through a stack: a layer runs a piece of time once the layer below has run it.

The matrix products run on the current stream, in the order in which their inputs come to be, and
the sweeps of each layer on a stream beside it. All memory is allocated on the current stream. What
no backward needs has memory for two pieces.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rnn.engines.triton.engine import device_and_precision, needs_gates, saves_operand
from fused_rnn.engines.triton.products import (
    by_unit,
    contiguous,
    kernel_cell,
    own_vectors,
    recurrent_bias,
    recurrent_weights,
)
from fused_rnn.engines.wavefront.stack import (
    NOT_SAVED,
    Piece,
    Rows,
    SavedLayer,
    StackLayer,
    Wavefront,
    carried,
    cut_into_pieces,
    part,
    piece_options,
)
from fused_rnn.engines.wavefront.streams import Event, Streams
from fused_rnn.kernels.launch import Launch, launch, zero_counters
from fused_rnn.kernels.sweep import SweepOptions
from fused_rnn.kernels.sweeps import ForwardResult, prepare_forward


class StackOutputs(NamedTuple):
    """What a stack returns.

    Attributes:
        out: [N, H].
        h_n: [L, B, H].
        c_n: [L, B, K * H], or None for a cell of one state.
        saved: for backward, of each layer.
    """

    out: Tensor
    h_n: Tensor
    c_n: Tensor | None
    saved: tuple[SavedLayer, ...]


def forward(
    wave: Wavefront, layers: Sequence[StackLayer], lowest: int, masks: Sequence[Tensor] = ()
) -> StackOutputs:
    """Run a stack, and return what backward needs of layer ``lowest`` and those above it.

    ``masks`` [N, H] of dropout behind each layer but the last may have been drawn; or they are now.
    """
    layers = [StackLayer(spec, contiguous(inputs)) for spec, inputs in layers]
    x, last = layers[0].inputs.x, len(layers) - 1
    with device_and_precision(x, wave.engine.precision):
        pieces = cut_into_pieces(layers[0].spec.layout, wave.cuts.forward, x.device)
        drawn = masks or _masks(wave, layers, x)
        options = piece_options(layers, pieces)
        h, hs = _initial([inputs.h0 for _, inputs in layers])
        c, cs = _initial([inputs.c0 for _, inputs in layers])
        stack = []
        for n, (layer, mask) in enumerate(zip(layers, [*drawn, None], strict=True)):
            keep = n >= lowest, n >= min(last, lowest - 1)
            stack.append(_Layer(wave, layer, pieces, options[n], (hs[n], cs[n]), mask, *keep))
        with Streams(x.device, wave.cuts.forward.streams) as streams:
            _run(stack, pieces, Rows(pieces, x, x.shape[1], x), streams)
        out = stack[last].out.whole
        assert out is not None
        inputs = [x, *[(way.dropped or way.out).whole for way in stack[:-1]]]
        saved = [
            way.saved(below) if n >= lowest else NOT_SAVED
            for n, (way, below) in enumerate(zip(stack, inputs, strict=True))
        ]
        assert h is not None
        finals = [None if s is None else s.to(x.dtype).contiguous() for s in (h, c)]
        return StackOutputs(out, finals[0], finals[1], tuple(saved))  # type: ignore[arg-type]


def _initial(initial: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Any]]:
    """The initial states of all layers in fp32, to be overwritten; and those of each."""
    if initial[0] is None:
        return None, [None] * len(initial)
    states, each = carried(len(initial), initial[0])
    for state, value in zip(each, initial, strict=True):
        assert value is not None
        state.copy_(value)
    return states, each


def _masks(wave: Wavefront, layers: Sequence[StackLayer], x: Tensor) -> list[Tensor | None]:
    """What dropout behind each layer lets pass: what it would, of all its rows at once."""
    if wave.dropout == 0:
        return [None] * (len(layers) - 1)
    ones = [x.new_ones(spec.layout.N, spec.hidden_size) for spec, _ in layers[:-1]]
    return [F.dropout(one, wave.dropout, True) != 0 for one in ones]


def _run(stack: "Sequence[_Layer]", pieces: Sequence[Piece], x: Rows, streams: Streams) -> None:
    """All products and launches, in the order in which their inputs come to be."""
    count = stack[0].wave.cuts.forward.streams
    done: dict[tuple[int, int], Event] = {}

    def product(n: int, piece: Piece) -> None:
        stack[n].project(piece, x[piece] if n == 0 else stack[n - 1].passed_on(piece))

    for n, piece in _wave(len(stack), pieces):
        p = piece.number
        # The input of the piece, and the memory of its gates, which was that of two pieces ago.
        after = [done[key] for key in ((n - 1, p), (n, p - 2)) if key in done]
        ready = streams.run(lambda n=n, piece=piece: product(n, piece), None, *after)  # type: ignore[misc]
        sweep = lambda n=n, piece=piece: stack[n].run(piece)  # noqa: E731
        done[n, p] = streams.run(sweep, n % count, ready)


def _wave(layers: int, pieces: Sequence[Piece]) -> Iterator[tuple[int, Piece]]:
    """Layers and their pieces: front after front, whose members know nothing of each other."""
    for front in range(layers + len(pieces) - 1):
        for n in range(layers):
            if 0 <= front - n < len(pieces):
                yield n, pieces[front - n]


class _Layer:
    """One layer on its way through time: its memory, its products and its sweeps."""

    def __init__(
        self,
        wave: Wavefront,
        layer: StackLayer,
        pieces: Sequence[Piece],
        options: Sequence[SweepOptions],
        states: tuple[Tensor, Tensor | None],
        mask: Tensor | None,
        save: bool,
        keep_out: bool,
    ) -> None:
        self.wave, (self.spec, inputs), self.save = wave, layer, save
        self.options = options  # of each piece
        self.h, self.c = states  # from piece to piece, each of which overwrites them
        plan, cell, H, x = wave.engine.plan, kernel_cell(self.spec), self.spec.hidden_size, inputs.x
        N, B = self.spec.layout.N, self.spec.layout.B

        # A sweep leaves out steps beyond a sequence's end; what is kept has zeros there.
        self.ends_early = options[0].lengths is not None
        make = x.new_zeros if self.ends_early else x.new_empty

        def rows(width: int, keep: bool, dtype: torch.dtype = x.dtype) -> Rows:
            return Rows(pieces, make((N, width), dtype=dtype) if keep else None, width, x)

        self.mask = None if mask is None else Rows(pieces, mask, H, x)
        self.gates = rows(H * cell.slots, save)
        self.out = rows(H, keep_out)
        self.dropped = None if mask is None else rows(H, keep_out)
        beside = (cell.states - 1) * H
        self.c_seq = rows(beside, True, torch.float32) if beside and save else None
        kept = save and saves_operand(inputs.options)
        differs = options[0].operand_differs or self.spec.layout.batch_sizes is not None
        self.operand = rows(H, kept) if kept or (differs and plan.programs > 1) else None
        self.w_ih, self.bias = by_unit(self.spec, inputs.weights[0])
        self.w_hh = recurrent_weights(self.spec, inputs.weights)
        self.b_hn = recurrent_bias(self.spec, inputs.weights)
        self.vectors = own_vectors(inputs.weights)
        self.launched: Launch | None = None
        self.kernel: Any = None
        self.counters: Sequence[Tensor] | None = None
        if plan.programs > 1:
            self.counters = zero_counters(plan, B, 1, x.device, len(pieces)).unbind()

    def project(self, piece: Piece, x: Tensor) -> None:
        """The input product of a piece."""
        if self.ends_early and self.out.whole is None:
            self.out[piece].zero_()
        if self.bias is None:
            torch.mm(x, self.w_ih.t(), out=self.gates[piece])
        else:
            torch.addmm(self.bias, x, self.w_ih.t(), out=self.gates[piece])

    def run(self, piece: Piece) -> None:
        """The sweep through a piece."""
        layout, h, c, out = piece.layout, self.h, self.c, self.out[piece]
        gates, c_seq, operand = (
            self.gates[piece],
            part(self.c_seq, piece),
            part(self.operand, piece),
        )
        counters = None if self.counters is None else self.counters[piece.number]
        options = self.options[piece.number]
        if self.launched is not None and self.kernel is not None:
            offsets = layout.offsets(h.device)
            other = {"gates": gates, "out": out, "c_seq": c_seq, "operand_seq": operand}
            other |= {"offsets": offsets, "counters": counters}
            other |= {"lengths": options.lengths, "reset": options.reset}
            self.launched.again(self.kernel, other, layout.T, layout.B)
            return
        sweep = self.wave.sweep(self.spec, piece, options, h)
        gates = gates.view(1, layout.N, self.spec.hidden_size, sweep.cell.slots)
        self.launched, _ = prepare_forward(
            sweep,
            *(gates, self.w_hh, self.b_hn, h, c, out, self.save, False, self.vectors),
            result=ForwardResult(h, c, c_seq, operand),
        )
        self.launched.tensors["counters"] = counters
        self.kernel = launch(self.launched)

    def passed_on(self, piece: Piece) -> Tensor:
        """What the layer above takes of a piece."""
        if self.mask is None or self.dropped is None:
            return self.out[piece]
        dropped = self.dropped[piece]
        return torch.mul(self.out[piece], self.mask[piece], out=dropped).mul_(self.wave.scale)

    def saved(self, x: Tensor | None) -> SavedLayer:
        """What backward needs; x is the input."""
        gates = self.gates.whole if needs_gates(self.spec) else None
        c_seq = None if self.c_seq is None else self.c_seq.whole
        mask = None if self.mask is None else self.mask.whole
        operand = None if self.operand is None else self.operand.whole
        return SavedLayer(x, self.out.whole, gates, c_seq, mask, operand)

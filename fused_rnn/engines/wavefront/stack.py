"""What both ways through a stack share: its layers, the pieces of time, and the rows of a piece."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn.engines.triton import devices
from fused_rnn.engines.triton.engine import TritonEngine, sweep_options
from fused_rnn.engines.triton.products import kernel_cell, plan_request
from fused_rnn.kernels.pieces import Cut, Cuts, cut_stack
from fused_rnn.kernels.sweep import NONE, DeviceLayout, Sweep, SweepOptions
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.layer import LayerInputs, LayerSpec


class StackLayer(NamedTuple):
    """A layer of a stack; x is that of the first layer, in the others it stands for nothing."""

    spec: LayerSpec
    inputs: LayerInputs


class SavedLayer(NamedTuple):
    """What backward needs of a layer beside its inputs; nothing of one that it does not reach.

    Attributes:
        x: the input rows [N, I].
        out: [N, H].
        gates: [N, H * S] as the forward sweep leaves them, or None for a cell that keeps none.
        c_seq: fp32 [N, K * H], or None for a cell of one state.
        mask: bool [N, H], what dropout behind the layer let pass, or None.
        operand: [N, H], what the recurrent product of each row's step took, where that is not h0
            and the output.
    """

    x: Tensor | None
    out: Tensor | None
    gates: Tensor | None
    c_seq: Tensor | None
    mask: Tensor | None
    operand: Tensor | None


NOT_SAVED = SavedLayer(None, None, None, None, None, None)


@dataclass(frozen=True)
class Wavefront:
    """How a stack runs.

    Attributes:
        engine: that of each layer.
        cuts: of both sweeps.
        dropout: probability with which the output of each layer but the last is dropped.
    """

    engine: TritonEngine
    cuts: Cuts
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """The factor of what dropout lets pass."""
        return dropout_scale(self.dropout)

    def sweep(self, spec: LayerSpec, piece: "Piece", options: SweepOptions, like: Tensor) -> Sweep:
        """A sweep through a piece of a layer."""
        T, B, N = piece.layout.T, piece.layout.B, piece.layout.N
        layout = DeviceLayout(T, B, N, piece.layout.offsets(like.device))
        engine = self.engine
        return Sweep(kernel_cell(spec), layout, (False,), engine.precision, engine.plan, options)


def wavefront(
    engine: TritonEngine, spec: LayerSpec, x: Tensor, layers: int, dropout: float, train: bool
) -> Wavefront | str:
    """How a stack of layers like ``spec`` overlaps; or why they run one after the other."""
    chip = devices.kernel_device(x.device)
    assert chip is not None
    request = plan_request(spec, x.dtype, engine.precision)
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    limits = devices.device_limits(chip)
    how = {"train": train, "captured": captured}
    cuts = cut_stack(request, engine.plan, layers, spec.layout.T, limits, **how)
    return Wavefront(engine, cuts, dropout) if cuts.overlap else str(cuts)


def dropout_scale(p: float) -> float:
    """The factor of what dropout with a probability lets pass."""
    return 0.0 if p == 1 else 1 / (1 - p)


class Piece(NamedTuple):
    """Steps that run in one launch.

    Attributes:
        number: from 0 at the first step.
        row: the first one, of those of all steps.
        layout: where its rows lie, from that one on.
    """

    number: int
    row: int
    layout: BatchLayout


def cut_into_pieces(layout: BatchLayout, cut: Cut, device: torch.device) -> list[Piece]:
    """The pieces of a layout, with their offsets on the device."""
    parts = layout.pieces(cut.steps)
    layout.offsets_at_once([piece for _, piece in parts], device)
    return [Piece(number, *part) for number, part in enumerate(parts)]


def carried(layers: int, like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Memory for the states [1, B, W] of all layers in fp32, as ``like``; and those of each.

    Each begins at 16 bytes, as the kernels' other memory does.
    """
    size = like[0].numel()
    memory = like.new_empty(layers, -(-size // 4) * 4, dtype=torch.float32)[:, :size]
    states = memory.unflatten(1, like.shape[1:])
    return states, list(states.split(1))


class Rows:
    """Rows [N, width] piece by piece; or memory for those of two pieces, which take turns.

    Attributes:
        whole: all of them, or None.
    """

    def __init__(
        self, pieces: Sequence[Piece], whole: Tensor | None, width: int, like: Tensor
    ) -> None:
        sizes = [piece.layout.N for piece in pieces]
        self.whole = whole
        if whole is not None:
            self._parts: Sequence[Tensor] = whole.split(sizes)
        else:
            count = min(2, len(sizes))
            slots = like.new_empty(count, max(sizes), width).unbind()
            self._parts = tuple([slots[n % count][:size] for n, size in enumerate(sizes)])

    def __getitem__(self, piece: Piece) -> Tensor:
        return self._parts[piece.number]


def piece_options(
    layers: Sequence[StackLayer], pieces: Sequence[Piece]
) -> list[list[SweepOptions]]:
    """The options of each layer, piece by piece; lengths and resets are cut once for all layers."""
    (spec, inputs), *_ = layers
    if spec.options is None:
        return [[NONE] * len(pieces)] * len(layers)
    whole = sweep_options(spec, inputs.options)
    lengths: Sequence[Tensor | None] = [None] * len(pieces)
    resets = lengths
    if whole.lengths is not None:
        steps = pieces[0].layout.T
        begun = torch.arange(0, len(pieces) * steps, steps, device=inputs.x.device)[:, None]
        lengths = (whole.lengths - begun).clamp_(0, steps).to(torch.int32).unbind()
    if whole.reset is not None:
        resets = whole.reset.split([piece.layout.N for piece in pieces], 1)
    cut = [replace(whole, lengths=n, reset=r) for n, r in zip(lengths, resets, strict=True)]
    restarts = [(tensors.restart_h, tensors.restart_c) for _, (*_, tensors) in layers]
    return [[replace(one, restart_h=h, restart_c=c) for one in cut] for h, c in restarts]


def part(rows: Rows | None, piece: Piece) -> Tensor | None:
    """The rows of a piece, if there are any."""
    return None if rows is None else rows[piece]

"""The plan of a sweep, and what it is asked for. Plain Python.

Three regimes, one pair of kernels:

    persistent   One program holds the recurrent weights of a direction and carries a tile of
                 sequences through all time steps. Nothing leaves the SM but results.
    cooperative  A group of programs shares the hidden units of a batch tile. Each keeps its rows
                 of the weights; once per step h (or a part of dh) goes through L2.
    streamed     The same group where not even the whole chip holds the weights: each program reads
                 its rows through L2 in every step.

`planner.plans` finds the plans that fit, and which is best.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from fused_rnn.kernels.cell import KernelCell

Regime = Literal["persistent", "cooperative", "streamed"]
Precision = Literal["ieee", "tf32"]
MOST_TILES = 65535  # of a launch: they are the second axis of its grid


class PlanRequest(NamedTuple):
    """What is to be planned: the sweeps of one layer.

    Attributes:
        cell: the cell.
        H: hidden units.
        dtype: of the weights.
        B: sequences.
        D: directions, of heads each on its own.
        precision: of fp32 products.
        fast: allow approximate activations (16-bit types only).
        heads: of each direction of the layer; H are the units of one, and D counts them all.
    """

    cell: KernelCell
    H: int
    dtype: torch.dtype
    B: int
    D: int
    precision: Precision = "tf32"
    fast: bool = True
    heads: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the weights."""
        return self.dtype.itemsize

    @property
    def ieee(self) -> bool:
        """Whether products are in full fp32."""
        return self.itemsize == 4 and self.precision == "ieee"


class DoesNotFit(ValueError):
    """No plan, and why."""


@dataclass(frozen=True)
class Plan:
    """How both sweeps of a layer run.

    Attributes:
        regime: see above.
        block_h: hidden units of a program, a power of two; units beyond H are masked.
        block_k: of all H units, those of one tile of weights.
        block_b: sequences of a program.
        warps: warps of a program.
        k_split: forward, slices of the columns of a tile of weights, see `weights.product`.
        m_split: slices of its rows; 1 and 1 is a plain dot.
        programs: programs of a group.
        tiles: batch tiles of one launch, 0 for all; then the next launch takes on.
        directions: of one launch.
        chunks: tiles of weights along H that stay in registers.
        fast: approximate tanh and sigmoid.
        weights: where they are from step to step.
        weight_registers: registers per thread that hold weights, or would.
        shared: bytes of shared memory that the program may need.
        work: padded multiply-adds of a step over the needed ones.
        why: why not fewer programs.
        step_us: a guess of both sweeps' time per step in microseconds, all launches together;
            it ranks plans and is no measurement.
        heads: what `reason` says of the heads of the layer, if it has any.
        joined: all gates of a program's units are one tile of weights, see `products.py`.
    """

    regime: Regime
    block_h: int
    block_k: int
    block_b: int
    warps: int
    k_split: int
    m_split: int
    programs: int
    tiles: int
    directions: int
    chunks: int
    fast: bool
    weights: Literal["registers", "registers and shared", "shared", "L2"]
    weight_registers: int
    shared: int
    work: float = field(compare=False)
    step_us: float = field(compare=False)
    why: str = field(compare=False, default="")
    heads: str = field(compare=False, default="")
    joined: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash((self.regime, self.block_h, self.block_k, self.block_b, self.warps, self.tiles))

    def __hash__(self) -> int:
        """Of what differs most, and kept: every launch asks."""
        return self._hash

    @cached_property
    def reason(self) -> str:
        """The plan and what led to it."""
        text = f"{self.heads}{self}; {self.weight_registers} registers of a thread hold weights, "
        text += f"up to {self.shared // 1024} KiB of shared memory, {self.work:.2f} of the products"
        text += " that are needed"
        return f"{text}. {self.why}" if self.why else text

    def launches(self, B: int, D: int) -> Iterator[tuple[int, int, int, int]]:
        """First batch tile and number of tiles, first direction and number of them, per launch."""
        all_tiles = -(-B // self.block_b)
        tiles = min(self.tiles or all_tiles, MOST_TILES)
        for direction in range(0, D, self.directions):
            for tile in range(0, all_tiles, tiles):
                left = min(tiles, all_tiles - tile), min(self.directions, D - direction)
                yield tile, left[0], direction, left[1]

    def __str__(self) -> str:
        tile = f"{self.block_h} units x {self.block_b} sequences in {self.warps} warps"
        text = f"{self.regime}: {tile}, weights in {self.weights}"
        if self.joined:
            text += ", gates joined"
        if self.programs > 1:
            text += f", groups of {self.programs} programs"
        if self.tiles:
            text += f", up to {self.tiles} batch tiles a launch"
        return text

"""What the runner asks of everybody that it times."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bench.cases import Case
from bench.timing import Run
from fused_rnn.kernels.plan import Plan

Input = Tensor | PackedSequence
Forward = Callable[[Any], Tensor]


class Provider:
    """An implementation of a layer.

    Attributes:
        name: what its lines are called.
        exact: whether it does all that torch.nn's layer does: two directions, packed, stacks.
        loops: whether its time loop can be called without the input's product.
    """

    name: str
    exact = True
    loops = False

    def why_not(self, case: Case, mode: str, device: torch.device) -> str | None:
        """Why it cannot run a case, or None."""
        sweep = mode.startswith("sweep")
        if sweep and not self.loops:
            return "it has no time loop to be called without the input's product"
        if case.heads > 1 and not sweep:
            return "it has one head"
        if not self.exact and (case.bidirectional or case.packed):
            return "it has one direction and one length"
        if not self.exact and case.layers > 1:
            return "it has one layer"
        return None

    def detail(self, case: Case, device: torch.device) -> str:
        """How it would run."""
        return ""

    def plan(self, case: Case, device: torch.device) -> Plan | None:
        """Our kernels' plan, None for what is not ours."""
        return None

    def layer(self, plain: nn.RNNBase, case: Case) -> tuple[nn.Module, Forward]:
        """The module that owns the parameters, as many numbers as ``plain`` has, and its output."""
        raise NotImplementedError

    def input(self, x: Input) -> Input:
        """The input as it likes it, formed before the clock runs."""
        return x

    def output(self, out: Tensor) -> Tensor:
        """The output as [T, B, D * H], formed after the clock has stopped."""
        return out

    def sweep(self, case: Case, device: torch.device, train: bool) -> Run:
        """The time loops alone, with their own random numbers."""
        raise NotImplementedError


def first(layer: nn.Module) -> Forward:
    def run(x: Any) -> Tensor:
        out = layer(x)[0]
        return out.data if isinstance(out, PackedSequence) else out

    return run

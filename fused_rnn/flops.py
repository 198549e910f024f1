"""FLOPs of a layer for torch.utils.flop_counter: those of its matrix products, as for torch.nn's.

The operators of :mod:`fused_rnn.ops` have formulas. An engine that runs without them is counted by
the same ones, in place of what a counter sees of it: of a kernel nothing, of the calls of a CPU
engine a part. The eager loop and single steps consist of PyTorch's products, which it knows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from fused_rnn.problem import Engine, Grads, Layer, OutputGrads, Outputs, Saved, Specs

Size = Sequence[int]


def forward(N: int, weights: Sequence[Size | None]) -> int:
    """Those of forward: each row meets each matrix once.

    Args:
        N: rows.
        weights: sizes of the parameters.
    """
    return sum(2 * N * prod(size) for size in weights if size is not None and len(size) == 2)


def backward(
    N: int, h0: Size, weights: Sequence[Size | None], needs: Sequence[bool], need_h0: bool
) -> int:
    """Those of backward: each matrix once more, and once for its own gradient where it is wanted.

    What :attr:`fused_rnn.problem.Layer.recompute` computes again is not counted.

    Args:
        N: rows.
        h0: size of the initial states [D, B, R].
        weights: sizes of the parameters, by direction.
        needs: whether the gradient of the input is wanted, and that of each parameter.
        need_h0: whether that of the initial states is; else no step passes them one. (Counted as B
            rows; of a packed batch the reverse direction begins with fewer.)
    """
    D, B, _ = h0
    k, found = len(weights) // D, 0
    for d in range(D):
        wanted = zip(weights[d * k : (d + 1) * k], needs[1 + d * k : 1 + (d + 1) * k], strict=True)
        matrices = [(prod(size), need) for size, need in wanted if size and len(size) == 2]
        rows = [N if needs[0] else 0, N if need_h0 else N - B, N]
        for count, (size, need) in zip(rows, matrices, strict=False):
            found += 2 * (count + (N if need else 0)) * size
    return found


def counted(engine: Engine) -> Engine:
    """``engine``, or what tells the counters at work of its FLOPs."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return engine
    modes = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    counters = [counter for counter in modes if isinstance(counter, FlopCounterMode)]
    return _Counted(engine, counters) if counters else engine


class _Counted:
    """An engine whose FLOPs are counted by formula, see :class:`fused_rnn.problem.Engine`."""

    def __init__(self, engine: Engine, counters: list[FlopCounterMode]) -> None:
        self.engine, self.counters = engine, counters

    def saved_specs(self, layer: Layer, inputs: Saved) -> Specs | None:
        return self.engine.saved_specs(layer, inputs)

    def forward(self, layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
        _, weights = _sizes(layer, inputs)
        with self._as(torch.ops.fused_rnn.layer, forward(layer.rows.N, weights)):
            return self.engine.forward(layer, inputs, save)

    def backward(
        self,
        layer: Layer,
        inputs: Saved,
        out: Tensor,
        saved: Saved,
        grads: OutputGrads,
        needs: tuple[bool, ...],
    ) -> Grads:
        h0, weights = _sizes(layer, inputs)
        wanted = [needs[0], *needs[3 : 3 + len(weights)]]
        flops = backward(layer.rows.N, h0, weights, wanted, needs[1])
        with self._as(torch.ops.fused_rnn.layer_backward, flops):
            return self.engine.backward(layer, inputs, out, saved, grads, needs)

    @contextmanager
    def _as(self, operator: Any, flops: int) -> Iterator[None]:
        """Count what runs inside as ``operator``, with so many FLOPs."""
        before = [counter.get_flop_counts() for counter in self.counters]
        yield
        for counter, counts in zip(self.counters, before, strict=True):
            counter.flop_counts.clear()
            for module, operators in counts.items():
                counter.flop_counts[module].update(operators)
            for module in set(counter.mod_tracker.parents):
                counter.flop_counts[module][operator] += flops


def _sizes(layer: Layer, inputs: Saved) -> tuple[Size, list[Size | None]]:
    """Of the initial h, and of the parameters of all directions."""
    h0 = inputs[1]
    assert h0 is not None
    masks = len(layer.masks(inputs)) if layer.extras is not None else 0
    weights = inputs[3 : len(inputs) - masks]
    return h0.shape, [None if w is None else w.shape for w in weights]

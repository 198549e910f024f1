"""FLOPs of a layer for torch.utils.flop_counter: those of its matrix products, as for torch.nn's.

The operators of a traced layer have formulas. An engine that runs without them is counted by the
same ones, in place of what a counter sees of it: of a kernel nothing, of the calls of a CPU engine
a part. The eager loop and single steps consist of PyTorch's products, which it knows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from fused_rnn.spec.layer import (
    Engine,
    InputGrads,
    LayerInputs,
    LayerSpec,
    Needs,
    OutputGrads,
    Outputs,
    Saved,
    Specs,
    Weights,
)

Size = Sequence[int]


def forward(N: int, weights: Sequence[Size | None]) -> int:
    """Those of forward: each row meets each matrix once.

    Args:
        N: rows.
        weights: sizes of the parameters.
    """
    return sum(2 * N * prod(size) for size, is_matrix in _marked(weights) if is_matrix)


def backward(
    N: int, h0: Size, weights: Sequence[Size | None], needs: Sequence[bool], need_h0: bool
) -> int:
    """Those of backward: each matrix once more, and once for its own gradient where it is wanted.

    What ``recompute`` computes again is not counted.

    Args:
        N: rows.
        h0: size of the initial states [D, B, R].
        weights: sizes of the parameters, by direction.
        needs: whether the gradient of the input is wanted, and that of each parameter.
        need_h0: whether that of the initial states is; else no step passes them one. (Counted as B
            rows; of a packed batch the reverse direction begins with fewer.)
    """
    D, B, _ = h0
    k, total = len(weights) // D, 0
    for d in range(D):
        mine = _marked(weights[d * k : (d + 1) * k])
        wanted = zip(mine, needs[1 + d * k : 1 + (d + 1) * k], strict=True)
        matrices = [(prod(size), need) for (size, is_matrix), need in wanted if is_matrix]
        rows = [N if needs[0] else 0, N if need_h0 else N - B, N]
        for count, (size, need) in zip(rows, matrices, strict=False):
            total += 2 * (count + (N if need else 0)) * size
    return total


def _marked(weights: Sequence[Size | None]) -> Iterator[tuple[Size, bool]]:
    """Each size, and whether rows meet it in a product: w_ih, w_hh (of heads, too) and w_hr."""
    for i, size in enumerate(weights):
        name = Weights._fields[i % len(Weights._fields)]
        yield size or (), size is not None and name.startswith("w_")


def counted(engine: Engine) -> Engine:
    """``engine``, or what tells the counters at work of its FLOPs."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return engine
    modes = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    counters = [counter for counter in modes if isinstance(counter, FlopCounterMode)]
    return _Counted(engine, counters) if counters else engine


class _Counted:
    """An engine whose FLOPs are counted by formula, see :class:`fused_rnn.spec.layer.Engine`."""

    def __init__(self, engine: Engine, counters: list[FlopCounterMode]) -> None:
        self.engine, self.counters = engine, counters

    def saved_specs(self, spec: LayerSpec, inputs: LayerInputs) -> Specs | None:
        return self.engine.saved_specs(spec, inputs)

    def forward(self, spec: LayerSpec, inputs: LayerInputs, save: bool) -> tuple[Outputs, Saved]:
        with self._as(torch.ops.fused_rnn.layers, forward(spec.layout.N, _sizes(inputs))):
            return self.engine.forward(spec, inputs, save)

    def backward(
        self,
        spec: LayerSpec,
        inputs: LayerInputs,
        out: Tensor,
        saved: Saved,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        wanted = [needs.x, *chain.from_iterable(needs.weights)]
        flops = backward(spec.layout.N, inputs.h0.shape, _sizes(inputs), wanted, needs.h0)
        with self._as(torch.ops.fused_rnn.layers_backward, flops):
            return self.engine.backward(spec, inputs, out, saved, grads, needs)

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


def _sizes(inputs: LayerInputs) -> list[Size | None]:
    """Of the parameters of all directions."""
    return [None if w is None else w.shape for d in inputs.weights for w in d]

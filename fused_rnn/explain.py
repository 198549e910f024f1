"""What would run for a layer and an input, and why."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import ops, triton_backend
from fused_rnn.base import FusedRNNBase
from fused_rnn.checks import packed_rows
from fused_rnn.dispatch import choose
from fused_rnn.precision import autocast_dtype, rnn_precision
from fused_rnn.problem import Extras, Layer
from fused_rnn.rows import Rows


@dataclass(frozen=True)
class Explanation:
    """What runs one layer of a stack.

    Attributes:
        layer: its number, from 0 at the input.
        backend: "triton", "cpu" or "eager".
        reason: why, and for Triton by what plan.
    """

    layer: int
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.backend}: {self.reason}"


class Explanations(tuple[Explanation, ...]):
    """One :class:`Explanation` for each layer; prints one line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def problem_of(
    layer: FusedRNNBase, x: Tensor | PackedSequence
) -> tuple[Layer, torch.device, torch.dtype]:
    """What a backend would be given of ``layer`` and ``x``: the problem, its device and dtype.

    Raises:
        TypeError: ``layer`` is not a fused layer.
        ValueError: ``x`` does not fit the layer, as in a call; so RuntimeError.
    """
    if not isinstance(layer, FusedRNNBase):
        raise TypeError(f"a fused layer is needed, got {type(layer).__name__}")
    if isinstance(x, PackedSequence):
        layer.check_input(x.data, x.batch_sizes)
        rows, data = packed_rows(x), x.data
    else:
        batch_dim = 0 if layer.batch_first else 1
        data = x.unsqueeze(batch_dim) if x.dim() == 2 else x
        layer.check_input(data, None)
        rows = Rows(data.shape[1 - batch_dim], data.shape[batch_dim])
    dtype = autocast_dtype(data) or data.dtype
    zoned, dropped = layer.zoneout > 0, layer.training and layer.recurrent_dropout > 0
    clipped = layer.clip_recurrent_grad is not None and torch.is_grad_enabled()
    extras = Extras(zoned=zoned) if zoned or dropped or clipped else None
    problem = Layer(layer._cell, rows, layer._directions, layer.recompute, extras)
    return problem, data.device, dtype


def explain(
    layer: FusedRNNBase, x: Tensor | PackedSequence, gpu: int | str | None = None
) -> Explanations:
    """Tell which backend would run ``layer`` on ``x``, and why. Nothing is computed.

    Args:
        layer: a fused layer.
        x: an input that it accepts.
        gpu: ask for the kernels on a GPU that need not be here: 80, 86, 89, 90, 100, 120 or
            "gfx942".

    Raises:
        TypeError: ``layer`` is not a fused layer.
        ValueError: ``x`` does not fit the layer, as in a call, or ``gpu`` is not known; so
            RuntimeError.
    """
    problem, device, dtype = problem_of(layer, x)
    if gpu is None:
        record = torch.is_grad_enabled()
        data = x.data if isinstance(x, PackedSequence) else x  # a tensor's .data has no gradient
        tensors = (data, *layer.parameters())
        record = record and any(t.requires_grad for t in tensors)
        what = problem, device, dtype, layer.hidden_size, layer.proj_size > 0, layer.backend
        choice = choose(*what, record, recorder=not ops.tracing())
        backend, reason = str(choice.backend), choice.reason
    else:
        backend, reason = _on_gpu(problem, dtype, layer.hidden_size, layer.proj_size > 0, gpu)
    return Explanations(Explanation(number, backend, reason) for number in range(layer.num_layers))


def _on_gpu(
    problem: Layer, dtype: torch.dtype, H: int, projected: bool, gpu: int | str
) -> tuple[str, str]:
    if refusal := triton_backend.refusal(dtype, projected):
        return "eager", f"no fused kernel: {refusal}"
    from fused_rnn.kernels.plan import LIMITS, DoesNotFit
    from fused_rnn.tuning import Request, planned

    if gpu not in LIMITS:
        raise ValueError(f"gpu {gpu!r} is not known. Select from {list(LIMITS)}.")
    request = Request(
        problem.cell.name, H, dtype, problem.rows.B, problem.directions, rnn_precision()
    )
    try:
        return "triton", planned(request, LIMITS[gpu])[0].reason
    except DoesNotFit as reason:
        return "eager", f"no fused kernel: {reason}"

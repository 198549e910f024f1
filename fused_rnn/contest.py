"""Our kernels against torch.nn's own on this GPU: who was timed faster, and where that is kept.

An entry holds for what a measured plan holds for (:class:`fused_rnn.tuning.Request`), a class of
lengths, and training or inference. Where there is none, :func:`fused_rnn.native.suits_gpu` rules.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import measured
from fused_rnn.rows import Rows

if TYPE_CHECKING:
    from fused_rnn.base import FusedRNNBase
    from fused_rnn.dispatch import Backend
    from fused_rnn.tuning import Request

Input = Tensor | PackedSequence
Timer = Callable[["FusedRNNBase", Input, bool], float]  # milliseconds of a call, in training or not


def winner(request: "Request", rows: Rows, train: bool, device: torch.device) -> str | None:
    """The backend that was timed faster on ``device``, "triton" or "native"; None if none was."""
    if device.type != "cuda":
        return None
    version = measured.engines.refresh()
    case = request, (rows.T - 1).bit_length(), rows.batch_sizes is None, train, device
    found = _found.get(case)
    if found is None or found[0] != version:
        entry = measured.engines.get(_key(request, rows, train, device))
        found = _found[case] = version, entry if entry in ("triton", "native") else None
    return found[1]


_found: "dict[tuple[Request, int, bool, bool, torch.device], tuple[int, str | None]]" = {}


def hold(
    layer: "FusedRNNBase",
    x: Input,
    request: "Request",
    rows: Rows,
    device: torch.device,
    timer: Timer | None = None,
) -> None:
    """Time both in inference and, if the layer trains, in training; remember the winners.

    Args:
        layer: a fused layer, whose kernels run on ``device``.
        x: an input that it accepts.
        request: what its kernels are asked for.
        rows: those of ``x``.
        device: a GPU.
        timer: milliseconds of ``layer(x)``, and with True of its backward, too; by default it runs.

    Raises:
        OSError: a winner cannot be written; this process uses it nevertheless.
    """
    timer = timer or time_call
    trains = any(p.requires_grad for p in layer.parameters()) and not layer.recompute
    for train in (False, True) if trains else (False,):
        times = {name: timer(_twin(layer, name), x, train) for name in ("triton", "native")}
        best = min(times, key=times.__getitem__)
        measured.engines.remember(_key(request, rows, train, device), best)


def time_call(layer: "FusedRNNBase", x: Input, train: bool) -> float:
    """Median milliseconds of a call, and with ``train`` of the gradients of the parameters."""
    from triton.testing import do_bench

    wanted = [p for p in layer.parameters() if p.requires_grad]

    def call() -> None:
        with torch.set_grad_enabled(train):
            output, _ = layer.forward(x)  # without the user's hooks
            if train:
                rows = output.data if isinstance(output, PackedSequence) else output
                torch.autograd.grad(rows.sum(), wanted, allow_unused=True)

    data = x.data if isinstance(x, PackedSequence) else x
    with torch.cuda.device(data.device):
        return float(do_bench(call, return_mode="median"))


def _twin(layer: "FusedRNNBase", backend: "Backend") -> "FusedRNNBase":
    """The layer with another backend, its parameters shared."""
    twin = copy.copy(layer)
    twin.backend = backend
    return twin


def _key(request: "Request", rows: Rows, train: bool, device: torch.device) -> str:
    kind = "training" if train else "inference"
    length = f"T<={1 << (rows.T - 1).bit_length()}" + " packed" * (rows.batch_sizes is not None)
    return f"{kind} {length} {request.key(device)}"

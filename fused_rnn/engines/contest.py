"""Our kernels against torch.nn's own on this GPU: who was timed faster, and where that is kept.

An entry holds for what a measured plan holds for (:func:`fused_rnn.engines.triton.plans.key`), a
class of lengths, and training or inference. :func:`fused_rnn.tune` makes it. Where there is none,
:func:`fused_rnn.engines.native_rules.suits_gpu` rules.
"""

import torch

from fused_rnn.engines import measured
from fused_rnn.engines.triton import plans
from fused_rnn.kernels.plan import PlanRequest
from fused_rnn.spec.batch import BatchLayout


def winner(
    request: PlanRequest, layout: BatchLayout, train: bool, device: torch.device
) -> str | None:
    """The backend that was timed faster on ``device``, "triton" or "native"; None if none was."""
    if device.type != "cuda":
        return None
    version = measured.engines.refresh()
    case = request, (layout.T - 1).bit_length(), layout.batch_sizes is None, train, device
    known = _known.get(case)
    if known is None or known[0] != version:
        entry = measured.engines.get(key(request, layout, train, device))
        known = _known[case] = version, entry if entry in ("triton", "native") else None
    return known[1]


_known: "dict[tuple[PlanRequest, int, bool, bool, torch.device], tuple[int, str | None]]" = {}


def key(request: PlanRequest, layout: BatchLayout, train: bool, device: torch.device) -> str:
    """The entry of a layer and a batch."""
    kind = "training" if train else "inference"
    length = f"T<={1 << (layout.T - 1).bit_length()}" + " packed" * (layout.batch_sizes is not None)
    return f"{kind} {length} {plans.key(request, device)}"

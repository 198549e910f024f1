"""Time the best plans of a layer on this GPU, and our kernels against torch.nn's own."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.engines import contest, measured, native
from fused_rnn.engines.dispatch import Backend
from fused_rnn.engines.triton.devices import device_limits
from fused_rnn.engines.triton.plans import measure
from fused_rnn.engines.triton.products import plan_request
from fused_rnn.engines.triton.support import make_engine
from fused_rnn.kernels.plan import Plan, PlanRequest
from fused_rnn.layers.base import FusedRNNBase
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.tools.explain import first_layer

Input = Tensor | PackedSequence
Timer = Callable[[FusedRNNBase, Input, bool], float]  # milliseconds of a call, in training or not


def tune(layer: FusedRNNBase, x: Tensor | PackedSequence) -> tuple[Plan, ...]:
    """Time the best plans for ``layer`` on inputs like ``x``, and use the winner from now on.

    The winner then meets torch.nn's own kernels, in inference and in training; where those are
    faster, ``backend="auto"`` takes them for inputs of this kind from now on.

    Args:
        layer: a fused layer on a GPU.
        x: an input that it accepts; its batch size counts, and for the last of this its length.

    Returns:
        the plan of each layer of the stack

    Raises:
        OSError: the winner cannot be written; this process uses it nevertheless.
        RuntimeError: the layer would not run on Triton kernels, with the reason.
        TypeError: ``layer`` is not a fused layer.
        ValueError: ``x`` does not fit the layer, as in a call.
    """
    spec, inputs = first_layer(layer, x)
    device, dtype = inputs.x.device, inputs.x.dtype
    engine = make_engine(spec, device, dtype)
    if isinstance(engine, str):
        raise RuntimeError(f"there is nothing to tune: {engine}")
    if device.type != "cuda":
        raise RuntimeError("there is nothing to tune: Triton's interpreter runs these kernels")
    request = plan_request(spec, dtype, engine.precision)
    plan = measure(request, device_limits(device), device)
    if native.why_not(spec, device) is None:
        hold(layer, x, request, spec.layout, device)
    return (plan,) * layer.num_layers


def hold(
    layer: FusedRNNBase,
    x: Input,
    request: PlanRequest,
    layout: BatchLayout,
    device: torch.device,
    timer: Timer | None = None,
) -> None:
    """Time both in inference and, if the layer trains, in training; remember the winners.

    Args:
        layer: a fused layer, whose kernels run on ``device``.
        x: an input that it accepts.
        request: what its kernels are asked for.
        layout: that of ``x``.
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
        measured.engines.remember(contest.key(request, layout, train, device), best)


def time_call(layer: FusedRNNBase, x: Input, train: bool) -> float:
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


def _twin(layer: FusedRNNBase, backend: Backend) -> FusedRNNBase:
    """The layer with another backend, its parameters shared."""
    twin = copy.copy(layer)
    twin.backend = backend
    return twin

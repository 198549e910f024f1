"""Which backend runs a layer, and why.

Nothing falls back silently: a forced backend that cannot run raises, and ``auto`` gives its reason.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from fused_rnn import cpu, onednn
from fused_rnn.problem import Engine, Layer, Saved

Backend = Literal["auto", "triton", "cpu", "eager"]


@dataclass(frozen=True)
class Choice:
    """The backend that runs a layer.

    Attributes:
        backend: "triton", "cpu" or "eager".
        engine: what implements it; None for the eager loop, which autograd differentiates itself.
        reason: why this one.
    """

    backend: Backend
    engine: Engine | None
    reason: str


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` names one."""
    if backend not in get_args(Backend):
        raise ValueError(f"Unknown backend '{backend}'. Select from {get_args(Backend)}.")


def choose(layer: Layer, inputs: Saved, backend: Backend) -> Choice:
    """Choose for this layer and these inputs.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        RuntimeError: the backend that ``backend`` insists on cannot run this.
    """
    check_backend(backend)
    if backend == "eager":
        return Choice("eager", None, "asked for")
    x = inputs[0]
    assert x is not None
    if backend == "triton":
        raise RuntimeError(
            f"backend='triton' cannot run {layer.cell.name} with input {tuple(x.shape)} on "
            f"{x.device}: this release has no Triton kernels yet; use backend='auto'"
        )
    if x.device.type == "cpu":
        return _choose_cpu(layer, inputs)
    if backend == "cpu":
        raise RuntimeError(
            f"backend='cpu' needs tensors on the CPU, but the input is on {x.device}"
        )
    return Choice("eager", None, f"this release has no fused kernels for {x.device.type} yet")


def _choose_cpu(layer: Layer, inputs: Saved) -> Choice:
    refusal = onednn.why_not(layer, inputs)
    if refusal is None:
        return Choice("cpu", onednn, "oneDNN's fused LSTM is the faster one here")
    return Choice("cpu", cpu, f"PyTorch sweeps; not oneDNN: {refusal}")

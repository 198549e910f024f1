"""Whether the Triton engine can run a layer, and by which plan. Triton is imported only if so."""

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from fused_rnn.engines.triton import devices
from fused_rnn.engines.triton.plans import choose_plan
from fused_rnn.engines.triton.products import plan_request
from fused_rnn.kernels.plan import DoesNotFit, Precision
from fused_rnn.spec.layer import LayerSpec
from fused_rnn.spec.precision import rnn_precision

if TYPE_CHECKING:
    from fused_rnn.engines.triton.engine import TritonEngine

OLDEST_TRITON = (3, 6)  # the kernels are compiled by 3.6 and 3.9 in tests
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache
def refusal_of_triton() -> str | None:
    """Why no kernel can be compiled here at all, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    import triton

    major, minor, *_ = triton.__version__.split(".")
    if (int(major), int(minor)) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"the kernels need Triton {oldest} or newer, not {triton.__version__}"
    return None


def refusal_of_dtype(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for a type at all, or None."""
    if reason := refusal_of_triton():
        return reason
    if dtype not in DTYPES:
        return f"there are kernels for float32, float16 and bfloat16, not for {dtype}"
    return None


def refusal(spec: LayerSpec, dtype: torch.dtype) -> str | None:
    """Why no GPU could run a layer, or None."""
    if reason := refusal_of_dtype(dtype):
        return reason
    if spec.projected:
        return "there are no kernels for projections (proj_size)"
    kernels, zoned = spec.cell.kernels, spec.options is not None and spec.options.zoned
    if kernels is None:
        return spec.cell.no_kernels
    if zoned and kernels.states > 1 and kernels.functions().others is None:
        return f"there are no kernels for {spec.cell.name} with zoneout"
    return None


def make_engine(spec: LayerSpec, device: torch.device, dtype: torch.dtype) -> "TritonEngine | str":
    """The engine for a layer, or why there is none."""
    chip = devices.kernel_device(device)
    if chip is None:
        return f"Triton runs on CUDA and ROCm devices, not on {device.type}"
    if reason := refusal(spec, dtype):
        return reason
    # 16-bit products have no such switch, and the interpreter has no tensor cores.
    switched = chip.type == "cuda" and dtype == torch.float32
    precision: Precision = rnn_precision() if switched else "ieee"
    request = plan_request(spec, dtype, precision)
    try:
        plan = choose_plan(request, devices.device_limits(chip), chip)
    except devices.UnknownDevice as unknown:
        return f"no plan for {unknown}"
    except DoesNotFit as reason:
        return str(reason)
    return _engine_class()(plan, precision)


@lru_cache
def _engine_class() -> "type[TritonEngine]":
    from fused_rnn.engines.triton.engine import TritonEngine  # which imports Triton

    return TritonEngine

"""Where the kernels of a tensor run, and what that chip offers: all that is asked of GPUs.

An emulator that runs the kernels of CPU tensors replaces :func:`kernel_device`; every choice of the
package follows.
"""

import math
import os
import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from fused_rnn.engines import measured
from fused_rnn.kernels.chips import LIMITS, Limits


class UnknownDevice(LookupError):
    """A GPU older than, or unlike, all that the table of limits knows."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def kernel_device(device: torch.device) -> torch.device | None:
    """The device that runs the kernels of tensors on ``device``, or None.

    A CPU does, where Triton's interpreter is switched on.
    """
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return device
    return None


@lru_cache
def device_limits(device: torch.device) -> Limits:
    """What a device that runs kernels offers.

    That is the table's entry for its architecture with its own counts, and what
    ``python -m fused_rnn.check --remember`` measured on it.

    Raises:
        UnknownDevice: no entry is like it.
    """
    if device.type == "cpu":  # one program after the other: none can wait; and no inline assembly
        return replace(LIMITS[80], groups=False, fast_tanh=False)
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        if name not in LIMITS:
            raise UnknownDevice(name)
        return replace(LIMITS[name], sms=properties.multi_processor_count)
    capability = 10 * properties.major + properties.minor
    known = [k for k in LIMITS if isinstance(k, int) and k <= capability]
    if not known:
        raise UnknownDevice(f"sm_{capability}")
    limits = replace(
        LIMITS[max(known)],
        sms=properties.multi_processor_count,
        shared=properties.shared_memory_per_block_optin,
        sm_shared=properties.shared_memory_per_multiprocessor,
    )
    limits = replace(limits, most_programs=_refused.get(device))
    hop_us = measured.constants.get(hop_key(device))
    measured_well = isinstance(hop_us, (int, float)) and 0 < hop_us < math.inf
    return replace(limits, hop_us=float(hop_us)) if measured_well else limits


_refused: dict[torch.device, int] = {}


def limit_programs(device: torch.device, programs: int) -> None:
    """Plan groups with at most so many programs in a launch, since the driver refused more.

    It may hold less than the chip does, where processes share it (MPS) or it is cut (MIG).
    """
    known = _refused.get(device)
    if known is None:
        warnings.warn(
            f"{device} refused a cooperative launch that its multiprocessors have room for: it may "
            "be shared (MPS) or cut (MIG). Layers are planned with fewer programs from now on.",
            stacklevel=2,
        )
    # Backward may still ask for what another layer has been refused since its forward.
    _refused[device] = programs if known is None else min(programs, known)
    device_limits.cache_clear()


def hop_key(device: torch.device) -> str:
    """The entry of the barrier's cost among the measured constants."""
    return f"hop_us {measured.place(device)}"


def remember_hop(device: torch.device, us: float) -> None:
    """Let the planner reckon with ``us`` microseconds for a barrier among programs."""
    measured.constants.remember(hop_key(device), us)
    device_limits.cache_clear()

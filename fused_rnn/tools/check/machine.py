"""What a report has to say of the machine and the versions."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fused_rnn import __version__
from fused_rnn.engines.triton.devices import device_limits
from fused_rnn.tools.check.rows import where


def header() -> dict[str, Any]:
    """GPU, versions, CPU; None where there is nothing to say."""
    device, chip, kernels = where()
    facts: dict[str, Any] = {"gpu": None, "driver": None, "kernels": kernels, "hop_us": None}
    gpu = chip if chip is not None and chip.type == "cuda" else device
    if gpu.type == "cuda":
        emulated = " (emulated)" if device.type == "cpu" else ""
        facts["gpu"] = torch.cuda.get_device_name(gpu) + emulated
        facts["driver"] = None if emulated else _driver()
    if chip is not None and device_limits(chip).groups:
        facts["hop_us"] = device_limits(chip).hop_us
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return facts | {
        "fused_rnn": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "rocm": torch.version.hip,
        "triton": _version("triton"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Of the first GPU: all have the same one."""
    if torch.version.hip:
        file = Path("/sys/module/amdgpu/version")
        return file.read_text().strip() if file.exists() else None
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None


def _cpu() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""All that these scripts know of the package. Adapt this file when names change.

Public: FusedLSTM, FusedGRU, FusedRNN, explain. Private, each used by one stage:

    sweeps    bench      bench.cases.Case, bench.sweeps.ours,
                         cells.builtin.CELLS, kernels.plan.PlanRequest,
                         engines.triton.plans.choose_plan, devices.device_limits
    barrier   barrier    kernels.group.arrive, wait and LINE
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fused_rnn

CELLS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "lstm": (nn.LSTM, fused_rnn.FusedLSTM, {}),
    "gru": (nn.GRU, fused_rnn.FusedGRU, {}),
    "rnn": (nn.RNN, fused_rnn.FusedRNN, {}),
    "relu": (nn.RNN, fused_rnn.FusedRNN, {"nonlinearity": "relu"}),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}
NAMES = {"rnn": "rnn_tanh", "relu": "rnn_relu"}  # the kernels' names of cells


def plan_of(layer: nn.Module, x: Any) -> str:
    """What runs a layer, and why."""
    return str(fused_rnn.explain(layer, x)[0].reason)


def sweeps(
    cell: str,
    dtype: str,
    T: int,
    B: int,
    H: int,
    device: torch.device,
) -> tuple[dict[str, Callable[[], Any]], Any]:
    """The time loops alone, "forward" and "both", under a layer's plan; and that plan."""
    from bench.cases import Case
    from bench.sweeps import ours
    from fused_rnn.cells.builtin import CELLS as KNOWN
    from fused_rnn.engines.triton.devices import device_limits
    from fused_rnn.engines.triton.plans import choose_plan
    from fused_rnn.kernels.plan import PlanRequest

    gpu = torch.device("cuda", 0)
    name = NAMES.get(cell, cell)
    precision: Any = "ieee" if dtype == "ieee" else "tf32"
    request = PlanRequest(KNOWN[name].kernels, H, DTYPES[dtype], B, 1, precision)  # type: ignore[arg-type]
    plan = choose_plan(request, device_limits(gpu), gpu)
    case = Case(name, "fp32" if dtype == "ieee" else dtype, T, B, H, H)
    return {
        "forward": ours(case, device, plan, False),
        "both": ours(case, device, plan, True),
    }, plan


def barrier() -> tuple[Any, Any, int]:
    """arrive(counters, step), wait(counters, step, programs), int32 of each of a group's two."""
    from fused_rnn.kernels import group

    return group.arrive, group.wait, int(getattr(group.LINE, "value", group.LINE))

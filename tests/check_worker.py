"""A child of `python -m fused_rnn.check` with three small rows, whose layers have faults.

python tests/check_worker.py '{"FusedGRU": "wrong"}' TASK
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, whatever is installed

import torch

import fused_rnn
from fused_rnn.tools.check import child
from fused_rnn.tools.check.rows import Row

SIZE: dict[str, Any] = {"T": 3, "B": 2, "I": 3, "H": 4, "timed_steps": 3}


def spoil(layer: Any, fault: str) -> None:
    right = layer.forward

    def forward(self: Any, *args: Any) -> Any:
        out, final = right(self, *args)
        if fault == "wrong":
            return out * 1.01, final
        if fault == "not a number":
            return out * float("nan"), final
        if fault == "unrepeatable":
            return out + 1e-6 * torch.rand(()), final
        if fault == "hang":
            time.sleep(1000)
        if fault == "crash":
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        raise RuntimeError(fault)

    layer.forward = forward


def main() -> None:
    faults = json.loads(sys.argv.pop(1))
    for name, fault in faults.items():
        spoil(getattr(fused_rnn, name), fault)
    header = child.header
    child.header = lambda: header() | {"kernels": "tested elsewhere"}
    child.rows = lambda **_: [
        Row("rnn_tanh", "fp32", "persistent", **SIZE),  # a CPU has no such thing
        Row("gru", "fp32", "native", **SIZE),
        Row("lstm", "fp32", "native", **SIZE),
    ]
    print("not for the parent")
    child.main()


if __name__ == "__main__":
    main()

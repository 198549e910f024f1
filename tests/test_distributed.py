"""DDP and FSDP2 in two CPU processes: gradients are those of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

WORKER = Path(__file__).with_name("distributed_worker.py")
CASES = ["ddp", "static graph", "uneven inputs", "empty batch", "fsdp", "fsdp without resharding"]


@pytest.mark.slow
def test_gradients_of_two_processes() -> None:
    """One launch for all cases: starting two interpreters takes longer than they do."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("PyTorch was built without torch.distributed or gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, str(WORKER)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("ok ")] == [
        f"ok {case}" for case in CASES
    ]

"""Run by test_long_and_memory.py in a fresh process, whose memory nothing else has grown.

Prints for each case its name, and the Python objects and bytes that 200 training steps leave.
"""

import gc
import itertools
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn

LENGTHS = itertools.cycle(range(4, 9))


def uniform() -> torch.Tensor:
    """A batch, of another T at each call."""
    return torch.randn(next(LENGTHS), 16, 8)


def ragged() -> PackedSequence:
    """Sequences of other lengths at each call."""
    lengths = torch.randint(1, 9, (16,)).tolist()
    return pack_sequence([torch.randn(n, 8) for n in lengths], enforce_sorted=False)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def growth(step: Callable[[], Any]) -> tuple[int, int]:
    """Without garbage collection: a cycle would keep the tensors of a step until the next one."""
    for _ in range(20):
        step()
    gc.collect()
    gc.disable()
    objects, memory = len(gc.get_objects()), resident()
    for _ in range(200):
        step()
    objects, memory = len(gc.get_objects()) - objects, resident() - memory
    gc.enable()
    return objects, memory


def trainer(layer: torch.nn.Module, make: Callable[[], Any]) -> Callable[[], Any]:
    """A training step, which returns the graph that it has gone through."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)

    def step() -> Any:
        optimizer.zero_grad()
        output = layer(make())[0]
        loss = (output if isinstance(output, torch.Tensor) else output.data).square().mean()
        loss.backward(retain_graph=True)
        optimizer.step()
        return loss

    return step


def main() -> None:
    """What one step saves, an eighth of a MiB and more, would be 25 MiB if it were kept."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options: dict[str, Any] = {"input_size": 8, "hidden_size": 32, "bidirectional": True}
    rnn, gru, lstm = fused_rnn.FusedRNN, fused_rnn.FusedGRU, fused_rnn.FusedLSTM
    steps = {
        "rnn": trainer(rnn(**options), uniform),
        "gru": trainer(gru(**options), uniform),
        "ragged": trainer(gru(**options), ragged),
        "recompute": trainer(gru(**options, recompute=True), uniform),
        "eager": trainer(gru(**options, backend="eager"), uniform),
        "onednn": trainer(lstm(**options), uniform),
        "projected": trainer(lstm(**options, proj_size=4), uniform),
    }
    kept: list[Any] = []
    leak = trainer(gru(**options), uniform)
    steps["leak"] = lambda: kept.append(leak())
    for name, step in steps.items():
        print(name, *growth(step), flush=True)


if __name__ == "__main__":
    sys.exit(main())

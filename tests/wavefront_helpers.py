"""Stacks that overlap on a CPU: cut as a test wants it, on streams in any order that they allow."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from fused_rnn.engines.wavefront import backward, forward, stack
from fused_rnn.kernels.pieces import Cut, Cuts
from fused_rnn.ops import functional

Work = Callable[[], None]


class Shuffled:
    """Streams whose work is done in the end, in a random order that streams and events allow."""

    rng = random.Random(0)

    def __init__(self, device: torch.device, count: int) -> None:
        self.queues: list[list[tuple[int, Work | None, tuple[int, ...]]]] = [
            [] for _ in range(count + 1)
        ]
        self.count = 0

    def run(self, work: Work | None, stream: int | None, *after: int) -> int:
        self.count += 1
        self.queues[-1 if stream is None else stream].append((self.count, work, after))
        return self.count

    def __enter__(self) -> "Shuffled":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        done: set[int] = set()
        while kind is None and any(self.queues):
            ready = [q for q in self.queues if q and done.issuperset(q[0][2])]
            assert ready, "streams wait for each other"
            number, work, _ = self.rng.choice(ready).pop(0)
            if work is not None:
                work()
            done.add(number)


def there_are_streams(device: torch.device) -> bool:
    """In the place of `functional.overlaps`; no mock, into which Dynamo does not look."""
    return True


def there_are_none(device: torch.device) -> bool:
    return False


@contextmanager
def overlapping(steps: int, streams: int = 3, seed: int = 0) -> Iterator[list[int]]:
    """Cut all stacks into pieces of so many steps; yields the layers of those that were cut."""
    cut: list[int] = []

    def cut_stack(
        request: Any, plan: Any, layers: int, T: int, limits: Any, *, train: bool, captured: bool
    ) -> Cuts:
        cut.append(layers)
        one = Cut(-(-T // steps), steps, min(layers, streams), f"in pieces of {steps} steps")
        return Cuts(one, one if train else None)

    Shuffled.rng = random.Random(seed)
    with (
        mock.patch.object(stack, "cut_stack", cut_stack),
        mock.patch.object(functional, "overlaps", there_are_streams),
        mock.patch.object(forward, "Streams", Shuffled),
        mock.patch.object(backward, "Streams", Shuffled),
    ):
        yield cut

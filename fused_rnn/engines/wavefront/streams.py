"""Streams of a GPU, and who waits for whom."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

Event = Any  # a point in the work of a stream, for which others can wait
Work = Callable[[], None]


class Streams:
    """The current stream of a device, and others beside it that it waits for in the end.

    Example::

        with Streams(device, 2) as streams:
            ready = streams.run(product, None)    # on the current stream
            done = streams.run(sweep, 0, ready)   # on the first beside it, once it may
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.main = torch.cuda.current_stream(device)
        self.others = _own_streams(device, count)
        self.used: set[int] = set()

    def run(self, work: Work | None, stream: int | None, *after: Event) -> Event:
        """Put what ``work`` launches on a stream, None for the current one, behind events."""
        place = self.main if stream is None else self.others[stream]
        for event in after:
            place.wait_event(event)
        if stream is None:
            if work is not None:
                work()
        elif work is not None:
            self.used.add(stream)
            torch.cuda.set_stream(place)  # a context manager would take longer
            try:
                work()
            finally:
                torch.cuda.set_stream(self.main)
        return place.record_event()

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *_: object) -> None:
        # After an error, too: memory in use must not be freed. A stream that had no work is no part
        # of a CUDA graph that records this one.
        for stream in self.used:
            self.main.wait_stream(self.others[stream])


def overlaps(device: torch.device) -> bool:
    """Whether a device has streams whose work overlaps. AMD's have not been tried."""
    return device.type == "cuda" and torch.version.hip is None


class _Local(threading.local):
    def __init__(self) -> None:
        self.streams: dict[torch.device, list[torch.cuda.Stream]] = {}


_local = _Local()


def _own_streams(device: torch.device, count: int) -> Sequence[torch.cuda.Stream]:
    """Those of this thread: of PyTorch's 32, so that graphs and threads seldom share one."""
    known = _local.streams.setdefault(device, [])
    while len(known) < count:
        known.append(torch.cuda.Stream(device))
    return known[:count]

"""What was measured on the GPUs at hand: JSON files, by default in `~/.cache/fused_rnn`.

The environment variable FUSED_RNN_CACHE names another folder. An entry holds for one GPU and the
versions of Triton and this package, which stand in its key.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from fused_rnn._version import __version__

SECONDS = 1.0  # between two looks at a file: a call of a layer takes less time than a look


class Store:
    """One file of entries, as this process sees it.

    Attributes:
        name: of the file.
        version: counts the changes seen so far, for caches of what follows from the entries.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = 0
        self._next_look = 0.0
        self._seen: tuple[Path, int] | None = None
        self._entries: dict[str, Any] = {}

    def refresh(self) -> int:
        """Look at the file, if the last look is a while ago; returns ``version``."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + SECONDS
            self._look()
        return self.version

    def get(self, key: str) -> Any:
        """An entry, or None."""
        self.refresh()
        return self._entries.get(key)

    def remember(self, key: str, value: Any) -> None:
        """Write an entry; what others wrote meanwhile stays."""
        self._look()
        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")  # replaced at once: others may be reading
        fresh.write_text(json.dumps(self._entries | {key: value}, indent=1, sort_keys=True))
        fresh.replace(path)
        self._look()

    def forget(self) -> None:
        """Look at the file anew at the next use: the folder may be another one."""
        self._next_look = 0.0

    def _path(self) -> Path:
        folder = os.environ.get("FUSED_RNN_CACHE")
        return (Path(folder) if folder else Path.home() / ".cache" / "fused_rnn") / self.name

    def _look(self) -> None:
        path = self._path()
        try:
            seen = path, path.stat().st_mtime_ns
        except FileNotFoundError:
            seen = path, 0
        if seen != self._seen:
            self._entries = json.loads(path.read_text()) if seen[1] else {}
            self._seen = seen
            self.version += 1


plans = Store("plans.json")
constants = Store("constants.json")


def place(device: torch.device) -> str:
    """The part of a key that says where, and by which versions, something was measured."""
    import triton

    name = torch.cuda.get_device_name(device).replace(" ", "-")
    return f"{name} triton-{triton.__version__} fused_rnn-{__version__}"

"""What was measured on the GPUs at hand: JSON files, by default in `~/.cache/fused_rnn`.

The environment variable FUSED_RNN_CACHE names another folder. An entry holds for one GPU and the
versions of Triton and this package, which stand in its key.
"""

import json
import os
import threading
import time
import uuid
import warnings
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
        self._lock = threading.Lock()
        self._seen: Any = None
        self._entries: dict[str, Any] = {}
        self._unwritten: dict[str, Any] = {}

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
        return self._unwritten.get(key, self._entries.get(key))

    def remember(self, key: str, value: Any) -> None:
        """Write an entry; what others wrote meanwhile stays.

        Raises:
            OSError: it cannot be written. This process knows it nevertheless.
        """
        with self._lock:
            self._unwritten[key] = value
            self.version += 1
            self._look()
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            # Replaced at once: others may be reading, or writing theirs.
            fresh = path.with_suffix(f".{uuid.uuid4().hex}")
            try:
                entries = self._entries | self._unwritten
                fresh.write_text(json.dumps(entries, indent=1, sort_keys=True))
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
            self._look()
            self._unwritten.clear()

    def forget(self) -> None:
        """Look at the file anew at the next use: the folder may be another one."""
        self._next_look = 0.0

    def _path(self) -> Path:
        folder = os.environ.get("FUSED_RNN_CACHE")
        try:
            return (Path(folder) if folder else Path.home() / ".cache" / "fused_rnn") / self.name
        except RuntimeError as error:  # there is no home
            raise FileNotFoundError(f"{error} FUSED_RNN_CACHE can name a folder.") from error

    def _look(self) -> None:
        """Read the file if it has changed."""
        seen: Any
        try:
            path = self._path()
            now = path.stat()
            seen = path, now.st_mtime_ns, now.st_ino, now.st_size  # the clock alone is too coarse
        except OSError as error:
            seen = str(error)
        if seen != self._seen:
            self._entries, self._seen = self._read(), seen
            self.version += 1

    def _read(self) -> dict[str, Any]:
        """The entries; none, with a warning, if the file is broken: calls of layers go on."""
        try:
            entries = json.loads(self._path().read_text())
            if isinstance(entries, dict):
                return entries
            trouble = f"it has {type(entries).__name__}, not an object"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            trouble = str(error)
        warnings.warn(
            f"{self.name}, what was measured on this GPU, cannot be read and counts for nothing: "
            f"{trouble} ({self._path()})",
            stacklevel=2,
        )
        return {}


plans = Store("plans.json")
engines = Store("engines.json")
constants = Store("constants.json")


def place(device: torch.device) -> str:
    """The part of a key that says where, and by which versions, something was measured."""
    import triton

    name = torch.cuda.get_device_name(device).replace(" ", "-")
    return f"{name} triton-{triton.__version__} fused_rnn-{__version__}"

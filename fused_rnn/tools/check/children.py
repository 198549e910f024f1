"""Processes and limits: a row that hangs or crashes is red, and does not end the others."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import IO, Any

COMMAND = (sys.executable, "-m", "fused_rnn.tools.check.child")
START = 120.0  # seconds in which a child has imported PyTorch and found its GPU
GRACE = 20.0  # seconds in which a killed child is gone

Event = dict[str, Any]


class Child:
    """A process that tells events, and that does not outlive the ``with``."""

    def __init__(self, command: Sequence[str], task: Event, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, json.dumps(task)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        assert self._process.stdout is not None
        arguments = (self._process.stdout,)
        self._thread = threading.Thread(target=self._listen, args=arguments, daemon=True)
        self._thread.start()

    def _listen(self, lines: IO[str]) -> None:
        """Put events into the queue, None at the end: a queue can be waited for with a limit."""
        with lines:
            for line in lines:
                # No line that was cut off, nor what was printed before the child had a say.
                if line.startswith('{"') and line.endswith("}\n"):
                    self._events.put(json.loads(line))
        self._events.put(None)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:  # a driver may hold a process for ever
            return
        self._thread.join()  # nobody else has the other end of the pipe
        self._errors.close()

    def next(self, seconds: float) -> Event | None:
        """The next event, or None at the end of the process.

        Raises:
            Empty: there was none for so long.
        """
        return self._events.get(timeout=seconds)

    def end(self) -> str:
        """How the process ended, and its last words."""
        code = self._process.wait()
        self._errors.seek(0)
        words = [line.strip() for line in self._errors if line.strip()]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"CRASHED with {how}" + (f": {words[-1]}" if words else "")


def run(
    task: Event,
    environment: dict[str, str],
    limit: float,
    listen: Callable[[Event], None] = lambda _: None,
    command: Sequence[str] = COMMAND,
) -> tuple[Event, list[Event]]:
    """Have children do all items of a task.

    Args:
        task: see :mod:`fused_rnn.tools.check.child`.
        environment: of the children.
        limit: seconds that one item may take.
        listen: is given every event.
        command: starts a child; the task is its last argument.

    Returns:
        the header and the items with their results. If no child comes as far as that, the header
        is empty and the only item says why.
    """
    header: Event = {}
    items: dict[str, Event] | None = None
    done: dict[str, Event] = {}
    while items is None or len(done) < len(items):
        before, trouble, begun = len(done), "", ""
        with Child(command, {**task, "done": list(done)}, environment) as child:
            while items is None or len(done) < len(items):
                seconds = limit if begun else max(START, limit)
                try:
                    event = child.next(seconds)
                except Empty:
                    trouble = f"HUNG after {seconds:.0f} s"
                    break
                if event is None:
                    trouble = child.end()
                    break
                if "header" in event:
                    header = event["header"]
                elif "items" in event and items is None:
                    items = {item["name"]: item for item in event["items"]}
                elif "begins" in event:
                    begun = event["begins"]
                elif items is not None and "notes" in event:
                    name = event.pop("notes")
                    items[name] |= event
                elif items is not None and "ends" in event:
                    begun = ""
                    name = event["ends"]
                    done[name] = items[name] | {k: v for k, v in event.items() if k != "ends"}
                listen(event)
        if items is None:
            return header, [{"kind": "start", "name": "start", "state": "red", "why": trouble}]
        if begun:
            done[begun] = {**items[begun], "why": trouble}
            listen({"ends": begun})
        elif len(done) == before:  # a child that begins nothing: neither would the next one
            done = {name: {**item, "why": trouble} for name, item in items.items()} | done
    assert items is not None
    return header, [done[name] for name in items]

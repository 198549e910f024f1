"""The lines that the runner writes and the report reads: JSON, one measurement each."""

import dataclasses
import json
import platform
import subprocess
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a line was measured. None: there is none, or it cannot be asked."""

    device: str
    device_name: str
    threads: int
    driver: str | None
    torch: str
    triton: str | None
    cuda: str | None
    cudnn: int | None
    commit: str | None


@dataclasses.dataclass(frozen=True)
class Line:
    """One contender's time for one case in one mode; the schema of the JSON lines.

    Attributes:
        machine: where.
        shapes: the set of cases that this one is from.
        cell: a key of `cases.LAYERS`.
        dtype: a key of `cases.DTYPES`.
        T: time steps.
        B: sequences.
        I: input size.
        H: hidden units, of one head.
        heads: independent recurrences side by side.
        bidirectional: two directions.
        packed: lengths are drawn from 1 to T, instead of T for all.
        mode: forward: the layer without gradients. train: forward, and the gradients of input and
            parameters. sweep: the forward time loop alone. sweep_train: both time loops.
        provider: who ran it.
        detail: how, for instance by what plan.
        timer: what took the time.
        ms: median milliseconds.
        p20: the 20th percentile.
        p80: the 80th percentile.
        samples: timed calls.
        ratio: the first provider's time over this one's, turn by turn.
        baseline: that first provider.
        difference: largest difference from torch.nn's output, None where it was not compared.
        saved_mib: MiB saved for backward, beside input and parameters, None where not counted.
        limit: what bounds a step from below, see `bench.roofline`; None on a CPU.
        limit_us: by how many microseconds.
        fraction: the limit over the time of a step: 1 is the best possible.
        layers: of the stack; lines from before there was a choice have one.
        seed: of the set of cases, None where they are not random.
    """

    machine: Machine
    shapes: str
    cell: str
    dtype: str
    T: int
    B: int
    I: int
    H: int
    heads: int
    bidirectional: bool
    packed: bool
    mode: str
    provider: str
    detail: str
    timer: str
    ms: float
    p20: float
    p80: float
    samples: int
    ratio: float
    baseline: str
    difference: float | None = None
    saved_mib: float | None = None
    limit: str | None = None
    limit_us: float | None = None
    fraction: float | None = None
    layers: int = 1
    seed: int | None = None

    @property
    def step_us(self) -> float:
        """Microseconds of a time step, the input's product included if the mode has it."""
        return 1000 * self.ms / self.T

    @property
    def where(self) -> str:
        """The case, without its cell and type."""
        text = f"{self.T}, {self.B}, {self.I}, {self.H}"
        text += f", {self.heads} heads" if self.heads > 1 else ""
        text += f", {self.layers} layers" if self.layers > 1 else ""
        return text + ", bidirectional" * self.bidirectional + ", packed" * self.packed


def _check(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from JSON: its names, no other ones, each of its type."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := values.keys() - known.keys():
        raise ValueError(f"not of a {kind.__name__}: {', '.join(sorted(unknown))}")
    types = typing.get_type_hints(kind)
    for name, field in known.items():
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"a {kind.__name__} without {name}")
            continue
        wanted = typing.get_args(types[name]) or (types[name],)
        if dataclasses.is_dataclass(wanted[0]):
            values = values | {name: _check(wanted[0], values[name])}
        elif type(values[name]) not in wanted:
            raise ValueError(f"{name} of a {kind.__name__} is {values[name]!r}")
    return kind(**values)


def parse(text: str) -> Line:
    """A line from its JSON.

    Raises:
        ValueError: it is not of the schema, and what is wrong.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"not an object: {text[:40]}")
    line: Line = _check(Line, values)
    return line


def read(paths: Iterable[Path]) -> list[Line]:
    """The lines of some files."""
    return [parse(text) for path in paths for text in path.read_text().splitlines()]


def save(lines: Iterable[Line], folder: Path) -> Iterator[Path]:
    """Write lines, one file for each device and set of cases; yields their paths."""
    files: dict[str, list[Line]] = {}
    for line in lines:
        gpu = line.machine.device != "cpu"
        device = line.machine.device_name.lower().replace(" ", "-") if gpu else "cpu"
        files.setdefault(device if device == line.shapes else f"{device}-{line.shapes}", []).append(
            line
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, mine in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(dataclasses.asdict(line)) + "\n" for line in mine))
        yield path


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _commit() -> str | None:
    """The checked-out commit, marked if files differ from it."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _cpu_name() -> str:
    """The CPU's brand where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    brand = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(brand, platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def machine(device: torch.device) -> Machine:
    """This one."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    gpu = device.type == "cuda"
    query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    drivers = _output(*query) if gpu else None
    return Machine(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        threads=torch.get_num_threads(),
        driver=drivers.splitlines()[0] if drivers else None,
        torch=torch.__version__,
        triton=version,
        cuda=torch.version.cuda or torch.version.hip,
        cudnn=torch.backends.cudnn.version() if gpu else None,
        commit=_commit(),
    )

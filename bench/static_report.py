"""The table of docs/static.md, from the lines that ``python -m bench.static --json FILE`` wrote.

    python -m bench.static --target 80 90 --json static.json
    python -m bench.static_report static.json

One row for a kernel, both targets in it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CELLS = {"rnn_tanh": "RNN", "gru": "GRU", "lstm": "LSTM"}
KERNELS = {"inference": "forward, inference", "forward": "forward, training", "reverse": "reverse"}
COLUMNS: dict[str, Callable[[Row], Any]] = {
    "regime": lambda r: r["regime"],
    "programs": lambda r: r["programs"],
    "instructions": lambda r: r["instr"],
    "barriers": lambda r: r["bar"],
    "registers": lambda r: r["registers"],
    "shared memory KiB": lambda r: r["shared"] // 1024,
    "weights read again KiB": lambda r: (
        "all, L2" if r["regime"] == "streamed" else r["weights_shared"] // 1024
    ),
    "spill bytes": lambda r: r["spill"],
}


def both(column: str, rows: list[Row]) -> str:
    """The values of all targets; one, where they agree and a reader need not be told twice."""
    values = [str(COLUMNS[column](row)) for row in rows]
    same = column in ("regime", "programs") and len(set(values)) == 1
    return values[0] if same else " / ".join(values)


def table(rows: list[Row]) -> str:
    """In Markdown; only sizes that every target has."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    by_kernel = {(r["cell"], r["hidden"], r["kernel"], r["target"]): r for r in rows}
    head = ["kernel", "cell", "H", *COLUMNS]
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for cell in dict.fromkeys(r["cell"] for r in rows):
        for hidden in sorted({r["hidden"] for r in rows}):
            for kernel in KERNELS:
                mine = [by_kernel.get((cell, hidden, kernel, target)) for target in targets]
                several = [row for row in mine if row is not None]
                # The RNN saves nothing, so that its forward sweep is one and the same.
                if len(several) < len(targets) or (cell, kernel) == ("rnn_tanh", "inference"):
                    continue
                label = "forward" if (cell, kernel) == ("rnn_tanh", "forward") else KERNELS[kernel]
                values = [label, CELLS.get(cell, cell), str(hidden)]
                values += [both(column, several) for column in COLUMNS]
                lines.append(" | ".join(values))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="lines of JSON by bench.static")
    lines = parser.parse_args().file.read_text().splitlines()
    print(table([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()

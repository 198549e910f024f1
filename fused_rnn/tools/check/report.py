"""The report: a header and tables for people, the same as one line of JSON for a bug report."""

import re
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Report = dict[str, Any]
WIDTH = 100  # at least: a narrow terminal breaks lines, where a table would cut numbers off
NUMBERS = ("H", "error", "torch.nn", "bound", "forward", "training", "ratio", "us")


def console() -> Console:
    """Standard output."""
    return Console(width=max(Console().width, WIDTH))


def show(report: Report, to: Console) -> None:
    """Print everything."""
    for name, value in report["header"].items():
        if name != "hop_us":
            text = "-" if value is None else str(value)
            to.print(f"{name:>10}  {text}", highlight=False, markup=False)
    to.print(_rows(report["rows"]))
    timed = [row for row in report["rows"] if row["state"] == "green" and row["forward_us"]]
    if timed:
        to.print(_speeds(timed))
    if report["barrier"]:
        to.print(_barrier(report["barrier"]))
        planner = _number(report["header"]["hop_us"], ".2f")
        to.print(f"The planner reckons with {planner} us for a barrier.", highlight=False)
    for item in report["remembered"]:
        text = f"remembered {item['name']}: {item['plan']}"
        to.print(text if item["state"] == "green" else f"not {text}", markup=False, highlight=False)
    for row in report["rows"]:
        if row.get("ran") not in (None, row.get("wanted")):
            text = f"{row['name']}: not checked, {row['ran']} ran:\n    {row['reason']}"
            to.print(text, style="yellow", markup=False, highlight=False)
    red = [item for item in _all(report) if item["state"] != "green"]
    for item in red:
        to.print(f"{item['name']}: {item['why']}", style="red", markup=False, highlight=False)
        if item.get("reason"):
            to.print(f"    {item['reason']}", markup=False, highlight=False)
    if red:
        to.print("Please report red rows with the line that --json prints.", highlight=False)
    else:
        to.print("All green.", style="green")


def green(report: Report) -> bool:
    """Whether nothing is red, and anything at all was checked."""
    return bool(report["rows"]) and all(item["state"] == "green" for item in _all(report))


def _all(report: Report) -> list[dict[str, Any]]:
    return [*report["rows"], *report["barrier"], *report["remembered"]]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in NUMBERS else "left")
    return table


def _rows(rows: list[dict[str, Any]]) -> Table:
    """What is right."""
    table = _table("cell", "type", "ran", "H", "error", "torch.nn", "bound", "of", "same", "")
    for row in rows:
        same = {True: "yes", False: "NO", None: "-"}[row.get("identical")]
        errors = [_number(row.get(k), ".1e") for k in ("error", "torch_error", "allowed")]
        verdict, style = _verdict(row)
        of = row.get("where") or "-"
        table.add_row(*_what(row), *errors, of, same, verdict, style=style)
    return table


def _speeds(rows: list[dict[str, Any]]) -> Table:
    """What is right and was timed."""
    modes = "forward", "training"
    columns = [c for mode in modes for c in (mode, "torch.nn", "ratio")]
    table = _table("cell", "type", "ran", "H", *columns)
    table.title, table.title_justify = "microseconds per time step", "left"
    for row in rows:
        times = [
            _number(row[key], ".2f")
            for mode in ("forward", "train")
            for key in (f"{mode}_us", f"torch_{mode}_us", f"{mode}_ratio")
        ]
        table.add_row(*_what(row), *times)
    return table


def _what(row: dict[str, Any]) -> list[str]:
    ran, wanted = row.get("ran"), row.get("wanted")
    note = f", not {wanted}" if ran not in (None, wanted) else ""
    cell, dtype, H = row.get("cell", row["name"]), row.get("dtype", "-"), row.get("H", "-")
    return [cell, dtype, f"{ran or wanted or '-'}{note}", str(H)]


def _verdict(item: dict[str, Any]) -> tuple[str, str | None]:
    """A word and a style: not everybody sees colours, and a pipe has none."""
    if item["state"] == "green":
        return "ok", None
    word = re.match("[A-Z ]*", item["why"])
    return (word[0].strip() if word else "") or "RED", "red"


def _barrier(items: list[dict[str, Any]]) -> Table:
    table = _table("barrier among programs", "us", "")
    for item in items:
        verdict, style = _verdict(item)
        us = _number(item["us"] if item["state"] == "green" else None, ".2f")
        table.add_row(str(item["programs"]), us, verdict, style=style)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

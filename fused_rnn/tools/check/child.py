"""What a child process does: it takes the rows in turn, and tells of each as it comes.

Its argument is a task in JSON, what it tells are lines of JSON on its standard output:

    {"header": ...}             the machine
    {"items": [...]}            all that there is to do: rows, barriers, plans to remember
    {"begins": NAME}            one of them begins
    {"notes": NAME, ...}        a part of its result
    {"ends": NAME, ...}         the rest of it

After an exception it ends: an error of a GPU spoils all that a process does later. Another child
then takes up with what is left.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch

from fused_rnn.engines.triton.devices import device_limits, interpreted, remember_hop
from fused_rnn.tools.check.machine import header
from fused_rnn.tools.check.rows import DTYPES, Row, rows, where

Work = Callable[[Callable[..., None]], dict[str, Any]]  # takes what tells a part of the result

# What a row has beside what it is. It is red, and has no speed, until it is found to be green.
UNKNOWN: dict[str, Any] = {
    "state": "red",
    "why": "",
    "ran": None,
    "reason": None,
    "error": None,
    "torch_error": None,
    "allowed": None,
    "where": None,
    "identical": None,
    "forward_us": None,
    "torch_forward_us": None,
    "forward_ratio": None,
    "train_us": None,
    "torch_train_us": None,
    "train_ratio": None,
}


def main() -> None:
    """Do what the first argument says but for what it says is done."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is not for the parent

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=told, flush=True)

    task = json.loads(sys.argv[1])
    tell(header=header())
    items, works = _items(task)
    tell(items=items)
    for item, work in zip(items, works, strict=True):
        if item["name"] in task["done"]:
            continue
        tell(begins=item["name"])
        try:
            result = work(partial(tell, notes=item["name"]))
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # an error may come late
        except Exception as error:
            words = f"FAILED: {type(error).__name__}: {error}"  # a compiler's can be very long
            tell(ends=item["name"], state="red", why=words[:1000])
            return
        tell(ends=item["name"], **result)


def _items(task: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Work]]:
    """What there is to do, with all keys that its result will have, and how it is done."""
    device, chip, _ = where()
    if "remember" in task:
        return _to_remember(task["remember"], device)
    from fused_rnn.tools.check.measure import measure

    items: list[dict[str, Any]] = []
    works: list[Work] = []
    for row in rows(quick=task["quick"], every=task["every"]):
        items.append({"kind": "row", "name": row.name, **asdict(row), **UNKNOWN})
        works.append(lambda note, row=row: measure(row, device, note))  # type: ignore[misc]
    if chip is None or interpreted() or not device_limits(chip).groups:
        return items, works
    from fused_rnn.tools.check import barrier

    for programs in barrier.QUICK_PROGRAMS if task["quick"] else barrier.PROGRAMS:
        if programs <= device_limits(chip).sms:
            item: dict[str, Any] = {"kind": "barrier", "name": f"barrier among {programs} programs"}
            item |= {"programs": programs, "state": "red", "why": "", "us": None}
            items.append(item)
            works.append(lambda _, n=programs: barrier.measure(n, device))  # type: ignore[misc]
    return items, works


def _to_remember(
    what: dict[str, Any], device: torch.device
) -> tuple[list[dict[str, Any]], list[Work]]:
    """The constant first, since the plans that are timed follow from it."""
    from fused_rnn.tools.check.measure import layers, set_precision
    from fused_rnn.tools.tune import tune

    def hop(_: object) -> dict[str, Any]:
        remember_hop(device, what["hop_us"])
        return {"state": "green", "plan": f"{what['hop_us']:.3f} us for a barrier"}

    def plan(row: Row) -> dict[str, Any]:
        set_precision(row.precision)
        x = torch.zeros(row.T, row.B, row.I, dtype=DTYPES[row.dtype], device=device)
        plans: Any = tune(layers(row)[2].to(device), x)
        return {"state": "green", "plan": str(plans[0])}

    works: dict[str, Work] = {} if what["hop_us"] is None else {"barrier": hop}
    for green in what["rows"]:
        row = Row(**{field.name: green[field.name] for field in fields(Row)})
        works[row.name] = lambda _, row=row: plan(row)  # type: ignore[misc]
    new = {"kind": "plan", "state": "red", "why": "", "plan": None}
    return [{**new, "name": name} for name in works], list(works.values())


if __name__ == "__main__":
    main()

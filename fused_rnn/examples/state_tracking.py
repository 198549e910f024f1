"""Which recurrences can keep track of a state: trained on short sequences, tested on longer ones.

    python -m fused_rnn.examples.state_tracking
    python -m fused_rnn.examples.state_tracking --task s5 --cell slstm lstm linear --steps 3000

A stream of permutations comes in, and after each one the model says what their product is. `parity`
has two elements, 0 and 1: whether the number of ones so far is odd. `s5` has the 120 permutations
of five things, of which the stream brings a swap of two, a cycle of all and the one that leaves all
in place. W. Merrill, J. Petty, A. Sabharwal ("The illusion of state in state-space models", ICML
2024, arXiv:2404.08819) show that a recurrence that is linear and diagonal cannot do the latter for
all lengths, and one with decays in (0, 1) cannot do parity. The cell `linear` is one:

    h' = a h + x, a in (0, 1), learned for each unit

It may learn the short sequences by heart. A gated cell, whose step depends on its state, learns the
rule, and goes on for as long as it is asked to.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn import FusedRecurrent
from fused_rnn.cells import LSTM, slstm
from fused_rnn.examples.common import default_device, device, integer, number, require
from fused_rnn.spec.cells import Cell


@fused_rnn.cell(gates="x", states="h", parameters={"decay": None})
def linear(gates: Any, state: Any, p: Any) -> Tensor:
    """A linear diagonal recurrence, if the recurrent weights are zero: h' = a h + x."""
    return torch.addcmul(gates.x, torch.sigmoid(p.decay), state.h)


CELLS: dict[str, Cell] = {"slstm": slstm, "lstm": LSTM, "linear": linear}


@dataclass(frozen=True)
class Task:
    """A finite group, and which of its elements the stream brings.

    Attributes:
        table: [n, n], the products: what element i becomes when j comes.
        tokens: the elements that come.
    """

    table: Tensor
    tokens: Tensor

    def sample(self, T: int, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and the products of all so far, [T, B] each."""
        drawn = torch.randint(len(self.tokens), (T, B), generator=generator)
        product, products = torch.zeros(B, dtype=torch.long), []
        for element in self.tokens[drawn]:
            product = self.table[product, element]
            products.append(product)
        return drawn, torch.stack(products)


def parity() -> Task:
    """The group of two elements."""
    return Task(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1]))


def s5() -> Task:
    """The permutations of five things; nothing, a swap and a cycle make all of them."""
    elements = list(permutations(range(5)))
    number_of = {element: i for i, element in enumerate(elements)}
    table = [[number_of[tuple(a[k] for k in b)] for b in elements] for a in elements]
    tokens = [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (1, 2, 3, 4, 0)]
    return Task(torch.tensor(table), torch.tensor([number_of[t] for t in tokens]))


TASKS = {"parity": parity, "s5": s5}


class Tracker(nn.Module):
    """A recurrent layer, and a small network that reads the product off its state."""

    def __init__(self, cell: str, task: Task, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(task.tokens), hidden)
        self.rnn = FusedRecurrent(CELLS[cell], hidden, hidden)
        self.read = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, len(task.table))
        )
        if cell == "linear":  # no unit hears of another one
            nn.init.zeros_(self.rnn.get_parameter("weight_hh_l0")).requires_grad_(False)
            # From half to almost all is kept.
            nn.init.uniform_(self.rnn.get_parameter("decay_l0"), 0, 5)
        elif cell == "lstm":  # whose forget gates begin open
            nn.init.ones_(self.rnn.get_parameter("bias_hh_l0")[hidden : 2 * hidden])

    def forward(self, tokens: Tensor) -> Tensor:
        """From tokens [T, B] to logits of the products [T, B, n]."""
        output, _ = self.rnn(self.embedding(tokens))
        logits: Tensor = self.read(output)
        return logits


def train(model: Tracker, task: Task, args: argparse.Namespace) -> list[float]:
    """Fits a model to sequences of the training length; returns the losses."""
    from tqdm import tqdm  # an optional package, so only where it is wanted

    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    losses = []
    with tqdm(range(args.steps), unit="step", mininterval=0.5) as bar:
        for step in bar:
            tokens, products = task.sample(args.train_length, args.batch, generator)
            logits = model(tokens.to(args.device)).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, products.to(args.device).flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step + 1}")
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return losses


@torch.no_grad()
def accuracy(model: Tracker, task: Task, length: int, where: torch.device) -> Tensor:
    """The share of right answers at each step of sequences that were not trained on, [T]."""
    tokens, products = task.sample(length, 512, torch.Generator().manual_seed(1234))
    answers: Tensor = model(tokens.to(where)).argmax(-1).cpu()
    return (answers == products).double().mean(1)


def checkpoints(length: int) -> list[int]:
    """Lengths for the table: powers of two and the last one."""
    return [n for n in (2**k for k in range(3, 20)) if n < length] + [length]


def at(right: Tensor, n: int) -> float:
    """The accuracy about step n: the mean of the quarter of the sequence that ends with it."""
    return right[n - max(1, n // 4) : n].mean().item()


def plot(curves: dict[str, Tensor], chance: float, train_length: int, path: Path) -> None:
    """Draws the accuracy at each step."""
    from matplotlib.figure import Figure  # without pyplot no display is needed

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, right in curves.items():
        axes.plot(range(1, len(right) + 1), right, lw=1.5, label=name)
    axes.axvline(train_length, color="gray", lw=1, ls=":", label="length of training")
    axes.axhline(chance, color="gray", lw=1, ls="--", label="chance")
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.03), xscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn.examples.state_tracking",
        description="Train recurrences on short streams of permutations, test them on long ones.",
    )
    parser.add_argument("--task", choices=TASKS, default="parity", help="(%(default)s)")
    parser.add_argument(
        "--cell", choices=CELLS, nargs="+", default=list(CELLS), help="one or more (default: all)"
    )
    parser.add_argument("--hidden", type=integer(1), default=64, help="units (%(default)s)")
    parser.add_argument("--steps", type=integer(2), default=400, help="of training (%(default)s)")
    parser.add_argument("--batch", type=integer(1), default=64, help="sequences (%(default)s)")
    parser.add_argument("--train-length", type=integer(1), default=32, help="(%(default)s)")
    parser.add_argument("--test-length", type=integer(1), default=512, help="(%(default)s)")
    parser.add_argument("--lr", type=number(0), default=5e-3, help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    parser.add_argument("--threads", type=integer(1), help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/state_tracking"),
        help="folder for results (%(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the example."""
    parser = build_parser()
    args = parser.parse_args(argv)
    require("tqdm", "matplotlib")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))

    task, chance = TASKS[args.task](), 1 / len(TASKS[args.task]().table)
    curves: dict[str, Tensor] = {}
    report: dict[str, Any] = {"task": args.task, "chance": chance, "cells": {}}
    for name in dict.fromkeys(args.cell):
        torch.manual_seed(args.seed)
        model = Tracker(name, task, args.hidden).to(args.device)
        start = time.perf_counter()
        losses = train(model, task, args)
        seconds = time.perf_counter() - start
        curves[name] = accuracy(model, task, args.test_length, args.device)
        report["cells"][name] = {
            "seconds": seconds,
            "loss": losses,
            "accuracy": curves[name].tolist(),
        }
        print(f"{name}: {args.steps} steps in {seconds:.0f} s, loss {losses[-1]:.4f}", flush=True)

    lengths = checkpoints(args.test_length)
    print(f"accuracy about step n, trained on {args.train_length} steps, chance {chance:.3f}:")
    print("       n" + "".join(f"{n:8d}" for n in lengths))
    for name, right in curves.items():
        print(f"{name:>8}" + "".join(f"{at(right, n):8.3f}" for n in lengths))
    (args.out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(curves, chance, args.train_length, args.out / "accuracy.png")
    print(f"wrote {args.out}/metrics.json and accuracy.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

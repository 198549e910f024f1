"""Learning curves of nn.LSTM and FusedLSTM: the same seeds, data and hyper-parameters.

    python -m bench.learning [--plot docs/learning.png] [--steps 50]

Three tasks: predict the next character of Python's language reference; add two marked numbers among
200; tell at every step the parity of the bits so far. On a CPU, FusedLSTM in fp32 runs oneDNN's
kernel, as nn.LSTM does, so that it must learn the very same; with recompute=True it runs this
package's own sweeps, which round differently. The table says by how much the losses of one seed
ever differ, beside what another seed changes.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.report import markdown
from fused_rnn import FusedLSTM
from fused_rnn.examples.common import default_device, device, integer, require
from fused_rnn.examples.corpus import load_text, split
from fused_rnn.examples.tokenizer import Tokenizer

Batch = tuple[Tensor, Tensor]
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "nn.LSTM": nn.LSTM,
    "FusedLSTM": FusedLSTM,
    "FusedLSTM, recompute": lambda I, H: FusedLSTM(I, H, recompute=True),
}


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        unit: of the loss.
        baseline: the loss of who knows no more than the distribution of the targets.
        batch: inputs [T, B, I] and targets, from a generator.
        loss: of the scores [T, B, outputs] and the targets.
        inputs: width of the input.
        outputs: width of the score.
        hidden: units.
        steps: of the optimizer.
        lr: of Adam.
        memory: for how many steps the gates of an untrained layer remember, at most.
    """

    unit: str
    baseline: float
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: int
    outputs: int
    hidden: int
    steps: int
    lr: float
    memory: int


def characters(T: int = 64, B: int = 16) -> Task:
    """The next character, from windows at random places of the reference's first nine tenths."""
    text = split(load_text())[0]
    tokenizer = Tokenizer.from_text("char", text)
    ids, V = tokenizer.encode(text), len(tokenizer)

    def batch(generator: torch.Generator) -> Batch:
        starts = torch.randint(len(ids) - T - 1, (B,), generator=generator)
        windows = torch.stack([ids[s : s + T + 1] for s in starts.tolist()], dim=1)
        return F.one_hot(windows[:-1], V).float(), windows[1:]

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten()) / math.log(2)

    counts = ids.bincount().double() / len(ids)
    entropy = -(counts * counts.clamp_min(1e-12).log2()).sum().item()
    return Task("bits per character", entropy, batch, loss, V, V, 128, 200, 1e-2, 8)


def adding(T: int = 200, B: int = 32) -> Task:
    """The sum of two marked numbers of [0, 1] among T; guessing its mean has an error of 1/6."""

    def batch(generator: torch.Generator) -> Batch:
        numbers = torch.rand(T, B, generator=generator)
        first = torch.randint(T // 2, (1, B), generator=generator)
        second = torch.randint(T // 2, T, (1, B), generator=generator)
        marks = torch.zeros(T, B).scatter_(0, torch.cat([first, second]), 1.0)
        return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(0)

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(scores[-1, :, 0], targets)

    return Task("squared error", 1 / 6, batch, loss, 2, 1, 32, 600, 2e-2, T)


def parity(T: int = 24, B: int = 64) -> Task:
    """At each step, whether the bits so far have an odd sum: a state that no average can hold."""

    def batch(generator: torch.Generator) -> Batch:
        bits = torch.randint(2, (T, B), generator=generator)
        return F.one_hot(bits, 2).float(), bits.cumsum(0) % 2

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten()) / math.log(2)

    return Task("bits per step", 1.0, batch, loss, 2, 2, 32, 300, 1e-2, 8)


TASKS: dict[str, Callable[[], Task]] = {
    "characters": characters,
    "adding": adding,
    "parity": parity,
}


class Model(nn.Module):
    """A recurrent layer and a linear one, initialized by a seed, whoever makes the layer."""

    def __init__(self, task: Task, make: Callable[[int, int], nn.Module], seed: int) -> None:
        super().__init__()
        self.rnn = make(task.inputs, task.hidden)
        self.score = nn.Linear(task.hidden, task.outputs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.uniform_(-(task.hidden**-0.5), task.hidden**-0.5, generator=generator)
            # Gates that remember for up to `memory` steps; "Can recurrent neural networks warp
            # time?", 2018.
            i, f = self.get_parameter("rnn.bias_ih_l0").chunk(4)[:2]
            i -= f.uniform_(1, task.memory, generator=generator).log_()

    def forward(self, x: Tensor) -> Tensor:
        """Scores [T, B, outputs]."""
        scores: Tensor = self.score(self.rnn(x)[0])
        return scores


def curve(
    task: Task, make: Callable[[int, int], nn.Module], seed: int, steps: int, device: torch.device
) -> list[float]:
    """The training loss of each step; every batch is new, so that it is also the test's."""
    model = Model(task, make, seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, y = task.batch(generator)
        loss = task.loss(model(x.to(device)), y.to(device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


Curves = dict[str, dict[str, list[list[float]]]]  # by task and layer, a curve for each seed


def smooth(losses: Sequence[float], width: int) -> list[float]:
    """Means of consecutive pieces."""
    return [statistics.fmean(losses[i : i + width]) for i in range(0, len(losses), width)]


def table(curves: Curves) -> str:
    """Markdown: where the runs end, and how far they ever are from nn.LSTM's with the same seed."""
    rows = []
    for name, by_layer in curves.items():
        for layer, runs in by_layer.items():
            ends = [statistics.fmean(run[-max(1, len(run) // 10) :]) for run in runs]
            pairs = zip(runs, by_layer["nn.LSTM"], strict=True)
            apart = max(abs(a - b) for run, other in pairs for a, b in zip(run, other, strict=True))
            row = [name, layer, f"{statistics.fmean(ends):.4f}", f"{max(ends) - min(ends):.4f}"]
            rows.append([*row, f"{apart:.1e}"])
    head = ["task", "layer", "mean loss of the last tenth", "its spread over seeds"]
    return markdown([*head, "largest distance from nn.LSTM at any step, same seed"], rows)


def plot(curves: Curves, tasks: dict[str, Task], path: Path) -> None:
    """A column for each task: all runs, thin, and their mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    styles = ((2.8, "-", 0.5), (1.6, "-", 1.0), (1.2, ":", 1.0))
    for ax, (name, by_layer) in zip(axes, curves.items(), strict=True):
        for i, (layer, runs) in enumerate(by_layer.items()):
            width = max(1, len(runs[0]) // 40)
            smoothed = [smooth(run, width) for run in runs]
            mean = [statistics.fmean(values) for values in zip(*smoothed, strict=True)]
            at = [min((j + 1) * width, len(runs[0])) for j in range(len(mean))]
            line, style, alpha = styles[i]
            ax.plot(at, mean, style, lw=line, alpha=alpha, color=f"C{i}", label=layer)
            for run in smoothed:
                ax.plot(at, run, lw=0.4, alpha=0.5, color=f"C{i}")
        ax.axhline(tasks[name].baseline, color="gray", lw=0.8, ls="--")
        ax.set(title=name, xlabel="steps", ylabel=tasks[name].unit)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=integer(1), help="default: as many as the task has")
    parser.add_argument("--seeds", type=integer(1), default=2)
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    parser.add_argument("--threads", type=integer(1), default=1)
    parser.add_argument("--plot", type=Path, help="also draw a picture")
    args = parser.parse_args(argv)
    require("tqdm", *(["matplotlib"] if args.plot else []))
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    tasks = {name: TASKS[name]() for name in args.tasks}
    work = [(n, layer, s) for n in tasks for s in range(args.seeds) for layer in LAYERS]
    curves: Curves = {name: {layer: [] for layer in LAYERS} for name in tasks}
    for name, layer, seed in tqdm(work, unit="run", disable=not sys.stderr.isatty()):
        task = tasks[name]
        run = curve(task, LAYERS[layer], seed, args.steps or task.steps, args.device)
        curves[name][layer].append(run)
    print(f"{args.seeds} seeds, on {args.device}, torch {torch.__version__}\n")
    print(table(curves))
    if args.plot:
        plot(curves, tasks, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fits a leaky recurrent network to a task of the neuroscience of decisions.

    python -m fused_rnn.examples.neural_task
    python -m fused_rnn.examples.neural_task --hidden 128 --noise 2

The subject fixates, sees two noisy stimuli, waits, and says which one was stronger as soon as the
fixation point goes out. How much stronger it is, the coherence, changes from trial to trial. The
networks of H. F. Song, G. R. Yang, X.-J. Wang ("Training excitatory-inhibitory recurrent neural
networks for cognitive tasks", PLoS Computational Biology 12, 2016) are rates that follow

    tau dh/dt = -h + relu(W x + b + U h)

of which each step of length dt makes h' = (1 - alpha) h + alpha relu(...), alpha = dt / tau.

The yardstick is the ideal observer, who sums up all that was seen: on average nobody can do better.
A network has to integrate for eight time constants, and to remember for up to six.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn.examples.common import default_device, device, integer, number, require

DT, TAU = 20, 100  # milliseconds
ALPHA = DT / TAU
FIXATION, STIMULUS, RESPONSE = 100 // DT, 800 // DT, 200 // DT  # steps
DELAYS = range(200 // DT, 600 // DT + 1)
COHERENCES = (-0.512, -0.256, -0.128, -0.064, -0.032, 0.032, 0.064, 0.128, 0.256, 0.512)
INPUTS = OUTPUTS = 3  # fixation, left, right


@fused_rnn.cell(gates="a", states="h")
def rate_unit(gates: Any, state: Any) -> Tensor:
    """A rate that follows its input with the time constant TAU."""
    return torch.lerp(state.h, torch.relu(gates.a), ALPHA)


class Trials(NamedTuple):
    """Some trials of one length.

    Attributes:
        inputs: [T, B, 3]: the fixation point, what is seen on the left and on the right.
        answers: what is to be done at each step, int64 [T, B]: 0 fixate, 1 left, 2 right.
        coherence: of the right one over the left one, [B].
    """

    inputs: Tensor
    answers: Tensor
    coherence: Tensor


def sample(B: int, delay: int, noise: float, generator: torch.Generator) -> Trials:
    """Random trials with a delay of so many steps."""
    chosen = torch.randint(len(COHERENCES), (B,), generator=generator)
    coherence = torch.tensor(COHERENCES)[chosen]
    T = FIXATION + STIMULUS + delay + RESPONSE
    inputs = torch.zeros(T, B, INPUTS)
    inputs[: T - RESPONSE, :, 0] = 1
    seen = torch.stack([1 - coherence, 1 + coherence], -1) / 2
    noisy = seen + noise * torch.randn(STIMULUS, B, 2, generator=generator)
    inputs[FIXATION : FIXATION + STIMULUS, :, 1:] = noisy
    answers = torch.zeros(T, B, dtype=torch.long)
    answers[T - RESPONSE :] = torch.where(coherence > 0, 2, 1)
    return Trials(inputs, answers, coherence)


def ideal(coherence: float, noise: float) -> float:
    """How often the sum of all that is seen on the right is larger than that on the left."""
    return 0.5 * math.erfc(-coherence * math.sqrt(STIMULUS) / (2 * noise)) if noise else 1.0


class Subject(nn.Module):
    """The network: a recurrent layer, and what is read off its rates."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = fused_rnn.FusedRecurrent(rate_unit, INPUTS, hidden)
        # A unit that drives itself as much as it leaks remembers for longer than TAU.
        nn.init.eye_(self.rnn.get_parameter("weight_hh_l0"))
        self.act = nn.Linear(hidden, OUTPUTS)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """From [T, B, 3] to logits [T, B, 3] and rates [T, B, H]."""
        rates, _ = self.rnn(inputs)
        return self.act(rates), rates


def train(model: Subject, args: argparse.Namespace) -> list[float]:
    """Fits the network; returns the losses."""
    from tqdm import tqdm  # an optional package, so only where it is wanted

    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    losses = []
    with tqdm(range(args.steps), unit="step", mininterval=0.5) as bar:
        for step in bar:
            delay = DELAYS[int(torch.randint(len(DELAYS), (), generator=generator))]
            trials = sample(args.batch, delay, args.noise, generator)
            logits, _ = model(trials.inputs.to(args.device))
            answers = trials.answers.to(args.device)
            # The response is a tenth of a trial, and half of what counts.
            waiting = nn.functional.cross_entropy(
                logits[:-RESPONSE].flatten(0, 1), answers[:-RESPONSE].flatten()
            )
            acting = nn.functional.cross_entropy(
                logits[-RESPONSE:].flatten(0, 1), answers[-RESPONSE:].flatten()
            )
            optimizer.zero_grad()
            (waiting + acting).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append((waiting + acting).item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step + 1}")
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return losses


@torch.no_grad()
def test(model: Subject, args: argparse.Namespace) -> dict[float, float]:
    """How often "right" is chosen, by coherence, after the longest delay."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    trials = sample(args.test_trials, DELAYS[-1], args.noise, generator)
    logits, _ = model(trials.inputs.to(args.device))
    right = (logits[-1, :, 2] > logits[-1, :, 1]).cpu()
    of = {c: right[trials.coherence == torch.tensor(c)] for c in COHERENCES}
    return {c: chosen.double().mean().item() for c, chosen in of.items() if len(chosen)}


@torch.no_grad()
def plot(model: Subject, chosen: dict[float, float], args: argparse.Namespace, path: Path) -> None:
    """Draws the psychometric curve, and the evidence that the network has gathered."""
    from matplotlib.figure import Figure  # without pyplot no display is needed

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    curve, evidence = figure.subplots(1, 2)
    fine = torch.linspace(-0.55, 0.55, 111).tolist()
    curve.plot(fine, [ideal(c, args.noise) for c in fine], "k-", lw=1, label="ideal observer")
    curve.plot(list(chosen), list(chosen.values()), "C0o", label="network")
    curve.set(xlabel="coherence", ylabel='"right" is chosen')
    curve.legend()
    trials = sample(args.test_trials, DELAYS[-1], args.noise, torch.Generator().manual_seed(1))
    logits = model(trials.inputs.to(args.device))[0].cpu()
    time_ms = DT * torch.arange(1, len(logits) + 1)
    for i, c in enumerate(chosen):
        mine = logits[:, trials.coherence == torch.tensor(c)]
        evidence.plot(time_ms, (mine[..., 2] - mine[..., 1]).mean(1), f"C{i}", lw=1)
    for edge in (FIXATION, FIXATION + STIMULUS, len(logits) - RESPONSE):
        evidence.axvline(DT * edge, color="gray", lw=1, ls=":")
    evidence.set(xlabel="ms", ylabel="right over left, mean logit by coherence")
    figure.savefig(path, dpi=110)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn.examples.neural_task",
        description="Fit a leaky recurrent network to decisions about noisy stimuli.",
    )
    parser.add_argument("--hidden", type=integer(1), default=64, help="units (%(default)s)")
    parser.add_argument("--steps", type=integer(1), default=600, help="of training (%(default)s)")
    parser.add_argument("--batch", type=integer(1), default=64, help="trials (%(default)s)")
    parser.add_argument("--noise", type=number(0), default=1.0, help="of a step (%(default)s)")
    parser.add_argument("--lr", type=number(0), default=2e-3, help="learning rate (%(default)s)")
    parser.add_argument("--test-trials", type=integer(1), default=5000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    parser.add_argument("--threads", type=integer(1), help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/neural_task"), help="for results (%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the example."""
    parser = build_parser()
    args = parser.parse_args(argv)
    require("tqdm", "matplotlib")
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))

    model = Subject(args.hidden).to(args.device)
    start = time.perf_counter()
    losses = train(model, args)
    seconds = time.perf_counter() - start
    chosen = test(model, args)
    best = {c: ideal(c, args.noise) for c in chosen}
    print(f"{args.steps} steps in {seconds:.0f} s, loss {losses[-1]:.3f}")
    print(f'"right" is chosen, after a delay of {DT * DELAYS[-1]} ms:')
    print("  coherence   network     ideal")
    for c, share in chosen.items():
        print(f"  {c:9.3f} {share:9.3f} {best[c]:9.3f}")
    right, ideally = (
        sum(share if c > 0 else 1 - share for c, share in of.items()) / len(of)
        for of in (chosen, best)
    )
    print(f"  right answers: {right:.1%}, ideal {ideally:.1%}")
    report = {"seconds": seconds, "loss": losses, "right": right, "ideal": ideally}
    report["psychometric"] = {str(c): [share, best[c]] for c, share in chosen.items()}
    (args.out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(model, chosen, args, args.out / "decision.png")
    print(f"wrote {args.out}/metrics.json and decision.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Forecasts the yearly number of sunspots, one year ahead and up to a whole cycle ahead.

    python -m fused_rnn.examples.forecast
    python -m fused_rnn.examples.forecast --cell lstm --horizon 22 --test-years 80

After each year the model forecasts all of the next `horizon` years at once. The last years are
kept out of training, and for them its errors stand beside those of two forecasts that need no
model: persistence (as this year) and the cycle (as eleven years before, or twice eleven).
"""

import argparse
import json
import math
import pickle
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn.examples.common import CELLS, default_device, device, integer, number, require

CYCLE = 11  # years from one maximum to the next, about


@dataclass(frozen=True)
class Config:
    """The shape of a model, and how many years it was not shown."""

    cell: str = "gru"
    hidden: int = 32
    horizon: int = 11
    test_years: int = 60


class Forecaster(nn.Module):
    """Reads a series and forecasts, after each value, the `horizon` values to come."""

    mean: Tensor
    scale: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.rnn = CELLS[config.cell](1, config.hidden)
        self.dropout = nn.Dropout(0.4)
        self.ahead = nn.Linear(config.hidden, config.horizon)
        # Buffers, so that a checkpoint knows the units.
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def fit_units(self, series: Tensor) -> None:
        """Takes the units from a series: the training years and no others."""
        self.mean.copy_(series.sqrt().mean())
        self.scale.copy_(series.sqrt().std())

    def normalise(self, series: Tensor) -> Tensor:
        """Counts, as square roots for an even spread, to zero mean and unit variance."""
        return (series.sqrt() - self.mean) / self.scale

    def counts(self, normal: Tensor) -> Tensor:
        """Back from normalised values to counts."""
        return (normal * self.scale + self.mean).clamp(min=0).square()

    def forward(self, normal: Tensor) -> Tensor:
        """From normalised values (T,) to normalised forecasts (T, horizon)."""
        outputs, _ = self.rnn(normal.view(-1, 1, 1))
        forecasts: Tensor = self.ahead(self.dropout(outputs.squeeze(1)))
        return forecasts

    @torch.no_grad()
    def forecast(self, series: Tensor) -> Tensor:
        """From counts (T,) to forecast counts (T, horizon): [t, h - 1] is for t + h."""
        self.eval()
        return self.counts(self(self.normalise(series)))


def load_series() -> tuple[Tensor, Tensor]:
    """Years and sunspot numbers, 1700 to 2008, as statsmodels ships them."""
    from statsmodels.datasets import sunspots  # slow to import, so only where it is wanted

    table = sunspots.load_pandas().data
    years = torch.tensor(table["YEAR"].to_numpy(), dtype=torch.long)
    return years, torch.tensor(table["SUNACTIVITY"].to_numpy(), dtype=torch.float32)


def targets(series: Tensor, horizon: int) -> Tensor:
    """What to forecast, (T, horizon): [t, h - 1] is series[t + h], or nan beyond the end."""
    padded = torch.cat([series, series.new_full((horizon,), math.nan)])
    return padded[1:].unfold(0, horizon, 1)


def train(model: Forecaster, series: Tensor, steps: int, lr: float) -> list[float]:
    """Fits the model to a series, read as one sequence at each step; returns the losses."""
    from tqdm import tqdm  # an optional package, so only where it is wanted

    model.fit_units(series)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses = []
    model.train()
    with tqdm(range(steps), unit="step", mininterval=0.5) as bar:
        for step in bar:
            # So few years are soon known by heart. What prevents it: each step sees weaker or
            # stronger cycles, as other centuries had, and noise on them, and the layer's dropout.
            # The sizes were chosen on 1829-1948; only the need for stronger cycles showed later.
            normal = model.normalise(series * torch.randn(()).mul(0.4).exp().item())
            wanted = targets(normal, model.ahead.out_features)
            forecasts = model(normal + 0.4 * torch.randn_like(normal))
            loss = (forecasts - wanted)[~wanted.isnan()].square().mean()
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


def compare(series: Tensor, forecasts: Tensor, test_years: int) -> dict[str, list[Tensor]]:
    """Errors in the test years, by method and horizon.

    Every horizon is judged on the same years: a forecast h years ahead was made h years earlier.

    Args:
        series: counts (T,).
        forecasts: (T, horizon), as from `Forecaster.forecast`.
        test_years: how many of the last years to judge.
    """
    end, first = len(series), len(series) - test_years
    errors: dict[str, list[Tensor]] = {"model": [], "persistence": [], "cycle": []}
    for h in range(1, forecasts.shape[1] + 1):
        back = CYCLE * math.ceil(h / CYCLE)
        truth = series[first:]
        errors["model"].append(forecasts[first - h : end - h, h - 1] - truth)
        errors["persistence"].append(series[first - h : end - h] - truth)
        errors["cycle"].append(series[first - back : end - back] - truth)
    return errors


def rmse(errors: Tensor) -> float:
    """Root of the mean square."""
    return errors.square().mean().sqrt().item()


def mae(errors: Tensor) -> float:
    """Mean absolute value."""
    return errors.abs().mean().item()


def plot(years: Tensor, series: Tensor, forecasts: Tensor, test_years: int, path: Path) -> None:
    """Draws the test years, the forecasts one year ahead, and some over the whole horizon."""
    from matplotlib.figure import Figure  # without pyplot no display is needed

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    first, horizon = len(series) - test_years, forecasts.shape[1]
    axes.plot(years[first - CYCLE :], series[first - CYCLE :], "k-", lw=1, label="observed")
    axes.plot(years[first:], forecasts[first - 1 : -1, 0], "C0.-", lw=1, label="1 year ahead")
    label: str | None = f"{horizon} years ahead, from the dots"
    for origin in range(first - 1, len(series) - 1, horizon):
        ahead = torch.cat([series[origin : origin + 1], forecasts[origin]])
        span = years[origin] + torch.arange(horizon + 1)
        axes.plot(span, ahead, "C1--", marker="o", markevery=[0], label=label)
        label = None
    axes.axvline(int(years[first]) - 0.5, color="gray", lw=1, ls=":")
    axes.set(xlabel="year", ylabel="sunspots, yearly mean", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def save(path: Path, model: Forecaster, config: Config) -> None:
    """Writes a checkpoint of plain data: numbers, strings and tensors."""
    torch.save({"config": asdict(config), "weights": model.state_dict()}, path)


def load(path: Path) -> tuple[Forecaster, Config]:
    """Reads a checkpoint back. Nothing in it can run code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"])
        model = Forecaster(config)
        model.load_state_dict(checkpoint["weights"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this example: {error}") from error
    return model, config


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn.examples.forecast",
        description="Forecast the yearly sunspot numbers and compare with simple forecasts.",
    )
    new = Config()
    shape = parser.add_argument_group("model (of a new one; --load brings its own)")
    # SUPPRESS: what is not given is absent, so that the defaults stand in Config alone.
    for flag, kind, choices, text in (
        ("cell", str, tuple(CELLS), "kind of recurrent layer"),
        ("hidden", integer(1), None, "units of the layer"),
        ("horizon", integer(1), None, "years to forecast ahead"),
        ("test-years", integer(1), None, "last years, kept out of training"),
    ):
        shape.add_argument(
            f"--{flag}",
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            help=f"{text} (default: {getattr(new, flag.replace('-', '_'))})",
        )
    parser.add_argument("--steps", type=integer(1), default=200, help="of training (%(default)s)")
    parser.add_argument("--lr", type=number(0), default=1e-2, help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    parser.add_argument("--threads", type=integer(1), help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    parser.add_argument(
        "--load", type=Path, metavar="CHECKPOINT", help="use this model instead of training one"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/forecast"), help="folder for results (%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the example."""
    parser = build_parser()
    args = parser.parse_args(argv)
    shape = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    if args.load and shape:
        parser.error(f"--load brings its own model: drop --{', --'.join(shape)}")
    require("statsmodels", "matplotlib", *([] if args.load else ["tqdm"]))
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)

    years, series = load_series()
    try:
        if args.load:
            model, config = load(args.load)
        else:
            config = Config(**shape)
            model = Forecaster(config)
        first = len(series) - config.test_years
        if first < 2 * max(CYCLE, config.horizon):
            raise ValueError(
                f"{len(series)} years are too few for {config.test_years} to test on"
                f" and two horizons of {config.horizon} to train on"
            )
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    model.to(args.device)
    start = time.perf_counter()
    losses = []
    if not args.load:
        losses = train(model, series[:first].to(args.device), args.steps, args.lr)
        save(args.out / "model.pt", model, config)
    seconds = time.perf_counter() - start
    forecasts = model.forecast(series.to(args.device)).cpu()

    errors = compare(series, forecasts, config.test_years)
    report: dict[str, Any] = {
        "config": asdict(config),
        "training": {"steps": len(losses), "seconds": seconds, "seed": args.seed, "loss": losses},
        "test_years": [int(years[first]), int(years[-1])],
    }
    for name, measure in (("rmse", rmse), ("mae", mae)):
        report[name] = {who: [measure(e) for e in of] for who, of in errors.items()}
    print(f"{config}, trained on {int(years[0])}-{int(years[first - 1])} in {seconds:.1f} s")
    print(f"errors in {int(years[first])}-{int(years[-1])}, RMSE (MAE):")
    print("  years ahead" + "".join(f"{who:>16}" for who in errors))
    for h in sorted({1, 2, 3, 5, 8, CYCLE, config.horizon}):
        if h <= config.horizon:
            print(f"  {h:11d}" + "".join(cell(of[h - 1]) for of in errors.values()))
    print("          all" + "".join(cell(torch.cat(of)) for of in errors.values()))
    (args.out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(years, series, forecasts, config.test_years, args.out / "forecast.png")
    print(f"wrote {args.out}/metrics.json and forecast.png" + ("" if args.load else ", model.pt"))
    return 0


def cell(errors: Tensor) -> str:
    """One entry of the table."""
    return f"{rmse(errors):9.1f} ({mae(errors):4.1f})"


if __name__ == "__main__":
    raise SystemExit(main())

"""The forecast of sunspots: its targets, errors and checkpoints."""

import json
import math
from pathlib import Path

import pytest
import torch

from fused_rnn.examples import forecast


def test_forecast_targets_are_the_years_ahead() -> None:
    wanted = forecast.targets(torch.arange(5.0), 2)
    expected = [[1, 2], [2, 3], [3, 4], [4, math.nan], [math.nan, math.nan]]
    torch.testing.assert_close(wanted, torch.tensor(expected), equal_nan=True)


def test_forecast_errors_are_aligned() -> None:
    # A line that grows by 1 a year: persistence is h too low, the cycle 11 or 22.
    series = torch.arange(100.0)
    perfect = forecast.targets(series, 12).nan_to_num()
    errors = forecast.compare(series, perfect, test_years=10)
    for h in (1, 11, 12):
        assert errors["model"][h - 1].tolist() == [0] * 10
        assert errors["persistence"][h - 1].tolist() == [-h] * 10
        assert errors["cycle"][h - 1].tolist() == [-22 if h > 11 else -11] * 10


def test_forecast_never_looks_ahead() -> None:
    torch.manual_seed(0)
    model = forecast.Forecaster(forecast.Config(hidden=8))
    _, series = forecast.load_series()
    model.fit_units(series[:200])
    changed = series.clone()
    changed[200:] = 0
    torch.testing.assert_close(model.forecast(series)[:200], model.forecast(changed)[:200])
    torch.testing.assert_close(model.counts(model.normalise(series)), series)


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_forecast_runs_and_loads_again(kind: str, tmp_path: Path) -> None:
    flags = ["--cell", kind, "--hidden", "8", "--steps", "20"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert forecast.main([*flags, "--device", "cpu", "--out", str(first)]) == 0
    assert (first / "forecast.png").stat().st_size > 5000
    report = json.loads((first / "metrics.json").read_text())
    assert len(report["training"]["loss"]) == 20
    assert all(math.isfinite(loss) for loss in report["training"]["loss"])
    assert report["test_years"] == [1949, 2008]
    load = ["--load", str(first / "model.pt"), "--device", "cpu", "--out", str(second)]
    assert forecast.main(load) == 0
    assert json.loads((second / "metrics.json").read_text())["rmse"] == report["rmse"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test-years", "300"], "too few"),
        (["--horizon", "0"], "--horizon: must be at least 1"),
        (["--lr", "-1"], "--lr: must be in"),
        (["--load", "missing.pt"], "missing.pt"),
        (["--load", "missing.pt", "--cell", "rnn"], "drop --cell"),
    ],
)
def test_forecast_refuses(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        forecast.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()

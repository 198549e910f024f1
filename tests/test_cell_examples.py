"""The examples of cells: state tracking, and a task of neuroscience."""

import json
import math
from itertools import permutations
from pathlib import Path

import pytest
import torch

from fused_rnn.examples import neural_task, state_tracking

# ---- state tracking -----------------------------------------------------------------------------


def test_parity_is_that_of_the_ones() -> None:
    tokens, products = state_tracking.parity().sample(9, 4, torch.Generator().manual_seed(0))
    assert torch.equal(products, tokens.cumsum(0) % 2)


def test_s5_is_a_group_of_permutations() -> None:
    task, elements = state_tracking.s5(), list(permutations(range(5)))
    assert task.table.shape == (120, 120)
    for axis in (0, 1):  # each element once in each row and column
        lines = task.table.sort(axis).values.movedim(axis, 1)
        assert torch.equal(lines, torch.arange(120).expand(120, 120))
    tokens, products = task.sample(30, 2, torch.Generator().manual_seed(0))
    things = list(range(5))
    for token, product in zip(tokens[:, 0], products[:, 0], strict=True):
        moved = elements[int(task.tokens[token])]
        things = [things[k] for k in moved]
        assert tuple(things) == elements[int(product)]
    assert len(products.unique()) > 20  # swap and cycle make many of them


def test_linear_is_linear() -> None:
    """Two inputs' outputs add up to that of their sum: no unit hears of itself but by its decay."""
    model = state_tracking.Tracker("linear", state_tracking.parity(), 6)
    assert not model.rnn.weight_hh_l0.requires_grad
    assert not model.rnn.weight_hh_l0.any()
    x, y = torch.randn(2, 5, 3, 6)
    zero = model.rnn(torch.zeros(5, 3, 6))[0]
    found = model.rnn(x + y)[0] - zero
    torch.testing.assert_close(found, model.rnn(x)[0] + model.rnn(y)[0] - 2 * zero)


@pytest.mark.parametrize("task", ["parity", "s5"])
def test_state_tracking_leaves_results(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--task", task, "--hidden", "4", "--steps", "3", "--batch", "2", "--device", "cpu"]
    flags += ["--train-length", "4", "--test-length", "12", "--out", str(tmp_path)]
    assert state_tracking.main(flags) == 0
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report["cells"]) == {"slstm", "lstm", "linear"}
    for cell in report["cells"].values():
        assert len(cell["loss"]) == 3
        assert len(cell["accuracy"]) == 12
    assert "accuracy about step n, trained on 4 steps" in capsys.readouterr().out


def test_slstm_learns_parity(tmp_path: Path) -> None:
    """And goes on with it for eight times as long as it was trained."""
    flags = ["--cell", "slstm", "--hidden", "32", "--steps", "200", "--train-length", "16"]
    flags += ["--test-length", "128", "--lr", "1e-2", "--device", "cpu", "--out", str(tmp_path)]
    assert state_tracking.main(flags) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert min(report["cells"]["slstm"]["accuracy"]) > 0.99


# ---- decisions ----------------------------------------------------------------------------------


def test_trials() -> None:
    trials = neural_task.sample(7, 10, 0.0, torch.Generator().manual_seed(0))
    start, end = neural_task.FIXATION, neural_task.FIXATION + neural_task.STIMULUS
    assert trials.inputs.shape == (end + 10 + neural_task.RESPONSE, 7, 3)
    difference = trials.inputs[start:end, :, 2] - trials.inputs[start:end, :, 1]
    torch.testing.assert_close(difference, trials.coherence.expand_as(difference))
    assert not trials.inputs[:start, :, 1:].any()
    assert not trials.inputs[end:, :, 1:].any()
    acting = trials.inputs[..., 0] == 0
    assert torch.equal(acting, trials.answers > 0)
    assert torch.equal(trials.answers[-1] == 2, trials.coherence > 0)


def test_the_ideal_observer() -> None:
    """The formula against an observer who sums up."""
    trials = neural_task.sample(20000, 10, 1.0, torch.Generator().manual_seed(0))
    seen = trials.inputs[..., 1:].sum(0)
    right = seen[:, 1] > seen[:, 0]
    for c in (-0.256, 0.032, 0.128):
        share = right[trials.coherence == torch.tensor(c)].double().mean().item()
        assert share == pytest.approx(neural_task.ideal(c, 1.0), abs=0.03)
    assert neural_task.ideal(0.5, 0.0) == 1


def test_rates_follow_their_input() -> None:
    """Without recurrent weights, by the solution of the equation's Euler steps."""
    model = neural_task.Subject(4)
    torch.nn.init.zeros_(model.rnn.weight_hh_l0)
    x = torch.randn(3).expand(30, 1, 3)
    drive = torch.relu(
        x[0] @ model.rnn.weight_ih_l0.T + model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0
    )
    kept = (1 - neural_task.ALPHA) ** torch.arange(1, 31)
    torch.testing.assert_close(model.rnn(x)[0], (1 - kept)[:, None, None] * drive)


def test_neural_task_leaves_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hidden", "8", "--steps", "3", "--batch", "4", "--test-trials", "50"]
    assert neural_task.main([*flags, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "decision.png").stat().st_size > 5000
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert all(math.isfinite(loss) for loss in report["loss"])
    assert 0 <= report["right"] <= 1
    assert report["ideal"] == pytest.approx(0.75, abs=0.03)
    assert "right answers" in capsys.readouterr().out


# ---- bad arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (state_tracking, ["--task", "s6"], "invalid choice: 's6'"),
        (state_tracking, ["--cell", "gru"], "invalid choice: 'gru'"),
        (state_tracking, ["--hidden", "0"], "--hidden: must be at least 1"),
        (state_tracking, ["--lr", "nan"], "--lr: must be in"),
        (state_tracking, ["--out", "file/x"], "file/x"),
        (neural_task, ["--noise", "-1"], "--noise: must be in"),
        (neural_task, ["--steps", "0"], "--steps: must be at least 1"),
        (neural_task, ["--out", "file/x"], "file/x"),
    ],
)
def test_refuses(
    module: object,
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        module.main(flags)  # type: ignore[attr-defined]
    assert stop.value.code == 2
    assert message in capsys.readouterr().err

"""The benchmark of cells beside a loop, on tiny shapes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import cells, records

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_lines_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--shapes",
        "4,2,3,5",
        "--dtypes",
        "fp32",
        "bf16",
        "--seconds",
        "0",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    assert cells.main([*flags, "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    lines = records.read([tmp_path / "cpu-cells.jsonl"])
    assert len(lines) == 2 * 2 * len(cells.CELLS) * len(cells.MODES)
    assert {line.provider for line in lines} == {"loop", "fused_rnn"}
    assert cells.main(["--read", str(tmp_path / "cpu-cells.jsonl")]) == 0
    assert capsys.readouterr().out == first
    assert first.count("| slstm | fp32 | 4, 2, 3, 5 |") == 1
    assert first.count("| slstm | bf16 | 4, 2, 3, 5 |") == 1


def test_what_differs_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "loop", lambda layer, x: 2 * layer(x)[0])
    with pytest.raises(RuntimeError, match=r"slstm .*results differ by 1\.0e"):
        cells.contenders("slstm", cells.Shape(4, 2, 3, 5), "fp32", "forward", CPU)


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,0", "a,b,c,d"])
def test_shapes_are_four_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cells.main(["--shapes", text])
    assert "--shapes" in capsys.readouterr().err

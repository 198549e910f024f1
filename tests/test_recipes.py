"""bench.recipes: each recipe of docs/recipes.md has the numbers of what it replaces."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import recipes

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
SMALL = {
    "resets": {"T": 9, "B": 3, "I": 4, "H": 5},
    "lengths": {"T": 9, "B": 4, "I": 4, "H": 5},
    "streaming": {"T": 6, "B": 2, "I": 4, "H": 5},
    "truncated": {"T": 150, "B": 2, "I": 4, "H": 5},
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_numbers_of_what_it_replaces(name: str) -> None:
    recipe = recipes.RECIPES[name](CPU, **SMALL[name])  # type: ignore[call-arg]
    recipes.check(recipe)
    assert len(recipe.ours()) > (1 if name != "streaming" else 0)
    wrong = replace(recipe, ours=lambda: [1.01 * t for t in recipe.ours()])
    with pytest.raises(AssertionError, match="not close"):
        recipes.check(wrong)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        recipes.check(replace(recipe, ours=lambda: recipe.ours()[:-1]))


def test_episodes_begin_within_the_rollout() -> None:
    """Else the recipe would not show a thing."""
    torch.manual_seed(0)
    recipe = recipes.resets(CPU, **SMALL["resets"] | {"T": 64})
    variables = dict(zip(recipe.ours.__code__.co_freevars, recipe.ours.__closure__, strict=True))
    assert variables["start"].cell_contents[1:].any()


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(
        recipes.RECIPES, "streaming", lambda device: recipes.streaming(device, **SMALL["streaming"])
    )
    threads = torch.get_num_threads()
    recipes.main(["--only", "streaming", "--seconds", "0"])
    torch.set_num_threads(threads)
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == row.count("|") == 5
    assert row.startswith("| GRU, one step at a time, B, H = 2, 5: nn.GRU |")
    with pytest.raises(SystemExit):
        recipes.main(["--only", "nothing"])


@pytest.mark.slow
def test_the_script_for_torchrun(tmp_path: Path) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("PyTorch was built without torch.distributed or gloo")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if "init_process_group" in block]
    (tmp_path / "train.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(PAGE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, str(tmp_path / "train.py")],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    sums = re.findall(r"process \d: parameters add up to (\S+)", result.stdout)
    assert len(sums) == 2
    assert sums[0] == sums[1]

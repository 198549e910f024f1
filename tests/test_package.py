"""What is installed."""

import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fused_rnn

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_holds_the_kernels_inside_the_package(tmp_path: Path) -> None:
    # A copy, since setuptools leaves a build folder behind and takes stale files from it.
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".git", ".venv*", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    subprocess.run([*map(str, command), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert fused_rnn.__version__ in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "fused_rnn/kernels/__init__.py" in names
    assert "fused_rnn/examples/textgen.py" in names
    assert "fused_rnn/check/__main__.py" in names
    assert "fused_rnn/py.typed" in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"fused_rnn"}


def test_kernels_refuse_to_be_a_top_level_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    assert importlib.import_module("fused_rnn.kernels")
    with pytest.raises(ImportError, match=r"import fused_rnn\.kernels"):
        importlib.import_module("kernels")


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    block, *_ = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["output"], torch.Tensor)
    assert names["output"].shape == (50, 8, 512)
    assert "layer 1: cpu: oneDNN" in capsys.readouterr().out

"""What is installed."""

import ast
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fused_rnn

ROOT = Path(__file__).parent.parent


FOLDERS = (".ci", "bench", "docs", "fused_rnn", "kernels", "tests")
# Runs with a command line as `python -m` does, but with modules that cannot be imported.
WITHOUT = """
import runpy, sys
missing, sys.argv = sys.argv[1].split(","), sys.argv[2:]
sys.modules.update(dict.fromkeys(missing))
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


# ---- what is built ------------------------------------------------------------------------------


def files(folder: Path) -> set[str]:
    """What belongs to a copy of the repository, by its name there; links are followed."""
    names = {p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")}
    for top in FOLDERS:
        for at, _, found in os.walk(folder / top, followlinks=True):
            if "__pycache__" not in at:
                names |= {(Path(at) / name).relative_to(folder).as_posix() for name in found}
    return names


def build(source: Path, *options: str | Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, source]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    tmp = tmp_path_factory.mktemp("sdist")
    # A copy, since setuptools leaves folders behind and takes stale files from them.
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    skip = shutil.ignore_patterns(".git", *ignored)
    shutil.copytree(ROOT, tmp / "source", symlinks=True, ignore=skip)
    build(tmp / "source", "--sdist", "--outdir", tmp)
    (archive,) = tmp.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp, filter="data")  # which refuses links that lead elsewhere
    return tmp / archive.name.removesuffix(".tar.gz")


def test_source_distribution_holds_all(unpacked: Path) -> None:
    here, there = files(ROOT), files(unpacked)
    assert {"Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"} < here
    assert {"tests/conftest.py", "tests/data/cat_sat.txt", "docs/faq.md"} < here
    assert here - there == set()
    assert there - here <= {"PKG-INFO", "setup.cfg"}  # which are here, too, where this is one
    assert not any(p.is_symlink() for p in unpacked.rglob("*"))
    for kernel in (ROOT / "kernels").glob("*.py"):
        assert (
            unpacked / "fused_rnn" / "kernels" / kernel.name
        ).read_bytes() == kernel.read_bytes()


def test_index_page_has_no_links_of_the_repository(unpacked: Path) -> None:
    page = (unpacked / "PKG-INFO").read_text()
    assert "Description-Content-Type: text/markdown" in page
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert targets
    assert [t for t in targets if not re.match("https?:", t)] == []
    assert "in docs/faq.md;" in page  # the text of a link
    assert "who runs what (docs/speed.md)" in page  # which does not name the file itself
    text = (ROOT / "README.md").read_text()
    examples = re.findall(r"```python\n.*?```", text, flags=re.DOTALL)
    assert len(examples) == 3
    assert all(example in page for example in examples)


@pytest.mark.slow
def test_tests_of_the_source_distribution_run(unpacked: Path) -> None:
    pytest_ = ["-m", "pytest", "-q"]
    everything, quick = ["--collect-only"], ["tests/test_rows.py", "tests/test_examples.py"]
    code = ["-c", "import fused_rnn; print(fused_rnn.__file__)"]
    for command in (code, [*pytest_, *everything], [*pytest_, *quick, "-k", "not sat_on"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=unpacked, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:]
        if command is code:
            assert Path(done.stdout.strip()).is_relative_to(unpacked)


@pytest.mark.slow
def test_wheel_of_the_source_distribution(unpacked: Path, tmp_path: Path) -> None:
    build(unpacked, "--wheel", "--outdir", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert fused_rnn.__version__ in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info" not in name}
        archive.extractall(tmp_path / "installed")
    package = {name for name in files(ROOT) if name.startswith("fused_rnn/")}
    assert names == package
    # It is whole: with nothing else on the path, its kernels are imported.
    code = "import fused_rnn.kernels.forward as f; print(f.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "installed")


@pytest.mark.slow
def test_an_editable_copy_is_installed_without_a_warning(unpacked: Path, tmp_path: Path) -> None:
    """pip passes on what setuptools warns of, even with --quiet."""
    hook = f"build_editable({str(tmp_path)!r})"
    code = f"from setuptools import build_meta; build_meta.{hook}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=unpacked,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(path).decode().strip() == str(unpacked)


# ---- what is missing ----------------------------------------------------------------------------


def commands() -> list[str]:
    """Every module that is run by `python -m`."""
    sources = [*ROOT.glob("fused_rnn/examples/*.py"), *ROOT.glob("bench/*.py")]
    return sorted(
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in sources
        if '__name__ == "__main__"' in path.read_text()
    )


@pytest.mark.parametrize("name", commands())
def test_help_needs_no_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("tqdm", "matplotlib", "statsmodels"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("fused_rnn.examples.textgen", "tqdm, matplotlib"),
        ("fused_rnn.examples.textgen --steps 1", "matplotlib"),
        ("fused_rnn.examples.forecast", "statsmodels, matplotlib, tqdm"),
        ("fused_rnn.examples.forecast", "statsmodels"),
        ("fused_rnn.examples.forecast --load model.pt", "matplotlib"),
        ("bench.run", "tqdm"),
        ("bench.accuracy", "tqdm"),
        ("bench.accuracy --plot plot.png", "tqdm, matplotlib"),
        ("bench.learning", "tqdm"),
        ("bench.learning --plot plot.png", "matplotlib"),
        ("bench.report --plots plots", "matplotlib"),
        ("bench.sweep_cpu", "tqdm"),
        ("bench.sweep_cpu --plot plot.png", "tqdm, matplotlib"),
        ("bench.sweep_cpu --read lines.jsonl --plot plot.png", "matplotlib"),
    ],
)
def test_a_missing_extra_is_one_line(
    line: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in missing.split(", "):
        monkeypatch.setitem(sys.modules, module, None)
    name, *flags = line.split()
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        module.main(flags)
    # Python prints a text that ends a process, and nothing else, and exits with 1.
    assert stop.value.code == f"not installed: {missing} (pip install 'fused-rnn[examples]')"
    assert list(tmp_path.iterdir()) == []


def test_a_process_without_an_extra_prints_one_line() -> None:
    command = [sys.executable, "-c", WITHOUT, "tqdm", "fused_rnn.examples.textgen"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "not installed: tqdm (pip install 'fused-rnn[examples]')\n"


def test_the_extra_installs_what_is_asked_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^examples = (\[.*\])$", text, flags=re.MULTILINE)
    assert extra is not None
    asked: set[str] = set()
    for source in [*ROOT.glob("fused_rnn/examples/*.py"), *ROOT.glob("bench/*.py")]:
        for call in re.findall(r"require\((.*)\)", source.read_text()):
            asked |= set(re.findall(r'"(\w+)"', call))
    assert asked == set(ast.literal_eval(extra[1]))


# ---- make ---------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the Makefile needs, with a .venv of stand-ins for Python: nothing is installed.

    `right` makes a .venv whose Python does anything, `broken` one whose Python does nothing right;
    `old` is a Python 3.9, `bare` one without venv.
    """
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fakes = {"old": "sys.version_info = (3, 9, 1)", "bare": "sys.modules['ensurepip'] = None"}
    for name, line in fakes.items():
        script(tmp_path / name, f'exec {sys.executable} -c "import sys; {line}\n$2"')
    for name, end in {"right": "exit 0", "broken": "exit 1"}.items():
        make = f'[ "$2" = venv ] || exec {sys.executable} "$@"; eval "folder=\\${{$#}}"\n'
        make += 'case " $* " in *" --clear "*) rm -rf "$folder";; esac; mkdir -p "$folder/bin"\n'
        make += 'cd "$folder/bin"; [ -e python ] && exit\n'
        make += f"printf '#!/bin/sh\\n{end}\\n' > python; chmod +x python"
        script(tmp_path / name, make)
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--silent", f"PYTHON=./{python}", ".venv/ready"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("python", "message"),
    [("old", "Python 3.9 .* is too old: 3.10 or newer"), ("bare", "lacks venv or ensurepip")],
)
def test_make_says_which_python_it_needs(checkout: Path, python: str, message: str) -> None:
    done = make(checkout, python)
    assert done.returncode != 0
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    assert not (checkout / ".venv").exists()
    assert make(checkout, "right").returncode == 0
    assert (checkout / ".venv" / "ready").exists()


def test_a_failed_make_leaves_nothing_behind(checkout: Path) -> None:
    assert make(checkout, "broken").returncode != 0
    assert not (checkout / ".venv").exists()
    # One that was killed could not tidy up.
    (checkout / ".venv" / "bin").mkdir(parents=True)
    script(checkout / ".venv" / "bin" / "python", "exit 1")
    assert make(checkout, "right").returncode == 0
    assert (checkout / ".venv" / "ready").exists()


def test_make_keeps_a_venv_that_was_ready(checkout: Path) -> None:
    assert make(checkout, "right").returncode == 0
    python = checkout / ".venv" / "bin" / "python"
    os.utime(checkout / ".venv" / "ready", (0, 0))  # older than pyproject.toml
    before = python.stat().st_mtime_ns
    script(python, "exit 1")  # the network is down
    assert make(checkout, "right").returncode != 0
    assert python.exists()
    script(python, "exit 0")
    assert make(checkout, "old").returncode == 0  # it is not asked: the .venv has a Python
    assert python.stat().st_mtime_ns != before
    assert (checkout / ".venv" / "ready").stat().st_mtime > 0


def test_make_and_the_package_want_the_same_python() -> None:
    (package,) = re.findall(
        r'^requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text(), re.M
    )
    major, minor = package.split(".")
    text = (ROOT / "Makefile").read_text()
    assert f"version_info < ({major}, {minor})" in text
    assert f"{package} or newer" in text


# ---- what is imported ---------------------------------------------------------------------------


def test_kernels_refuse_to_be_a_top_level_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    assert importlib.import_module("fused_rnn.kernels")
    with pytest.raises(ImportError, match=r"import fused_rnn\.kernels"):
        importlib.import_module("kernels")


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    assert isinstance(names["model"], torch.nn.Sequential)
    assert isinstance(names["model"][1], fused_rnn.FusedGRU)
    assert isinstance(names["output"], torch.Tensor)
    assert names["output"].shape == (50, 8, 512)
    assert isinstance(names["layer"], fused_rnn.FusedRecurrent)
    assert "layer 1: native: torch.nn's own kernels" in capsys.readouterr().out


def test_only_conftest_switches_the_interpreter_on() -> None:
    """With a GPU it stays off: kernels are compiled there, and a process can do one of the two."""
    setting = re.compile(r"""environ(\.setdefault\(|\[)["']TRITON_INTERPRET["'](,|\] *=)""")
    setters = [p.name for p in (ROOT / "tests").glob("*.py") if setting.search(p.read_text())]
    assert setters == ["conftest.py"]

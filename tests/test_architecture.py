"""The layout of the package: imports go down, nothing is in a circle, and pieces stay small."""

import ast
import traceback
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import fused_rnn
from bench import host
from fused_rnn.kernels import launch

ROOT = Path(__file__).parent.parent
LINK = ROOT / "fused_rnn" / "kernels"  # to kernels/, which is looked at itself
# From the bottom: a folder may import itself and what stands before it.
FOLDERS = ("kernels", "spec", "derive", "cells", "engines", "ops", "layers", "tools", "examples")
MOST_FILES = 8  # of a folder, __init__.py aside
MOST_LINES = 400  # of a file
MOST_OF_A_FUNCTION = 60  # lines, the two kernels aside
KERNELS = {"forward_kernel": 75, "backward_kernel": 75}  # and the lines of their loops
MOST_BRANCHES = 18  # of such a loop
MOST_FRAMES = 8  # our own, from a module's forward to a launch


def sources() -> dict[str, Path]:
    """The files of the package by module; the kernels are a link in it."""
    paths = [*(ROOT / "fused_rnn").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    paths = [path for path in paths if LINK not in path.parents]
    names = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "fused_rnn" else ("fused_rnn", *parts)
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


MODULES = sources()


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, in functions and for types, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = str(node.module)
            members = [f"{whole}.{alias.name}" for alias in node.names]
            names = [m if m in MODULES else whole for m in members]
        else:
            continue
        yield from (name for name in names if name in MODULES)


GRAPH = {name: set(imported(path)) for name, path in MODULES.items()}


def folder(module: str) -> str:
    return module.split(".")[1] if module.count(".") > 0 else ""


def test_imports_go_down() -> None:
    above = {
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if folder(name) in FOLDERS
        and folder(other) in FOLDERS
        and FOLDERS.index(folder(other)) > FOLDERS.index(folder(name))
    }
    assert not above


def test_the_kernels_stand_alone() -> None:
    """Nor does anything but the check and the examples import the package's own top."""
    for name, others in GRAPH.items():
        if folder(name) == "kernels":
            assert {folder(other) for other in others} <= {"kernels"}, name
        elif not name.startswith(("fused_rnn.tools.check", "fused_rnn.examples")):
            assert "fused_rnn" not in others, name


def test_there_is_no_circle() -> None:
    assert list(TopologicalSorter(GRAPH).static_order())  # raises for one


def test_folders() -> None:
    tops = {p.parent.name for p in (ROOT / "fused_rnn").glob("*/*.py")}
    assert tops == set(FOLDERS)
    for place in {path.parent for path in MODULES.values()}:
        files = [p for p in place.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= MOST_FILES or place.name == "kernels", place


@pytest.mark.parametrize("folder", sorted({*FOLDERS} - {"kernels", "examples"}))
def test_the_files_are_named(folder: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{folder}/` |"))
    names = {part.strip("/") for part in row.rpartition(" | ")[2].split("`")[1::2]}
    there = [path for path in (ROOT / "fused_rnn" / folder).iterdir() if path.name[0] not in "_."]
    assert names == {path.stem for path in there}


def all_sources() -> list[Path]:
    places = ("fused_rnn", "kernels", "bench", "tests", ".ci", "docs")
    found = [path for place in places for path in (ROOT / place).rglob("*.py")]
    return [path for path in found if LINK not in path.parents]


def test_files_and_functions_are_short() -> None:
    long = {}
    for path in all_sources():
        text = path.read_text()
        if text.count("\n") > MOST_LINES:
            long[str(path)] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name not in KERNELS:
                lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
                if lines > MOST_OF_A_FUNCTION:
                    long[f"{path}: {node.name}"] = lines
    assert not long


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_loops_of_the_kernels(kernel: str) -> None:
    path = ROOT / "kernels" / f"{kernel.split('_')[0]}.py"
    tree = ast.parse(path.read_text())
    (function,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == kernel
    )
    (loop,) = (node for node in ast.walk(function) if isinstance(node, ast.While))
    assert loop.end_lineno is not None
    branches = sum(isinstance(node, (ast.If, ast.IfExp)) for node in ast.walk(loop))
    assert loop.end_lineno - loop.lineno + 1 <= KERNELS[kernel]
    assert branches <= MOST_BRANCHES


def test_frames_from_a_module_to_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, the deeper way; docs/architecture.md names them."""
    stacks: list[list[str]] = []

    def spy(*args: object) -> None:
        # Resolved: the kernels are imported through a link.
        files = [(Path(f.filename).resolve(), f.name) for f in traceback.extract_stack()]
        ours = [f"{path.name}: {name}" for path, name in files if path in paths]
        stacks.append(ours[ours.index("lstm.py: forward") :])

    paths = set(MODULES.values())
    with host.idle_gpu():
        monkeypatch.setattr(launch, "launch_once", spy)
        layer = fused_rnn.FusedLSTM(3, 8, backend="triton")
        layer(torch.randn(4, 2, 3))
    assert len(stacks) == 1
    assert stacks[0][-1] == "launch.py: launch"
    assert len(stacks[0]) + 1 <= MOST_FRAMES, stacks[0]  # and launch_once itself

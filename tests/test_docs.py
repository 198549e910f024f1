"""The documentation runs, names what exists, and says all that the code can say to a user."""

import ast
import doctest
import importlib
import os
import pkgutil
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_rnn
from fused_rnn import cells
from fused_rnn.cells import builtin
from fused_rnn.derive.aten import RULES, RULES_OF_SEVERAL, decompositions

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# Not asked here: a link, and the folders of commands, which say it themselves. Only what lies below
# the checkout counts, which may itself lie in a folder of such a name.
OTHERS = {"kernels", "examples", "check"}
PACKAGE = ROOT / "fused_rnn"
OURS = [p for p in PACKAGE.glob("**/*.py") if not OTHERS & set(p.relative_to(PACKAGE).parts)]
SOURCES = sorted([*OURS, *ROOT.glob("kernels/*.py")])
MODULES = sorted(m.name for m in pkgutil.walk_packages(fused_rnn.__path__, "fused_rnn."))
COMPILED_ONLY = "<!-- compiled only -->\n"  # stands before a block that takes long

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
every_module = pytest.mark.parametrize("name", ["fused_rnn", *MODULES])


# ---- docstrings ---------------------------------------------------------------------------------


@every_module
def test_docstrings(name: str) -> None:
    """Examples give what they say, and help() has something to show."""
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
    text = pydoc.render_doc(module, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    assert (module.__doc__ or name).splitlines()[0] in text


def test_the_layers_have_examples() -> None:
    finder = doctest.DocTestFinder()
    for name in (
        "fused_rnn.layers.rnn",
        "fused_rnn.layers.lstm",
        "fused_rnn.layers.base",
        "fused_rnn.cells.definition",
    ):
        assert any(t.examples for t in finder.find(importlib.import_module(name))), name


# ---- pages --------------------------------------------------------------------------------------


def blocks() -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text()
        for number, match in enumerate(re.finditer(r"```python\n(.*?)```", text, re.DOTALL)):
            runs = not text[: match.start()].endswith(COMPILED_ONLY)
            yield pytest.param(match[1], runs, id=f"{page.stem}-{number}")


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    """Take back what an example may set."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    before = getattr(rnn, "fp32_precision", None)
    yield
    if before is not None:
        rnn.fp32_precision = before


@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize(("code", "runs"), list(blocks()))
def test_examples(code: str, runs: bool) -> None:
    compiled = compile(code, "example", "exec")
    if runs:
        exec(compiled, {})


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchor(heading: str) -> str:
    """What a heading is linked by."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@every_page
def test_nothing_of_a_merge_is_left(page: Path) -> None:
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", page.read_text(), re.MULTILINE)


@every_page
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        name, _, fragment = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", prose(file), flags=re.MULTILINE)
            assert fragment in map(anchor, headings), target


@every_page
def test_files_and_commands(page: Path) -> None:
    """What a page names is there: files, modules that are run, targets of make."""
    text = page.read_text()
    folders = "tests|docs|bench|kernels|fused_rnn"
    for name in re.findall(rf"(?<![\w./])((?:{folders})/[\w/.*]+\.\w+)", text):
        assert list(ROOT.glob(name)), name
    for name in re.findall(r"python -m\s+([\w.]+)", text):
        assert find_spec(name), name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for name in re.findall(r"(?:^ {4}|`)make ([\w-]+)", text, flags=re.MULTILINE):
        assert name in targets, name


# ---- what the code says -------------------------------------------------------------------------


def words_of(call: ast.expr | None) -> str | None:
    """The message of what is raised, an ellipsis where it varies; None if it is not there."""
    if not isinstance(call, ast.Call) or not call.args:
        return None
    message = call.args[0]
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        parts = (str(p.value) if isinstance(p, ast.Constant) else "…" for p in message.values)
        return "".join(parts)
    return None


def messages() -> Iterator[str]:
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Raise) and (words := words_of(node.exc)):
                yield words


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for message in messages():
        longest = max(message.split("…"), key=len).strip()
        if len(longest) > 5:
            assert longest in text, message


def test_what_is_explained_can_happen() -> None:
    """Every quoted error, reason or warning is in the code."""
    text = prose(ROOT / "docs" / "troubleshooting.md")
    code = "".join(source.read_text() for source in SOURCES)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # literals that go on in the next line
    quoted = [
        q for row in re.findall(r"^\| (.*?) \| ", text, re.M) for q in re.findall("`(.*?)`", row)
    ]
    assert len(quoted) > 50
    for message in quoted:
        for part in message.split("…"):
            words = part.strip(" :`")
            assert len(words) < 4 or words in code, message


def test_every_environment_variable_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    found = set()
    for source in SOURCES:
        found |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", source.read_text()))
    assert {"FUSED_RNN_TUNE", "FUSED_RNN_CACHE", "TRITON_INTERPRET"} <= found
    for name in found:
        assert f"| `{name}` |" in text, name


# ---- cells ---------------------------------------------------------------------------------------


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the table below a heading of docs/cells.md."""
    section = (ROOT / "docs" / "cells.md").read_text().split(f"\n## {heading}\n")[1]
    table = re.findall(r"^\|(.*)\|$", section.split("\n## ")[0], re.M)
    yield from ([part.strip() for part in row.split("|")] for row in table[2:])


def test_the_table_of_operations() -> None:
    """It has all that a step may be made of, and nothing else."""
    told = [name for _, text in rows("Operations") for name in re.findall(r"`(\w+)`", text)]
    parts = {op.overloadpacket.__name__ for op in decompositions()}
    names = (*RULES, *RULES_OF_SEVERAL, *parts)
    known = {name for name in names if not name.endswith("_backward")}
    assert sorted(told) == sorted([*known, "logsigmoid", "layer_norm"])  # those as a user's names


def test_the_table_of_the_zoo() -> None:
    """It has every cell with its states, and a paper that the cell's docstring names."""
    zoo = {name for name in cells.__all__ if name not in vars(builtin)}
    told = list(rows("The zoo"))
    assert {row[0].strip("`") for row in told} == zoo
    for name, states, _, paper in told:
        found = getattr(cells, name.strip("`"))
        assert states == ", ".join(found.states)
        title = " ".join(re.findall('"(.*?)"', paper)).lower()
        assert title in " ".join(found.step.__doc__.split()).lower(), name


# ---- what scripts write -------------------------------------------------------------------------


@pytest.mark.slow
def test_sass_page_is_up_to_date(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    page = (ROOT / "docs" / "sass.md").read_text()
    if f"Triton {triton.__version__}," not in page:
        pytest.skip("the page was written with another version of Triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "sass.md"
    command = [sys.executable, ROOT / "docs" / "sass.py", out]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_text() == page

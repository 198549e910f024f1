"""A test that hangs on a GPU ends, and takes no others with it."""

import subprocess
import sys
from pathlib import Path

import pytest

# A wait outside of Python, as for a GPU: a signal would not interrupt it.
HANG = """
import ctypes, signal
import pytest

@pytest.mark.gpu
def test_before():
    pass

@pytest.mark.gpu
def test_hang():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    ctypes.CDLL(None).sleep(60)

@pytest.mark.gpu
def test_after():
    pass
"""

# The rule of this folder's conftest.py, without its fixtures, and sooner.
CONFTEST = """
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("ours", {path!r})
ours = module_from_spec(spec)
spec.loader.exec_module(ours)
assert ours.GPU_TEST_SECONDS > 3
ours.GPU_TEST_SECONDS = 3
pytest_collection_modifyitems = ours.pytest_collection_modifyitems
"""


def test_every_gpu_test_has_a_timeout(request: pytest.FixtureRequest) -> None:
    marked = [item for item in request.session.items if item.get_closest_marker("gpu")]
    for item in marked:
        timeout = item.get_closest_marker("timeout")
        assert timeout is not None, item.nodeid
        assert timeout.kwargs["method"] == "thread", item.nodeid


@pytest.mark.slow
def test_a_hang_ends_its_worker_alone(tmp_path: Path) -> None:
    (tmp_path / "test_hang.py").write_text(HANG)
    path = str(Path(__file__).with_name("conftest.py"))
    (tmp_path / "conftest.py").write_text(CONFTEST.format(path=path))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: of this test\n")
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "-v"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "crashed while running 'test_hang.py::test_hang'" in done.stdout

# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

# Runs with the Python at hand, however old it is.
define CHECK_PYTHON
import sys
name = "Python %d.%d (%s)" % (sys.version_info[0], sys.version_info[1], sys.executable)
if sys.version_info < (3, 10):
    sys.exit(name + " is too old: 3.10 or newer is needed, as in make PYTHON=python3.12 demo")
try:
    import ensurepip, venv
except ImportError:
    sys.exit(name + " lacks venv or ensurepip: on Debian and Ubuntu, install python3-venv")
endef
export CHECK_PYTHON

.PHONY: demo test test-slow lint bench clean

demo: .venv/ready
	$(BIN)/python -m fused_rnn.examples.textgen

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

# Tables on the terminal, lines of JSON and pictures under runs/bench; minutes, on a GPU more.
bench: .venv/ready
	mkdir -p runs/bench
	$(BIN)/python -m pytest bench --benchmark-autosave --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m bench.run --seconds 2 --out runs/bench
	$(BIN)/python -m bench.report runs/bench --plots runs/bench
	$(BIN)/python -m bench.sweep_cpu --out runs/bench/sweep --plot runs/bench/sweep/sweep-cpu.png
	$(BIN)/python -m bench.cells --out runs/bench
	$(BIN)/python -m bench.recipes
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.accuracy --plot runs/bench/accuracy.png
	$(BIN)/python -m bench.learning --plot runs/bench/learning.png

# A first attempt that fails is removed, and what is left of one that was killed is cleared: .venv
# keeps its Python for good, so the next attempt, with another one, must not build on it. Where
# .venv/ready is there but out of date, the packages are brought up to date with the Python of .venv.
.venv/ready: pyproject.toml constraints.txt
	@test -e $@ || $(PYTHON) -c "$$CHECK_PYTHON"
	@{ test -e $@ || $(PYTHON) -m venv --clear .venv; } \
		&& $(BIN)/python -m pip install --quiet --upgrade pip \
		&& $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' \
		|| { test -e $@ || rm -rf .venv; exit 1; }
	@touch $@

clean:
	rm -rf .venv build dist runs *.egg-info

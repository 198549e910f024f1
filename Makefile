# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

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

# Tables on the terminal, lines of JSON and pictures under runs/bench; minutes, on a GPU more.
bench: .venv/ready
	mkdir -p runs/bench
	$(BIN)/python -m pytest bench --benchmark-autosave --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m bench.run --seconds 2 --out runs/bench
	$(BIN)/python -m bench.report runs/bench --plots runs/bench
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.accuracy --plot runs/bench/accuracy.png
	$(BIN)/python -m bench.learning --plot runs/bench/learning.png

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist runs *.egg-info

# `make demo` and `make test` set everything up by themselves on a new machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check check-slow fuzz format clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,transformers]'
	touch $@

demo: setup
	$(BIN)/qlip demo --out report

# One thread a process: pytest fills the cores with processes.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4

check: setup
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(MAKE) test

check-slow: setup
	$(BIN)/python -m pytest

# Hostile inputs of every reader; an input that failed is kept, and is read again by its number.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.fuzz.run --keep fuzz-failures

format: setup
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples

clean:
	rm -rf .venv report .pytest_cache .mypy_cache .ruff_cache

# make demo      a virtual environment, the library, and its first experiment with figures
# make test      the whole test suite, with its own set-up
# make check     formatting, lint and types
# make bench     every benchmark in one run, as a table in bench/results/
# make accuracy  errors of every op against extended precision
# make sanitize  the kernel tests on C++ compiled with the address and undefined-behaviour sanitizers
# make fuzz      a minute of random shapes, strides and extreme values
PYTHON ?= python3
VENV ?= .venv
# The release the tests run against. On Linux its wheel brings CUDA, some gigabytes; without a GPU:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BACKEND ?= cpu
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)

.PHONY: demo test check bench accuracy sanitize fuzz clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[experiments]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m fluxkernels
	$(BIN)/python -m experiments run controllable --preset small

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed-bench
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=bench.json
	$(BIN)/python -m bench.report bench.json

accuracy: $(VENV)/installed-dev
	$(BIN)/python -m bench.accuracy --backend $(BACKEND)

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m tests.fuzz --seconds 60

clean:
	rm -rf $(VENV) build dist *.egg-info fluxkernels/cpu/*.so .pytest_cache .mypy_cache .ruff_cache

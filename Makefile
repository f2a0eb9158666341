# make demo    a virtual environment, the library, and its first experiment with figures
# make test    the whole test suite, with its own set-up
# make check   formatting, lint and types
PYTHON ?= python3
VENV ?= .venv
# The release the tests run against. On Linux its wheel brings CUDA, some gigabytes; without a GPU:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test check bench accuracy clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[experiments]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
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

bench: $(VENV)/installed-dev
	$(BIN)/python -m pytest bench --benchmark-only

accuracy: $(VENV)/installed-dev
	$(BIN)/python -m bench.accuracy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

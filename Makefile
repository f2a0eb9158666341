# make demo         a virtual environment, the library, its first experiment, and a page with its pictures
# make test         the test suite, with its own set-up; of the Triton tests a part, see CONTRIBUTING.md
# make triton       all Triton tests: every case in Triton's interpreter, compilation for every architecture
# make check        formatting, lint, types and layers of imports
# make docs         the documentation site, with its pages executed, into docs/_build/html; warnings are errors
# make bench        every benchmark in one run, into bench/results/ and the tables of bench/README.md
# make gpu          on a machine with a CUDA card: tests and benchmarks there, into one dated JSON in bench/results/;
#                   fails if a test does, or if an error of ours is above its bound
# make accuracy     errors of every op against extended precision
# make reliability  fuzz, adversarial cases, kill and resume, soak, sanitizers, wheels, into bench/results/
# make sanitize     the kernel tests on C++ compiled with the address and undefined-behavior sanitizers
# make arm64        whether the kernels compile for arm64 (needs aarch64-linux-gnu-g++)
# make fuzz         a minute of random shapes, strides and extreme values
PYTHON ?= python3
VENV ?= .venv
# The release the tests run against. On Linux its wheel brings CUDA, some gigabytes; without a GPU:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BACKEND ?= cpu
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)

.PHONY: demo test test-kernels test-library test-experiments test-more-experiments triton check docs bench gpu accuracy reliability sanitize arm64 fuzz clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[experiments]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m fluxkernels
	$(BIN)/python -m experiments run controllable --preset small
	$(BIN)/python -m experiments report

# In two processes at once, for two cores; each part prints when it ends, where make can do that. Threads that wait for
# others do not spin: on a shared core that would take most of the time.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
PARTS := test-kernels test-library test-experiments test-more-experiments

test: $(VENV)/installed-dev
	$(MAKE) --keep-going -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(PARTS)

test-kernels: $(VENV)/installed-dev
	$(PYTEST) --ignore=tests/fluxmatching --ignore=tests/experiments

test-library: $(VENV)/installed-dev
	$(PYTEST) tests/fluxmatching

test-experiments: $(VENV)/installed-dev
	$(PYTEST) $(wildcard tests/experiments/test_[a-i]*.py)

test-more-experiments: $(VENV)/installed-dev
	$(PYTEST) $(wildcard tests/experiments/test_[j-z]*.py)

triton: $(VENV)/installed-dev
	FLUXKERNELS_TESTS=complete $(BIN)/python -m pytest tests/fluxkernels/test_triton.py tests/fluxkernels/test_budgets.py

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

docs: $(VENV)/installed-docs
	OMP_WAIT_POLICY=passive $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

bench: $(VENV)/installed-bench
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-max-time=0.5 --benchmark-json=bench.json
	$(BIN)/python -m bench.report bench.json

# With the PyTorch and Triton of PYTHON itself, which suit the card's driver; it needs pytest and what the networks of
# the benchmarks import: diffusers, lightning, matplotlib, tyro, and torchdiffeq. pytest-xdist makes the tests quicker.
gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/python_api:$$PYTHONPATH $(PYTHON) -m bench.gpu $(if $(COMMIT),--commit $(COMMIT))

accuracy: $(VENV)/installed-dev
	$(BIN)/python -m bench.accuracy --backend $(BACKEND)

reliability: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet "pybind11>=2.13" "setuptools>=77"
	$(BIN)/python -m bench.reliability
	$(BIN)/python -m bench.report

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m tests.programs.fuzz --seconds 60

sanitize: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet "pybind11>=2.13" "setuptools>=77"
	$(BIN)/python -m bench.reliability --only sanitizer --output build

arm64:
	for file in csrc/parallel.cpp csrc/targets/*.cpp; do \
		aarch64-linux-gnu-g++ -std=c++17 -O3 -fno-math-errno -Wall -Wextra -Werror -c $$file -o /dev/null || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist docs/_build docs/imported bench.json *.egg-info fluxkernels/cpu/*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache bench/results/*-rows.json

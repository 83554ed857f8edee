# `make tune` runs the main job, `make check` what one runs while working, `make test` everything that CI runs; each sets
# up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Named by itself, so that nothing else decides which build of it is taken; without an index of its own it is the CPU's.
TORCH := torch==2.13.0
PIP := -m pip --disable-pip-version-check --quiet
# One process for each core; the tests of a file run in one of them, and share what is costly to set up.
PYTEST = $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

.PHONY: tune test check lint quick bench lock clean

tune: $(READY)
	$(BIN)/tune --arch native --op moe_gemm --model mixtral-8x7b --tp 8

test: lint
	$(PYTEST) tests

# What one runs while working: all unit tests, two cases of every contract, beside lint and types.
check: $(READY)
	$(MAKE) --jobs=2 --output-sync=target lint quick

quick: $(READY)
	$(PYTEST) --quick tests/unit tests/golden tests/contract tests/e2e/test_docs.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Peers to race against are large and not needed for anything else, so they are installed here alone.
bench: $(READY)
	$(BIN)/python $(PIP) install -r requirements/bench.lock
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' -o timeout=0 -o filterwarnings=default

$(READY): requirements/test.lock pyproject.toml runtime/_native.c $(wildcard runtime/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) install -r requirements/test.lock
	$(BIN)/python $(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

# Newest versions of everything that pyproject.toml asks for. `+cpu` is dropped: it names a build, not a version.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(PIP) install $(TORCH) '.[dev]'
	build/lock/bin/python $(PIP) freeze --all --exclude pip --exclude tilewright | sed 's/+cpu$$//' > requirements/test.lock
	build/lock/bin/python $(PIP) install --constraint requirements/test.lock '.[dev,bench]'
	build/lock/bin/python $(PIP) freeze --all --exclude pip --exclude tilewright | sed 's/+cpu$$//' | grep -vxFf requirements/test.lock > requirements/bench.lock

clean:
	rm -rf $(VENV) build dist src/*.egg-info *.egg-info

# Two commands: `make tune` runs the main job, `make test` everything that CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: tune test bench lint clean

tune: $(READY)
	$(BIN)/tune --arch native --op moe_gemm --model mixtral-8x7b --tp 8

test: $(READY) lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/pip install --quiet -r requirements/bench.lock
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' -o timeout=0 -o filterwarnings=default

# torch is named in the lock, so that nothing else decides which build of it is taken.
$(READY): requirements/test.lock pyproject.toml runtime/_native.c $(wildcard runtime/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements/test.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

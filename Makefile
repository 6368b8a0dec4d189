# `make` alone lists the targets. Nothing has to be installed by hand but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
LATEST := .venv-latest
STAMP := $(VENV)/.installed
LATEST_STAMP := $(LATEST)/.installed
TESTS ?= tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-latest faults full-size lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@for file in $(wildcard benchmarks/bench_*.py); do \
		name=$${file#benchmarks/bench_}; echo "  make bench-$${name%.py}"; done

setup: $(STAMP) ## .venv with the locked dependencies; repeated only when they change

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,int8,optimum]"
	@touch $@

# transformers 5, without optimum's ONNX part, which does not support it yet.
$(LATEST_STAMP): pyproject.toml constraints-latest.txt
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-latest.txt -e ".[dev,int8]"
	@touch $@

demo: setup ## the whole path on the packaged pair: merge, export, verify
	$(VENV)/bin/exporter demo

test: setup ## the tests (TESTS=tests/merge for a part)
	$(VENV)/bin/python -m pytest -m "not slow" $(TESTS)

test-latest: $(LATEST_STAMP) ## the same tests on the newest transformers
	$(LATEST)/bin/python -m pytest -m "not slow" $(TESTS)

faults: setup ## every fault against every command; the matrix in build/fault-matrix.md
	$(VENV)/bin/python -m pytest tests/faults

full-size: setup ## every stage at 6.7B, with its figures (ARGS="--size 111M" for less)
	$(VENV)/bin/python benchmarks/full_size.py $(ARGS)

lint: setup ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: setup ## let ruff rewrite the files
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# make bench-decode ARGS="--sizes demo --contenders exporter"
bench-%: benchmarks/bench_%.py $(STAMP)
	$(VENV)/bin/python $< $(ARGS)

clean: ## remove caches and packages; keep .venv, artifacts/ and build/demo
	rm -rf .pytest_cache .ruff_cache .hypothesis dist build/lib build/bdist.* *.egg-info
	find exporter tests recipes -name __pycache__ -prune -exec rm -rf {} +

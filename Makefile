# `make` alone lists the targets. Nothing has to be installed by hand but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
LATEST := .venv-latest
STAMP := $(VENV)/.installed
LATEST_STAMP := $(LATEST)/.installed
TOOLS := .venv-tools
TOOLS_STAMP := $(TOOLS)/.installed
EXAMPLES ?= 5000
TESTS ?= tests
# A file's tests stay in one process: what they share is made once.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow test-latest calibrate coverage faults full-size soak lint format clean fuzz sbom audit

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

test: setup ## the tests (TESTS=tests/merging for a part)
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not slow" $(TESTS)

test-slow: setup ## the tests that take minutes
	$(VENV)/bin/python -m pytest -m slow $(TESTS)

test-latest: $(LATEST_STAMP) ## the same tests on the newest transformers
	$(LATEST)/bin/python -m pytest $(PARALLEL) -m "not slow" $(TESTS)

BUNDLES ?= artifacts/demo/merged artifacts/demo/int8

calibrate: setup ## how near each gate of verify comes to its limit, on both halves of the prompts (BUNDLES=...)
	$(VENV)/bin/python benchmarks/calibrate.py $(BUNDLES)

coverage: setup ## how often the intervals of verify hold, by simulation
	$(VENV)/bin/python benchmarks/bound_coverage.py

faults: setup ## every fault against every command; the matrix in build/fault-matrix.md
	EXPORTER_FAULT_MATRIX=build/fault-matrix.md $(VENV)/bin/python -m pytest tests/faults

full-size: setup ## every stage at 6.7B, with its figures (ARGS="--size 111M" for less)
	$(VENV)/bin/python benchmarks/full_size.py $(ARGS)

soak: setup ## a server under everything that clients do, for 10 minutes (ARGS="--minutes 1" for less)
	$(VENV)/bin/python benchmarks/soak.py $(ARGS)

fuzz: setup ## every parser against EXAMPLES=5000 random inputs each
	EXPORTER_FUZZ_EXAMPLES=$(EXAMPLES) $(VENV)/bin/python -m pytest tests/hostile/test_fuzz.py

# An environment of their own: what looks at the lock is not part of it.
$(TOOLS_STAMP): tools/requirements.txt
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check -r tools/requirements.txt
	@touch $@

sbom: setup $(TOOLS_STAMP) ## build/sbom.cdx.json: what .venv holds, with versions and licences (CycloneDX)
	mkdir -p build
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file build/sbom.cdx.json $(VENV)/bin/python

audit: $(TOOLS_STAMP) ## known advisories against constraints.txt; says so where no database can be reached
	$(TOOLS)/bin/python tools/audit.py $(TOOLS)/bin/pip-audit constraints.txt

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

# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs: a virtual environment with pinned packages, SGLang, and this package (editable).
# Needs Python 3.11 and a package index that pip can reach; nothing else from the network.

VENV ?= .venv
PYTHON ?= $(shell for name in python3.11 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=

export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1

.PHONY: help install dev demo test lint types pytest sweep bench format clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 found (tried python3.11, python3, python): install \
	it, or say where it is with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: made anew when a list of packages changes. The package's own code is never copied.
$(VENV)/installed: requirements/cpu.txt requirements/sglang.txt pyproject.toml setup.py | $(VENV)/bin/python
	@echo "Installing pinned packages into $(VENV): about 2.5 GB, once"
	$(PIP) install -q --no-warn-conflicts -r requirements/cpu.txt
	$(PIP) install -q --no-warn-conflicts --no-deps -r requirements/sglang.txt
	$(PIP) install -q --no-warn-conflicts --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/developing: requirements/dev.txt $(VENV)/installed
	$(PIP) install -q --no-warn-conflicts -r requirements/dev.txt
	@touch $@

install: $(VENV)/installed  ## set up .venv to run the server: .venv/bin/python launch.py --help

dev: $(VENV)/developing  ## set up .venv for development too

demo: $(VENV)/installed  ## a server at TP 2 with a quarter of the cache, with and without FairKV
	$(BIN)/python demo/run.py

test: lint types pytest  ## everything that has to pass: ruff, mypy, all tests but the sweep

lint: $(VENV)/developing  ## ruff
	$(BIN)/ruff check .

# mypy sees the layout of a checkout as it is imported: kernels/, patches/ and bench/ inside fairkv_sglang
types: $(VENV)/developing  ## mypy
	@rm -rf build/types && mkdir -p build/types/fairkv_sglang
	@cd build/types/fairkv_sglang && ln -s ../../../fairkv_sglang/* ../../../kernels ../../../patches ../../../bench . && rm -f __pycache__
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

pytest: $(VENV)/developing  ## the tests alone; options in PYTEST_ARGS
	$(BIN)/pytest -m "not sweep" $(PYTEST_ARGS)

sweep: $(VENV)/developing  ## the long tests: many placements, models and TP sizes
	FAIRKV_SWEEP_REPORT=$(abspath docs/results) $(BIN)/pytest -m sweep $(PYTEST_ARGS)

bench: $(VENV)/installed  ## all variants side by side on a model of Qwen3-0.6B's proportions
	$(BIN)/fairkv bench --variants all --prompts 16 --prompt-len 2048 --shared-prefix 2016 --output-len 32 --ratio 0.25

format: $(VENV)/developing  ## ruff's formatter
	$(BIN)/ruff check --fix -q . && $(BIN)/ruff format .

clean:  ## remove everything that make has made
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

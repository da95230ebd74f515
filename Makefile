# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs: a virtual environment with pinned packages, SGLang, and this package (editable).
# Needs Python 3.11 and a package index that pip can reach; nothing else from the network.

VENV ?= .venv
PYTHON ?= $(shell for name in python3.11 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
CHAOS_ARGS ?=
MODEL ?=
DEMO_ARGS ?=
WORKERS ?= 2
# The tests of a file stay on one worker, as they share engines; engines come first, so that no worker ends long before the other.
PYTEST = $(ON_SGLANG) $(BIN)/pytest $(PYTEST_ARGS)
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# SGLANG=0.5.23: tests run on that version's wheel, which takes precedence over the installed SGLang.
SGLANG ?=
ifdef SGLANG
WHEEL := build/sglang-$(SGLANG)/complete
ON_SGLANG := PYTHONPATH=$(abspath $(dir $(WHEEL)))
endif

export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1

.PHONY: help install dev demo test lint types unit engine smoke sweep chaos bench format clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 found (tried python3.11, python3, python): install \
	it, or say where it is with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: made anew when a list of packages changes. The package's own code is never copied.
$(VENV)/installed: requirements/cpu.txt requirements/sglang.txt pyproject.toml setup.py fairkv_sglang/torchvision_finder.py | $(VENV)/bin/python
	@echo "Installing pinned packages into $(VENV): about 2.5 GB, once"
	$(PIP) install -q --no-warn-conflicts -r requirements/cpu.txt
	$(PIP) install -q --no-warn-conflicts --no-deps -r requirements/sglang.txt
	$(PIP) install -q --no-warn-conflicts --no-deps --no-build-isolation -e .
	$(BIN)/python fairkv_sglang/torchvision_finder.py  # the index has torchvision for CUDA
	@touch $@

$(VENV)/developing: requirements/dev.txt requirements/kvpress.txt $(VENV)/installed
	$(PIP) install -q --no-warn-conflicts -r requirements/dev.txt
	$(PIP) install -q --no-warn-conflicts --no-deps -r requirements/kvpress.txt
	@touch $@

install: $(VENV)/installed  ## set up .venv to run the server: .venv/bin/python launch.py --help

dev: $(VENV)/developing  ## set up .venv for development too

demo: $(VENV)/installed  ## a server with a quarter of the cache, with and without FairKV; a real model with MODEL=smollm2
	$(BIN)/python demo/run.py $(if $(MODEL),--model $(MODEL)) $(DEMO_ARGS)

ifdef SGLANG
test: engine
else
test: lint types  ## everything that has to pass: ruff, mypy, all tests but the sweep; SGLANG=0.5.23: engine tests on that version
	$(PYTEST) --hypothesis-profile=same-examples -m "not sweep" $(PARALLEL)
endif

lint: $(VENV)/developing  ## ruff
	$(BIN)/ruff check .

# mypy sees the layout of a checkout as it is imported: kernels/, patches/ and bench/ inside fairkv_sglang
types: $(VENV)/developing  ## mypy
	@rm -rf build/types && mkdir -p build/types/fairkv_sglang
	@cd build/types/fairkv_sglang && ln -s ../../../fairkv_sglang/* ../../../kernels ../../../patches ../../../bench . && rm -f __pycache__
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

unit: $(VENV)/developing $(WHEEL)  ## the quick tests: no engine is started
	$(PYTEST) -m "not engine and not slow and not sweep" $(PARALLEL)

engine: $(VENV)/developing $(WHEEL)  ## the tests of real engines
	$(PYTEST) -m "engine and not sweep" $(PARALLEL)

smoke: $(VENV)/developing $(WHEEL)  ## what each supported SGLang has to pass; for another version: SGLANG=0.5.23
	$(PYTEST) -m smoke $(PARALLEL)

sweep: $(VENV)/developing  ## the long tests: many placements, models and TP sizes
	FAIRKV_SWEEP_REPORT=$(abspath docs/results) $(PYTEST) -m sweep

chaos: $(VENV)/developing  ## 2,000 requests of every kind on a real server, and its books afterwards; options in CHAOS_ARGS
	PYTHONPATH=tests/helpers $(BIN)/python -m fairkv_tests.chaos $(CHAOS_ARGS)

build/sglang-%/complete: | $(VENV)/bin/python
	@rm -rf $(@D) && mkdir -p $(@D)
	$(PIP) download -q --no-deps --dest build/wheels sglang==$*
	$(BIN)/python -m zipfile -e build/wheels/sglang-$*-*.whl $(@D)
	@touch $@

bench: $(VENV)/installed  ## all variants side by side on a model of Qwen3-0.6B's proportions
	$(BIN)/fairkv bench --variants all --prompts 16 --prompt-len 2048 --shared-prefix 2016 --output-len 32 --ratio 0.25

format: $(VENV)/developing  ## ruff's formatter
	$(BIN)/ruff check --fix -q . && $(BIN)/ruff format .

clean:  ## remove everything that make has made
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

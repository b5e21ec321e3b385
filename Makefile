# Each target works on a fresh machine: it makes the virtual environment first if there is none.
VENV ?= .venv
PYTHON ?= python3

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow matrix lint quality drills bench serve-test

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## create or refresh the virtual environment in $(VENV)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

demo: $(STAMP) ## compress a small real model, save it, load it back and let it write
	$(BIN)/python -m examples.demo

test: $(STAMP) ## run the tests, without those marked slow or gpu
	$(BIN)/python -m pytest -n 2

test-slow: $(STAMP) ## run the tests marked slow
	$(BIN)/python -m pytest -n 2 -m 'slow and not gpu'

matrix: $(STAMP) ## run the tests of the life cycle with every supported transformers
	$(BIN)/python -m tests.matrix --workers 2

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hf_lowbit

quality: $(STAMP) ## measure the quality of ARB-LLM beside the dense model and plain baselines
	$(BIN)/python -m benchmarks.quality.arb

drills: $(STAMP) ## flip bytes, kill processes, measure memory and loading (about half an hour)
	$(BIN)/python -m tests.drills

bench: $(STAMP) ## measure products with packed weights beside torch's own (about ten minutes)
	$(BIN)/python -m benchmarks.kernels

serve-test: $(STAMP) ## serve packed models with vLLM, which gets an environment of its own (slow)
	$(BIN)/python -m pytest tests/serving -m 'slow or not slow'

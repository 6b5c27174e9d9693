# `make` prints what there is. Everything runs in .venv, which is made when it is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.banyan-installed
INSTALL := -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt --config-settings editable_mode=compat
# What the usual environment is better off without, in environments of their own.
QUANT := .venv-quant
KERNELS := .venv-kernels
# Arguments for the command behind a target: make up ARGS="--model Qwen/Qwen2.5-0.5B-Instruct"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help up test test-quant test-kernels check format bench docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(STAMP) ## start everything; a chat endpoint on http://localhost:8000 (options: ARGS="…")
	@$(BIN)/banyan up $(ARGS)

test: $(STAMP) ## run every test that needs no GPU
	@$(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-quant: $(QUANT)/.banyan-installed ## test quantisation by torchao and compressed-tensors
	@$(QUANT)/bin/python -m pytest tests/integration/test_engine_quantization.py $(ARGS)

test-kernels: $(KERNELS)/.banyan-installed ## test the GPU's kernels, without a GPU in Triton's interpreter
	@TRITON_INTERPRET=1 $(KERNELS)/bin/python -m pytest \
		tests/unit/test_cuda_kernels.py tests/integration/test_engine_graphs.py $(ARGS)

check: $(STAMP) ## formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(STAMP) ## put the source into its form
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP) ## run the short benchmarks, each prints JSON (minutes; an idle machine)
	@$(BIN)/python -m bench.ttft
	@$(BIN)/python -m bench.engine --model models/tiny-chat --json -
	@$(BIN)/python -m bench.micro.bus
	@$(BIN)/python -m bench.micro.transport
	@$(BIN)/python -m bench.micro.tokenizer

docs: $(STAMP) ## regenerate the pages that are made from the source
	@$(BIN)/python docs/generate.py

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(QUANT) $(KERNELS) build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f shared/engine/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The kernels of the CPU are compiled here too, where there is a C compiler.
# editable_mode=compat puts this folder itself on the path, so that new packages need no reinstall.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard shared/engine/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "Banyan needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Banyan and its packages into $(VENV) (some minutes the first time) …"
	@$(BIN)/python $(INSTALL) --editable '.[all]'
	@touch $@

# They begin as the first one does, so that what is checked and compiled there is here too.
$(QUANT)/.banyan-installed: $(STAMP)
	@echo "Installing Banyan with the libraries of quantisation into $(QUANT) …"
	@test -x $(QUANT)/bin/python || $(BIN)/python -m venv $(QUANT)
	@$(QUANT)/bin/python $(INSTALL) --editable '.[worker,dev,quant]'
	@touch $@

# Torch's builds for CUDA bring Triton along, those for CPUs do not.
$(KERNELS)/.banyan-installed: $(STAMP)
	@echo "Installing Banyan with Triton into $(KERNELS) …"
	@test -x $(KERNELS)/bin/python || $(BIN)/python -m venv $(KERNELS)
	@$(KERNELS)/bin/python $(INSTALL) --editable '.[worker,dev]' triton
	@touch $@

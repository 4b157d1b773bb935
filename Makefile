# Everything a fresh machine with Python >= 3.10 needs: `make demo` and `make test` set themselves up in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# Passed on to pip, for an index or a proxy of your own: make demo PIP_ARGS="--index-url ..."
PIP_ARGS ?=
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: demo test test-all results clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/generate.py --image weights/demo/pages/page_5.png --prompt "What is the total?" --stats

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow or not slow"

# The tables and pictures of docs/, measured again.
results: $(VENV)/.installed-dev
	$(BIN)/python scripts/results.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache

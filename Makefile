# Penstock. `make demo` and `make test` need Python 3.11 or newer, and nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: demo test test-all lint ui install clean

demo: $(STAMP)
	@$(BIN)/python -m launch demo

test: $(DEV) lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" tests

test-all: $(DEV) lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

ui: $(STAMP)
	@$(BIN)/penstock ui runs

install: $(DEV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Penstock needs Python 3.11 or newer; give one as make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(STAMP): requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing the pinned requirements (once, a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): requirements-dev.txt $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) data/digits

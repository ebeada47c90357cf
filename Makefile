# Each target is sufficient on a fresh machine: it makes the virtual environment it needs.
#   make demo     build a small language-model family from the Python standard library (about 8 min)
#   make test     the tests
#   make claims   the papers' claims, each a small experiment
#   make check    formatting, lint, types, floors
#   make docs     the documentation, warnings are errors
#   make bench    install the peers and time ours beside them

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
DEMO ?= runs/demo
MINUTES ?=

export PYTHONUTF8 = 1

.PHONY: demo test claims check docs bench clean

# Environments: a stamp each, made again when the project file changes.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Needs Python 3.11 or newer with venv and ensurepip (Debian: apt install python3 python3-venv); or: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[report]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[dev]"
	@touch $@ $(VENV)/.run

$(VENV)/.bench: pyproject.toml benchmarks/requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[dev]" -r benchmarks/requirements.txt
	@touch $@ $(VENV)/.dev $(VENV)/.run

demo: $(VENV)/.run
	$(BIN)/cabochon demo --out $(DEMO) $(if $(MINUTES),--minutes $(MINUTES))

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not claim" tests

claims: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m claim tests

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.bench
	@for script in $$($(BIN)/python benchmarks/side_by_side.py); do \
	  echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) docs/_build .mypy_cache .ruff_cache .pytest_cache

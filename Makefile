# The project's verbs. `make demo` and `make test` work on a fresh machine with Python 3.11 to 3.13.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec  # a failing check must not hide behind a pipe
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Spinning OpenMP threads on shared cores cost up to tenfold; a moment of it spares waking them (hardware.SPIN_TURNS).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT ?= 1000
export TOKENIZERS_PARALLELISM ?= true
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo test test-slow lint format bench docs clean

setup: $(READY)  ## virtual environment with everything needed to train and to develop

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 to 3.13 is needed; say which: make setup PYTHON=python3.12"; exit 1; }
	@echo "setup: creating $(VENV) and installing packages (about a minute, 1.7 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "setup: installing python3-venv"; apt-get install -y -q python3-venv && $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,energy,dev]'
	@touch $(READY)
	@echo "setup: done"

demo: setup  ## tune the bundled model, evaluate, compare, export (under 3 minutes on two cores)
	@$(BIN)/ftf demo

lint: setup  ## ruff, mypy, the rooms' import rules
	@$(BIN)/ruff check src tests benchmarks examples
	@$(BIN)/ruff format --check -q src tests benchmarks examples || { echo "run: make format"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 12

format: setup
	@$(BIN)/ruff format -q src tests benchmarks examples
	@$(BIN)/ruff check --fix -q src tests benchmarks examples

test: lint  ## lint and the whole fast suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup  ## the tests marked slow: minutes each
	@$(BIN)/python -m pytest -m slow

bench: setup  ## speed and memory, as ratios against peers in one run
	@$(BIN)/python -m benchmarks

docs: setup  ## regenerate the generated parts of docs/ (settings, error codes)
	@$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist

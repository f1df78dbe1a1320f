# Try `make help`. Everything is installed into .venv; plain commands without make are in README.md.

PYTHON ?= python3
SCRIPT ?= ppo_continuous.py
SUITE ?= mujoco
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SHELL := bash

.PHONY: help setup train lint test benchmark
.DEFAULT_GOAL := help

help:
	@echo 'make train                       train ppo_continuous.py on HalfCheetah-v5 and draw the learning curve'
	@echo 'make train SCRIPT=... ARGS="..." any script with any of its flags'
	@echo 'make test                        ruff and pytest; make lint for ruff alone'
	@echo 'make benchmark SUITE=mujoco      run what is missing of a suite; ARGS="--jobs 2" for two runs at a time'
	@echo 'PYTHON=python3.12 after any of them chooses the Python that .venv is made with'

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "There is no $(PYTHON) here; name a Python of 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, $(PYTHON) is older; name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || \
		echo "Note: without a C++ compiler such as g++ the update is not compiled, and training is slower"
	@echo "Installing into $(VENV), which takes a few minutes the first time"
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

# The run directory is read off the first line that the script prints.
train: setup
	@log=$$(mktemp) && trap 'rm -f "$$log"' EXIT && set -o pipefail && \
	echo '$(RUN) $(SCRIPT) $(ARGS)' && \
	PYTHONUNBUFFERED=1 $(RUN) $(SCRIPT) $(ARGS) | tee -i "$$log" && \
	run=$$(sed -n 's/^Run directory: //p' "$$log" | head -n 1) && \
	if [ -n "$$run" ]; then \
		$(RUN) -m benchmark curve "$$run" && \
		echo "All that was logged: $(VENV)/bin/tensorboard --logdir $$run"; \
	fi

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test: lint
	$(RUN) -m pytest -q

benchmark: setup
	$(RUN) -m benchmark run --suite $(SUITE) $(ARGS)
	$(RUN) -m benchmark report --suite $(SUITE)

# `make quickstart` and `make test` set up all they need in .venv; first come only Python 3.11 or newer and make.

PYTHON ?= python3
INPUTS ?= 1000
ROUNDS ?= 2
VENV = .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
# glibc then asks the kernel for huge pages: 4 000 page faults an update instead of 930 000. Other C libraries ignore it.
HUGE_PAGES = GLIBC_TUNABLES=glibc.malloc.hugetlb=1

help:
	@echo "make quickstart   train a small model on two CPU cores and show what changed"
	@echo "make test         run the tests"
	@echo "make test-devices run those that depend on devices, on eight virtual ones"
	@echo "make fuzz         try INPUTS inputs on every fuzzer; with a finding it fails"
	@echo "make faults       kill and damage real runs, ROUNDS kills in each mode with each signal"
	@echo "make lint         run ruff and mypy"
	@echo "make docs         build the guide and the API pages into site/"
	@echo "make clean        remove the virtual environment and site/"

quickstart: $(VENV)/installed-quickstart
	$(HUGE_PAGES) $(BIN)/python examples/quickstart.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-devices: $(VENV)/installed-dev
	XLA_FLAGS="$(XLA_FLAGS) --xla_force_host_platform_device_count=8" \
	  $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "devices and not slow"

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS)

faults: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults --rounds $(ROUNDS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx --fail-on-warning --keep-going --builder html docs site

clean:
	rm -rf $(VENV) site

# Empty files that say what is installed; a newer pyproject.toml installs it again.
$(VENV)/installed-quickstart: $(BIN)/python pyproject.toml
	@echo "Installing into $(VENV), a few minutes the first time"
	$(INSTALL) ".[quickstart]"
	@touch $@

$(VENV)/installed-dev: $(BIN)/python pyproject.toml
	@echo "Installing into $(VENV), a few minutes the first time"
	$(INSTALL) ".[dev]"
	@touch $@

$(VENV)/installed-docs: $(BIN)/python pyproject.toml
	@echo "Installing into $(VENV), a few minutes the first time"
	$(INSTALL) ".[docs]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "$(PYTHON) is not Python 3.11 or newer. Name one that is, e.g.: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@# A half-made environment must not look like a whole one the next time.
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

.PHONY: help quickstart test test-devices fuzz faults lint docs clean

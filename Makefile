# Every target sets up what it needs. Begin with: make run
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
BIN := .venv/bin
SETUP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
RUN := runs/embedded
DEFAULT_TESTS := "not browser and not long and not slurm and not gpu and not multigpu"
SEED ?= 1
FAULTS ?= 100

.PHONY: help install run test test-long test-slurm test-slurm-long test-faults test-report slurm chromium check docs

help:
	@echo "make run      set up, train the embedded recipe, merge, evaluate, report (minutes on 2 cores, no download of models)"
	@echo "make test     set up, run the default tests"
	@echo "make test-long  the full matrices, within an hour; writes tests/long/RESULTS.md"
	@echo "make test-slurm  on a real Slurm cluster on this machine, in minutes; root, installs Debian's packages of Slurm"
	@echo "make test-slurm-long  twelve events on it; writes tests/slurm/RESULTS.md"
	@echo "make test-faults SEED=1 FAULTS=100  chains of random faults, half an hour; root; writes tests/faults/RESULTS.md"
	@echo "make test-report  looks at a report in a headless Chromium; installs Debian's package where it is missing"
	@echo "make check    set up, lint, types, imports, documentation"
	@echo "make docs     set up, build the documentation into site/; every broken link is an error"
	@echo "make install  the set-up alone: .venv with the versions in constraints.txt"

install: $(SETUP)

# The stamp's name holds the hash of what was asked for: nothing to do until that changes.
$(SETUP): | .venv/bin/pip
	@echo "install: packages of pyproject.toml in the versions of constraints.txt, into .venv (about 6 GB the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f .venv/.installed-*
	@touch $@
	@echo "install: done; GPUs seen by the driver: $$( (ls /proc/driver/nvidia/gpus 2>/dev/null || true) | wc -l)"

# Debian keeps `ensurepip` in a package of its own; without it `python -m venv` leaves half a folder behind.
.venv/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "install: $(PYTHON) is missing; install it, or name another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "install: Python 3.11 or newer is needed ($$($(PYTHON) -V))" >&2; exit 2; }
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
		root=""; [ "$$(id -u)" = 0 ] || root="sudo -n"; \
		echo "install: $(PYTHON) has no ensurepip; running: $$root apt-get install python3-venv"; \
		$$root apt-get update -qq && $$root apt-get install -y -qq --no-install-recommends python3-venv \
			|| { echo "install: could not; install the package python3-venv yourself, then repeat" >&2; exit 2; }; \
	fi
	@echo "install: making .venv with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv --clear .venv

run: install
	$(BIN)/samestep run recipes/embedded.yaml --name embedded
	@if [ -f $(RUN)/merged/config.json ]; then echo "merged already: $(RUN)/merged"; else \
		echo "$(BIN)/samestep merge embedded"; $(BIN)/samestep merge embedded; fi
	$(BIN)/samestep evaluate embedded --models base,adapter,shuffled
	$(BIN)/samestep report embedded

# Three workers on two cores: tests of launches wait for others. In which order, tests/helpers/scheduling.py says.
test: export PYTHONDONTWRITEBYTECODE =
test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m $(DEFAULT_TESTS)

test-long: install
	$(BIN)/python -m pytest -m "long and not slurm and not faults"

# Interrupted, it goes on with the same command.
test-faults: install
	SEED=$(SEED) FAULTS=$(FAULTS) $(BIN)/python -m pytest -s -m faults tests/faults

test-slurm: install slurm
	$(BIN)/python -m pytest -m "slurm and not long" tests/slurm

test-slurm-long: install slurm
	$(BIN)/python -m pytest -m "slurm and long" tests/slurm

# It and `chromium` alone install anything but .venv. The daemons of the packages are not what the tests use.
slurm:
	@if ! PATH=$$PATH:/usr/sbin:/sbin type slurmctld slurmd sbatch munged ip shellcheck >/dev/null 2>&1; then \
		[ "$$(id -u)" = 0 ] || { echo "test-slurm: needs root, to start Slurm and to install it" >&2; exit 2; }; \
		echo "test-slurm: installing slurmctld slurmd slurm-client munge iproute2 shellcheck"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			slurmctld slurmd slurm-client munge iproute2 shellcheck \
			|| { echo "test-slurm: could not; install these packages yourself, then repeat" >&2; exit 2; }; \
	fi

test-report: install chromium
	$(BIN)/python -m pytest -m browser tests/launch/report

chromium:
	@if ! type chromium >/dev/null 2>&1 && ! type google-chrome >/dev/null 2>&1; then \
		root=""; [ "$$(id -u)" = 0 ] || root="sudo -n"; \
		echo "test-report: installing chromium"; \
		$$root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends chromium \
			|| { echo "test-report: could not; install the package chromium yourself, then repeat" >&2; exit 2; }; \
	fi

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory docs

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# make train    the whole stack in miniature on two CPU processes: train, evaluate, export, report
# make test     formatting, lint, layers, types and every test
# make test-fast    the same without the tests that start processes or an engine
# make coverage     the lines of the package that no test runs
# make test-container   the tests of what touches Megatron-Core and vLLM, with the NeMo container's versions (Python 3.12)
# make test-latest      the same with the newest versions (Python 3.12)
# make test-gpu  on a machine with a GPU and the stack installed: kernels against float64, then scripts/gpu_report.py
# make test-slurm   the batch scripts on a real SLURM of one node, from Debian's packages (needs root)
# make audit    known vulnerabilities of the locked packages
# make warmstart    the demo model's initial weights, from nothing

PYTHON ?= python3
SUPPORTED := 3.11 3.12
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN ?= runs/$(firstword $(MAKECMDGOALS))-$(shell date +%Y%m%d-%H%M%S)
RUN := $(RUN)

.PHONY: train test test-fast test-heavy lint coverage test-container test-latest test-gpu test-slurm audit warmstart install lock clean

train: $(INSTALLED)
	$(BIN)/python scripts/train_ssopd.py --config-name tiny_cpu run_dir=$(RUN)

# Two at a time: the tests that start processes leave cores idle.
test: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs 2 test-heavy test-fast

test-fast: lint
	$(BIN)/python -m pytest -m "not heavy"

test-heavy: $(INSTALLED)
	$(BIN)/python -m pytest -m heavy

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck -x scripts/slurm/* tests/slurm/*.sh tests/slurm/*.sbatch

coverage: $(INSTALLED)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-container test-latest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest tests/megatron tests/checkpoint tests/convert tests/test_end_to_end.py

# With the python3 that a container brings, or PYTHON: nothing is installed. Both parts run, whatever the first finds.
test-gpu:
	code=0; \
	$(PYTHON) -m pytest --override-ini addopts= -q tests/gpu || code=1; \
	$(PYTHON) scripts/gpu_report.py --output $(RUN) || code=1; \
	cp $(RUN)/gpu_report.md docs/ && exit $$code

test-slurm: $(INSTALLED)
	tests/slurm/install.sh
	$(BIN)/python -m pytest --override-ini addopts= -q --durations=5 tests/slurm

audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet $(PIP_FLAGS) pip-audit==2.10.1
	$(VENV)-audit/bin/python scripts/audit.py requirements/cpu.txt

warmstart: $(INSTALLED)
	$(BIN)/python scripts/make_demo_model.py --output models/demo_random --seed 1
	$(BIN)/python scripts/train_ssopd.py --config-name warmstart run_dir=$(RUN)
	cp $(RUN)/hf/model.safetensors assets/demo_model/

install: $(INSTALLED)

# pyenv's python3.12 may be there without being the one that it has switched on.
.venv-%/.installed: PYTHON = $(or $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
    $$python -c pass 2>/dev/null && echo $$python && break; done),python3.12)
.venv-%/.installed: SUPPORTED := 3.12
.venv-container/.installed: requirements/container.txt
.venv-latest/.installed: requirements/latest.txt

# A later file's line for a package replaces an earlier one's, and the result is complete, so pip resolves nothing; but where
# the index has torch as a CUDA build alone, torch then asks for that build's libraries.
%/.installed: requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; v in "$(SUPPORTED)".split() or \
	    sys.exit("$(PYTHON) is Python " + v + ", but $* needs " + " or ".join("$(SUPPORTED)".split()) + ": make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $*
	awk -F== '{pins[$$1] = $$0} END {for (name in pins) print pins[name]}' $(filter requirements/%,$^) > $*/lock.txt
	$*/bin/python -m pip install --quiet --no-deps $(PIP_FLAGS) -r $*/lock.txt
	$*/bin/python -m pip install --quiet --no-warn-conflicts $(PIP_FLAGS) -c $*/lock.txt -c requirements/cuda.txt torch
	$*/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock:
	uv pip compile requirements/cpu.in --override requirements/overrides.txt --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet | sed 's/+cpu$$//' > requirements/cpu.txt

clean:
	rm -rf $(VENV) $(VENV)-* build *.egg-info

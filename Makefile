# `make help` lists the targets. Everything runs in .venv, which `make setup` makes and keeps up to date.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
OUTPUTS ?= runs
BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup mini smoke test check bench export lab docs docs-serve clean bench-gpu-script

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv and install the exact versions of requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "xtransfer needs Python 3.11 or newer and found no '$(PYTHON)'; name one with: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "xtransfer needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another with: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "setting up .venv; the first time takes some minutes, most of them for torch"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet $$(grep '^torch==' requirements.lock)
	@$(BIN)/python -m pip install --quiet -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

mini: setup ## run the replication study on two CPU cores (about 25 minutes) and write its report below runs/
	@$(BIN)/xtransfer run stilts --profile mini --outputs $(OUTPUTS)

smoke: setup ## run its smallest form (under 90 seconds)
	@$(BIN)/xtransfer run stilts --profile smoke --outputs $(OUTPUTS)

test: setup ## all tests: the library notebooks, generated code against notebooks, studies end to end
	@tests/run all

check: setup ## the tests that take no study: under five minutes
	@tests/run fast

bench: setup .venv/.benchmarks ## time the package beside its peers on this processor (under 30 minutes, goes on where it stopped); SET='--set PARAMETER=JSON' changes it
	@$(BIN)/python -m xtransfer.speed $(SET)

.venv/.benchmarks: requirements-bench.lock $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps -r requirements-bench.lock
	@touch $@

export: setup ## notebooks -> xtransfer/*.py, and notebooks without the traces of execution
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

lab: setup ## open the notebooks; start with start.ipynb
	@$(BIN)/jupyter lab nbs/start.ipynb

docs: setup ## the documentation site in site/, built without network; open site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open site/index.html; its search works when it is served, as by: make docs-serve"

docs-serve: setup ## the site at http://127.0.0.1:8000, rebuilt while pages are written
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench-gpu-script: setup ## write gpu_benchmark.py, one file that measures on a GPU what `make bench` measures here
	@$(BIN)/python nbs/benchmarks/gpu/build.py gpu_benchmark.py

clean: ## remove what can be made again; keeps .venv, runs/ and outputs/
	@rm -rf site _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

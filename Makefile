# Edgeward: the commands of the README. Everything stays inside this folder (.venv, build outputs).
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
UV := $(shell command -v uv 2>/dev/null)
BIN := .venv/bin
PYTEST_ARGS ?=
# Most tests wait for other processes, so one more than there are processors. A test that fails is run once again: it is
# printed with its trace, as one to mend, and only a second failure fails the run.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n < 8 ? n + 1 : 8 )))
PYTEST_ALL ?= -n $(WORKERS) --dist loadfile --reruns 1

.PHONY: demo setup setup-dev test lint bench docs wheel clean

demo: setup
	@$(BIN)/edgeward demo

setup: .venv/.edgeward

setup-dev: .venv/.edgeward-dev

.venv/.edgeward: pyproject.toml requirements.lock
	@bash scripts/setup.sh "$(PYTHON)" "$(UV)" requirements.lock
	@touch $@

.venv/.edgeward-dev: pyproject.toml requirements.lock requirements-dev.lock
	@bash scripts/setup.sh "$(PYTHON)" "$(UV)" requirements-dev.lock
	@touch $@ .venv/.edgeward

lint: setup-dev
	@$(BIN)/ruff format --check src tests benchmarks examples
	@$(BIN)/ruff check src tests benchmarks examples
	@$(BIN)/mypy
	@PYTHONPATH=src $(BIN)/lint-imports

test: setup-dev
	@bash scripts/system-packages.sh
	@$(MAKE) --no-print-directory lint
	@$(BIN)/pytest $(PYTEST_ALL) $(PYTEST_ARGS)

bench: setup-dev
	@$(BIN)/python -m benchmarks

docs: setup-dev
	@$(BIN)/python scripts/reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: site/index.html"

wheel: setup-dev
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:
	rm -rf .venv dist site .mypy_cache .ruff_cache .pytest_cache

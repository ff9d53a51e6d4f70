# `make` alone says what there is. Needs Python >= 3.11 and a C++ compiler; everything else goes into $(VENV).
# Settings: PYTHON, VENV, JOBS (test processes), ARGS (more arguments for the last command).
# pip's own environment variables are honoured; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the small torch without CUDA.

.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# The first Python that starts and is new enough (a launcher that is merely there may lead nowhere).
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
endif
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -lt 8 ] && echo $$n || echo 8)

export LONGCAT_LAB_CACHE ?= $(CURDIR)/.cache/longcat_lab
export PYTHON

NOTEBOOKS = $(shell find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' 2>/dev/null)
STRIP = $(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill metadata.language_info.version metadata.widgets"

.PHONY: help setup demo test test-slow test-npu lint format notebooks-strip lab lock clean

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: ## .venv with the locked stack; instant when it is up to date
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "longcat_lab needs Python 3.11 or newer, and $${PYTHON:-python3} is not: install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@$(PYTHON) tools/setup_env.py --venv "$(VENV)"

demo: setup ## a small ablation from start to finish; ends with the path of its report
	@$(BIN)/longcat-lab run ablations/demo.yaml $(ARGS)
	@$(BIN)/longcat-lab report runs/demo

test: setup lint ## lint, unit tests, and every notebook at smoke size
	@echo "Tests, $(JOBS) at a time:"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

test-slow: setup ## the tests that take minutes each
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

test-npu: setup ## of the tests that take minutes, those of the Ascend path (no NPU needed: a compiler, and the wheel of torch-npu)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" --timeout 1800 tests/npu $(ARGS)

lint: setup ## style and errors in code and notebooks; notebooks without outputs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(if $(NOTEBOOKS),$(STRIP) --verify $(NOTEBOOKS) || { echo "Notebooks are kept without outputs: make notebooks-strip" >&2; exit 1; })

format: setup ## put code and notebooks into the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebooks-strip: setup ## remove outputs and run metadata from the notebooks
	@$(if $(NOTEBOOKS),$(STRIP) $(NOTEBOOKS))

lab: setup ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab $(ARGS) notebooks

lock: ## write constraints.txt anew; UPGRADE="NAME …" or UPGRADE=all lets versions move
	@$(PYTHON) tools/lock.py $(if $(UPGRADE),--upgrade $(UPGRADE)) $(ARGS)

clean: ## remove .venv, caches and build leftovers; results in runs/ stay
	rm -rf "$(VENV)" .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

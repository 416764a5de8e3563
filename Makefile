# Two commands matter: `make sst` runs the main job, `make test` runs the tests; both set up what they need first.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= runs/sst
BIN := $(VENV)/bin

.PHONY: setup sst test test-all lint types docs dist-check clean

setup: $(VENV)/.installed

# torch goes first and by itself, so that a build that is there already (CPU or CUDA) is kept.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -c constraints.txt -e ".[sst,dev]"
	touch $@

sst: setup
	$(BIN)/probmodels sst --out $(OUT) --overwrite

# What shows that everything works, in minutes; test-all adds the long fits, the pages of docs/ and the examples.
test: setup
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

test-all: setup
	$(BIN)/pytest -n auto --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict

# Builds sdist and wheel and checks them in a new environment; PYTHON chooses the version of Python.
dist-check:
	$(PYTHON) .ci/dist.py --torch "$(TORCH)" $(if $(CONSTRAINTS),--constraints $(CONSTRAINTS))

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

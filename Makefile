# Everything runs in a virtual environment that is made on first use. Override VENV to use another.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
PIP_ARGS ?=
PACKAGE = $(VENV)/.package
STAMP = $(VENV)/.installed
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: demo test test-slow check docs format bench gpu clean

$(PACKAGE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $(PACKAGE)

$(STAMP): $(PACKAGE)
	$(INSTALL) -e ".[dev]"
	touch $(STAMP)

demo: $(PACKAGE)  ## train, evaluate and compare small models offline; the report is runs/demo/report.html
	$(BIN)/memdlm demo --overwrite $(ARGS)

test: $(STAMP)  ## the fast tests, under 10 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(STAMP)  ## what takes minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(STAMP)  ## format, lint, types, import graph, documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(STAMP)  ## the documentation site, into site/; --strict: a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## measurements; each prints ratios within one run
	for script in benchmarks/*.py; do $(BIN)/python $$script; done

# No virtual environment, no network: PYTHON is any interpreter with torch and the package's dependencies.
gpu:  ## what a GPU has to answer; PART="writes steps": these parts, FORCE=1: again from the beginning
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu/run.py $(PART) $(if $(FORCE),--force) $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist site

# make demo: the first edit. make test: the suite, with a covering part of long tests. make test-whole: all of it.
# make docs: the site. All make .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-whole lint lint-ruff lint-mypy lint-pyright format docs

demo: .venv/.ready
	$(BIN)/python -m editkit.run edit=gpt2_fact

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-whole: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --whole

lint: .venv/.ready
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint-ruff lint-mypy lint-pyright

lint-ruff: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-mypy: .venv/.ready
	$(BIN)/mypy

lint-pyright: .venv/.ready
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "editkit needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

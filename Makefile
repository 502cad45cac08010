# make search   installs into .venv and runs the default search of 50 trials
# make test     installs into .venv and runs every check
# make check    what `make test` runs, on a .venv that is there
PYTHON ?= python3
BIN := .venv/bin

search: .venv/installed
	$(BIN)/python -m pipeline.search --trials 50

test: .venv/installed
	$(MAKE) check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

.PHONY: search test check

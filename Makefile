# Each target works as the only command in a fresh clone: it makes .venv, installs into it once, and runs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	rm -rf fedgrove-demo
	$(BIN)/fedgrove demo --out fedgrove-demo

test: lint
	$(BIN)/pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv fedgrove-demo runs dist

# Each target works as the only command in a fresh clone: it makes .venv, installs into it once, and runs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test federation-test lint clean

demo: .venv/installed
	rm -rf fedgrove-demo
	$(BIN)/fedgrove demo --out fedgrove-demo

test: lint
	$(BIN)/pytest -n 2 --dist loadgroup -m "not federation"

# A server and three sites as processes on this machine, and everything that can go wrong with them.
federation-test: .venv/installed
	$(BIN)/pytest tests/test_federation.py

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

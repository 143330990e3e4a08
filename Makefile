# `make demo` and `make test` work from a fresh clone with only Python 3.10 to 3.12 and make.
# PYTHON=python3.11 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint clean lock

install: .venv/installed

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	    f"Python 3.10 to 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@touch $@

demo: install
	$(BIN)/python -m data.demo datasets/digits
	$(BIN)/python entrypoint.py yamls/demo.yaml

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# After changing dependencies in pyproject.toml. The lock holds hashes and no index address.
lock: install
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header --no-emit-index-url \
	    --no-annotate --extra dev pyproject.toml --output-file requirements.lock

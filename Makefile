# `make demo` and `make test` work from a fresh clone with only Python 3.10 to 3.13 and make.
# PYTHON=python3.11 chooses another interpreter; TORCH=new the newest torch that was tested, for Turing to
# Blackwell (T4 to B200), instead of the default's, for Maxwell to Hopper (V100 to H100). `make install` without TORCH
# installs the default; the other targets keep what is installed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed-
ifeq ($(or $(MAKECMDGOALS),install),install)
TORCH ?= default
else
TORCH ?= $(or $(patsubst $(STAMP)%,%,$(wildcard $(STAMP)*)),default)
endif
ifeq ($(filter $(TORCH),default new),)
$(error TORCH=$(TORCH): allowed: default, new)
endif
LOCK := requirements$(if $(filter new,$(TORCH)),-new).lock

.PHONY: install demo test lint clean lock

install: $(STAMP)$(TORCH)

$(STAMP)$(TORCH): $(LOCK)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else \
	    f"Python 3.10 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	@rm -f .venv/installed*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes $(LOCK)
	@touch $@

demo: install
	$(BIN)/python -m data.demo datasets/digits
	$(BIN)/python entrypoint.py yamls/demo.yaml

# On two cores: a third of the tests' time is waiting for other processes.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# After changing dependencies in pyproject.toml. The locks hold hashes and no index address.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header \
    --no-emit-index-url --no-annotate --extra dev pyproject.toml
lock: install
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --override requirements-new.overrides --output-file requirements-new.lock

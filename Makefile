# The commands of this project. `make demo` and `make test` work on a fresh clone with Python 3.11 or newer.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NO_DEPS := preble_sgl/runtime_ext/cpu_no_deps.txt
# With a GPU SGLang is installed as published; without one, its CPU dependencies, then SGLang alone.
GPU    := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)

.PHONY: demo test check format install clean

demo: install
	$(BIN)/preble-sgl demo

test: install
	$(BIN)/pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(NO_DEPS)
	$(PYTHON) -m venv $(VENV)
ifeq ($(GPU),0)
	$(BIN)/pip install --quiet --editable '.[cpu,server,dev,bench]'
	$(BIN)/pip install --quiet --no-deps --requirement $(NO_DEPS)
else
	$(BIN)/pip install --quiet --editable '.[gpu,server,dev,bench]'
endif
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: export test unit clean

export: $(VENV)/.installed
	$(BIN)/mobile-export android

test: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

unit: $(VENV)/.tested
	$(BIN)/pytest -m "not real"

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) dist build

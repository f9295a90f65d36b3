# Everything a newcomer needs: `make quickstart` and `make test`. Neither needs a GPU or an account.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct

.PHONY: help setup quickstart tutorial model test test-slow test-gpu lint bench lock clean

help:
	@echo "make quickstart  set up, and improve a small chat model in three rounds"
	@echo "make tutorial    set up, and tune, reward-model and improve that model: SFT, reward model, REBEL"
	@echo "                 (PREFERENCES=file.jsonl trains the reward model on comparisons of yours)"
	@echo "make test        set up, and run linting, type checks and the tests"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-gpu    the tests that need a GPU; sets nothing up"
	@echo "make bench       the benchmarks, beside TRL (benchmarks/README.md)"
	@echo "make setup       only the virtual environment in .venv"
	@echo "make lock        resolve requirements/cpu.txt and gpu.txt anew"

setup: .venv/ready

.venv/ready: requirements/cpu.txt requirements/gpu.txt requirements/model.txt pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh
	@touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: scripts/get_smollm2.py | .venv/ready
	@$(BIN)/python scripts/get_smollm2.py $(MODEL)
	@touch $@

quickstart: setup model
	$(BIN)/rlhf-pl fit --config configs/quickstart.yaml

PREFERENCES := data/preferences.jsonl

tutorial: setup model
	$(BIN)/rlhf-pl fit --config configs/tutorial/sft.yaml
	$(BIN)/rlhf-pl fit --config configs/tutorial/reward_model.yaml --data.preferences $(PREFERENCES)
	$(BIN)/rlhf-pl fit --config configs/tutorial/rebel.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# a test per core at a time, each on one thread: the models are tiny
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

test: lint
	$(PYTEST)

test-slow: setup model
	$(PYTEST) -m slow

# no set-up of its own: it may run where there is no network
test-gpu:
	@python=$(BIN)/python; [ -x $$python ] || python=$(PYTHON); \
		$$python -m pytest -rs -m gpu tests/integration/test_gpu.py

# under half an hour, so three of them are brief
BENCHMARKS := scoring generation growth vocabulary_memory "whole_round --prompts 24" "training_step --pairs 4" \
	"reward_over_time --seeds 1 --seconds 40 --variant rlhf-pl --variant grpo"

bench: setup model
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements/bench.txt
	@for name in $(BENCHMARKS); do echo "## $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; echo; done

lock:
	bash scripts/lock.sh

clean:
	rm -rf .venv models runs build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache

# To begin: `make quickstart` and `make test`. Neither needs a GPU or an account.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct

.PHONY: help setup quickstart tutorial model test test-slow test-all test-gpu lint bench lock clean

help:
	@echo "make quickstart  set up, and improve a small chat model in three rounds"
	@echo "make tutorial    set up, and run all three stages on that model: SFT, reward model, REBEL"
	@echo "                 (PREFERENCES=file.jsonl trains the reward model on your own comparisons)"
	@echo "make test        set up, and run linting, type checks and the tests"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-all    these, and further cases of what they test"
	@echo "make test-gpu    the tests that need a GPU, without the set-up"
	@echo "make bench       the benchmarks, compared with TRL (benchmarks/README.md)"
	@echo "make setup       only the virtual environment in .venv"
	@echo "make lock        resolve requirements/cpu.txt and gpu.txt again"

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

# one test per core, each on one thread: the models are tiny
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

test: lint
	$(PYTEST)

test-slow: setup model
	$(PYTEST) -m "slow and not exhaustive"

test-all: setup model
	$(PYTEST) -m slow

# without the set-up, so that it runs without a network
test-gpu:
	@python=$(BIN)/python; [ -x $$python ] || python=$(PYTHON); \
		$$python -m pytest -rs -m gpu tests/integration/test_gpu.py

# six of them in a short version: together under half an hour
BENCHMARKS := scoring generation growth vocabulary_memory "whole_round --prompts 24" "training_step --pairs 4" \
	"all_pairs --seeds 1" "algorithms --task toy --rate 1e-2 --tuning_seeds 1 --seeds 1" \
	"reward_over_time --seeds 1 --seconds 40 --variant rlhf-pl --variant grpo" \
	"defaults --out /tmp/trials.jsonl --task short"

bench: setup model
	@for name in $(BENCHMARKS); do echo "## $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; echo; done

lock:
	bash scripts/lock.sh

clean:
	rm -rf .venv models runs build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

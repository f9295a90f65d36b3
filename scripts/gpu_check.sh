#!/usr/bin/env bash
# What needs a GPU, in parts of at most three minutes each: tests, speed, short (new shapes), generation, round, plan.
# Sets nothing up; PYTHON names the interpreter that has the packages. Usage: bash scripts/gpu_check.sh [PART ...]
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
model=${GPU_CHECK_MODEL:-random-1b}

part() { # NAME SECONDS COMMAND...
    echo "== $1"
    local started=$SECONDS
    timeout "$2" "${@:3}" 2>&1 | grep -vE 'Warning|warn' || echo "$1: failed"
    echo "== $1: $((SECONDS - started)) s"
}

for what in "${@:-tests speed short generation round plan}"; do for name in $what; do case $name in
    tests) part tests 180 "$python" -m pytest -q -m gpu tests/test_gpu.py ;;
    speed) # MFU >= 0.50 in bf16, >= 0.43 in bf16-mixed; >= 1.4x TRL with liger, >= 2.5x with its reference pass;
        # above weights, gradients and moments <= 60 % of TRL's without liger
        part 'speed in bf16' 90 "$python" -m benchmarks.training_step --device cuda --model "$model" --profile chat \
            --precision bf16 --variant rlhf-pl --updates 2
        part 'speed in bf16-mixed' 180 "$python" -m benchmarks.training_step --device cuda --model "$model" \
            --profile chat --updates 2 ;;
    short) part 'short answers, summaries' 180 "$python" -m benchmarks.training_step --device cuda --model "$model" \
            --profile short --profile summarisation --variant rlhf-pl --variant trl-liger --updates 3 ;;
    generation) # >= 97 % of the bare engine; weights < 0.3 s
        part generation 180 "$python" -m benchmarks.generation --device cuda --model "$model" --prompts 128 \
            --max_tokens 256 --repeats 2 ;;
    round) # none of these < 5 %
        part 'whole round' 180 "$python" -m benchmarks.whole_round --device cuda --model "$model" --prompts 256 \
            --pairs 32 --max_tokens 256 ;;
    plan) part plan 60 "$python" -m rlhf_pl plan --config configs/quickstart.yaml ;;
    *) echo "no part $name" ;;
esac; done; done

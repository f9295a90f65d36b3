#!/usr/bin/env bash
# Runs the checks that need a GPU, in parts of at most three minutes: tests, bf16, mixed, short, generation, round.
# Installs nothing; PYTHON is an interpreter with the packages. Usage: bash scripts/gpu_check.sh [PART ...]
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
model=${GPU_CHECK_MODEL:-random-1b}

failed=0

part() { # NAME SECONDS COMMAND...
    echo "== $1"
    local started=$SECONDS status
    timeout "$2" "${@:3}" 2>&1 | grep -vE 'Warning|warn'
    status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || { failed=1; echo "== $1: FAILED (status $status; 124 is the time limit of $2 s)"; }
    echo "== $1: $((SECONDS - started)) s"
}

step() { part "$1" "$2" "$python" -m benchmarks.training_step --device cuda --model "$model" "${@:3}"; }

for name in ${*:-tests bf16 mixed short generation round}; do case $name in
    tests) part tests 180 "$python" -m pytest -q -rs -m gpu tests/integration/test_gpu.py ;;
    bf16) # MFU >= 0.50
        step 'speed in bf16' 90 --profile chat --precision bf16 --variant rlhf-pl --updates 2 ;;
    mixed) # MFU >= 0.43; >= 1.4x TRL with liger, >= 2.5x TRL with its reference pass; memory without weights,
        # gradients and moments <= 60 % of TRL's without liger
        step 'speed in bf16-mixed' 180 --profile chat --updates 2 ;;
    short) step 'short responses, summaries' 180 --profile short --profile summarisation --variant rlhf-pl \
            --variant trl-liger --updates 3 ;;
    generation) # >= 97 % of the bare engine; weight sync < 0.3 s
        part generation 180 "$python" -m benchmarks.generation --device cuda --model "$model" --prompts 128 \
            --max_tokens 256 --repeats 2 ;;
    round) # none of these < 5 %
        part 'whole round' 180 "$python" -m benchmarks.whole_round --device cuda --model "$model" --prompts 256 \
            --pairs 32 --max_tokens 256 ;;
    *) failed=1; echo "no part $name" ;;
esac; done
exit $failed

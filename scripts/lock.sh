#!/usr/bin/env bash
# Resolves requirements/cpu.txt anew from pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
torch=(--torch-backend cpu)
if [ -n "$links" ]; then
    export UV_FIND_LINKS=${links// /,}
    torch=()
fi
"${UV:-.venv/bin/uv}" pip compile --quiet pyproject.toml --extra cpu --extra quickstart --extra dev \
    --python-version 3.11 --override requirements/overrides.txt "${torch[@]}" \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links -o requirements/cpu.txt
# What an override leaves out is still listed, under a condition that never holds.
sed -i '/sys_platform == .never./d' requirements/cpu.txt

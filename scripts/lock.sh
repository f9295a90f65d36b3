#!/usr/bin/env bash
# Resolves requirements/cpu.txt and requirements/gpu.txt again from pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
torch=(--torch-backend cpu)
if [ -n "$links" ]; then
    export UV_FIND_LINKS=${links// /,}
    torch=()
fi
compile() { # OUTPUT ARGUMENTS...
    "${UV:-.venv/bin/uv}" pip compile --quiet pyproject.toml --python-version 3.11 --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links -o "requirements/$1" "${@:2}"
}
compile cpu.txt --extra cpu --extra quickstart --extra dev --override requirements/overrides.txt "${torch[@]}"
# Packages that an override excludes are still listed, with a condition that is never true.
sed -i '/sys_platform == .never./d' requirements/cpu.txt
# the torch builds on the package index are for CUDA
env -u UV_FIND_LINKS -u PIP_FIND_LINKS bash -c "$(declare -f compile); compile gpu.txt requirements/gpu.in \
    --extra quickstart --extra liger --extra dev --python-platform x86_64-manylinux_2_28"

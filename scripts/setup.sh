#!/usr/bin/env bash
# Makes .venv with everything pinned, for a machine without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "error: requirements/cpu.txt is pinned for Python 3.11, but $python is $("$python" -V 2>&1)." >&2
    echo "Install Python 3.11 and call: make setup PYTHON=/path/to/python3.11" >&2
    exit 1
fi
echo "Setting up .venv (about 1 GB to download on a first run)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -qq --disable-pip-version-check "uv>=0.9"

# uv does not read pip's settings: hand over its index and its folder of wheels, where there are any. Without such a
# folder the CPU build of torch comes from where uv knows it to be.
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
torch=(--torch-backend cpu)
if [ -n "$links" ]; then
    export UV_FIND_LINKS=${links// /,}
    torch=()
fi
# The files list every package, so nothing is resolved here; torchvision and torchaudio are left out on purpose.
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --no-deps "${torch[@]}" \
    -r requirements/cpu.txt -r requirements/model.txt
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .

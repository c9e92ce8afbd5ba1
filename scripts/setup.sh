#!/usr/bin/env bash
# Make .venv and install the project into it; does nothing when that is already done.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $1" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 was found; install one (apt install python3, brew install python@3.12, or \
https://www.python.org/downloads) or name it with PYTHON=/path/to/python"
}

has_nvidia() { [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1; }

reaches() { "$1" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' "$2" >/dev/null 2>&1; }

python=$(find_python)
stamp=$("$python" -c 'import hashlib, sys
print(hashlib.sha256(sys.version.encode() + b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' \
    pyproject.toml constraints.txt scripts/setup.sh)
if [ "$(cat .venv/.setup 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

log=.venv/setup.log
pip=(.venv/bin/python -m pip --disable-pip-version-check)
began=$SECONDS

install() {  # what it is, then pip's arguments
    echo "  $1"
    shift
    if ! "${pip[@]}" install "$@" >> "$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "pip could not install this; the end of what it said stands above, all of it in $log"
    fi
}

echo "setting up .venv with $("$python" --version) from $python, once: a minute or two"
"$python" -m venv .venv || fail "the venv module is missing; install it (apt install python3-venv) and start again"
: > "$log"
install "[1/3] pip" --upgrade "pip>=24"

# On Linux the package index's torch brings gigabytes of CUDA; without an NVIDIA driver they would only lie there.
torch_index=()
if [ "$(uname -s)" = Linux ] && ! has_nvidia; then
    if reaches "$python" https://download.pytorch.org/whl/cpu/torch/; then
        torch_index=(--index-url https://download.pytorch.org/whl/cpu)
    else
        echo "  PyTorch's CPU index cannot be reached, so torch comes from the package index, maybe a larger build"
    fi
fi
install "[2/3] torch, the largest part" -c constraints.txt ${torch_index[@]+"${torch_index[@]}"} torch
install "[3/3] this project and the other packages" -c constraints.txt --editable ".[dev]"
echo "$stamp" > .venv/.setup
echo "  ready after $((SECONDS - began)) s"

#!/bin/sh
# Make a virtual environment and install into it what development needs: sh tools/venv.sh FOLDER
# PYTHON and TORCH_INDEX from the environment, as the Makefile says.
set -eu
venv=$1

fits() {
	"$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
	if ! fits "$PYTHON"; then
		echo "softxent needs Python 3.11 to 3.13; PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || echo 'not there')" >&2
		exit 1
	fi
else
	for PYTHON in python3 python3.13 python3.12 python3.11 python ''; do
		if [ -n "$PYTHON" ] && fits "$PYTHON"; then break; fi
	done
	if [ -z "$PYTHON" ]; then
		echo "softxent needs Python 3.11 to 3.13; python3 is $(python3 --version 2>&1 || echo 'not there')." >&2
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
		exit 1
	fi
fi

echo "making $venv with $("$PYTHON" --version) ($PYTHON)"
rm -rf "$venv"
if "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
	"$PYTHON" -m venv "$venv"
else # Debian's and Ubuntu's python3 without python3-venv
	"$PYTHON" -m venv --without-pip "$venv"
	"$PYTHON" -m pip --python "$venv/bin/python" install -q pip 2>/dev/null || "$venv/bin/python" tools/get_pip.py
fi
pip="$venv/bin/python -m pip --disable-pip-version-check"

# On Linux torch from PyPI brings gigabytes of CUDA. Without a GPU (nor WSL's /dev/dxg, nor AMD's /dev/kfd) its CPU
# build will do, where it can be had.
if [ "$(uname)" = Linux ] && [ -z "${TORCH_INDEX:-}" ] && [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ] && [ ! -e /dev/kfd ]
then
	TORCH_INDEX=https://download.pytorch.org/whl/cpu
	echo "no GPU here: asking for torch's CPU build"
fi
torch=$(grep '^torch==' requirements/dev.txt)
if [ -n "${TORCH_INDEX:-}" ]; then
	$pip install -q --no-compile --no-deps --retries 1 --extra-index-url "$TORCH_INDEX" "$torch"
fi
$pip install -q --no-compile -r requirements/dev.txt # what is imported is compiled then
$pip install -q --no-deps -e .
echo "installed $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)')"

#!/bin/sh
# The kernels with another Triton: sh tools/triton_matrix.sh VERSION
set -eu
sh tools/triton_env.sh "$1"
echo "Triton $1:"
".venv-triton-$1/bin/python" -m pytest -q -p no:cacheprovider -n auto \
	tests/test_functional.py tests/test_options.py tests/test_stats.py tests/test_soft_target.py tests/test_softmax.py \
	tests/test_inplace.py tests/test_traffic.py tests/test_compiles.py tests/test_handles.py \
	tests/test_interpreter.py tests/test_emulated.py -k 'kernels or compiles or handles or interpreter or emulated'

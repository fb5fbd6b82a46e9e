#!/bin/sh
# The kernels with another Triton: sh tools/triton_matrix.sh VERSION
set -eu
sh tools/triton_env.sh "$1"
echo "Triton $1:"
".venv-triton-$1/bin/python" -m pytest -q -p no:cacheprovider tests/test_functional.py tests/test_softmax.py \
	tests/test_inplace.py tests/test_traffic.py tests/test_compiles.py -k 'kernels or compiles'

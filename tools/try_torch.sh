#!/bin/sh
# The package with another torch: sh tools/try_torch.sh VERSION installs it, and the Triton that it brings, into
# .venv-torch-VERSION and runs what goes by torch operations, compiled and traced too. More arguments go to pytest.
set -eu
version=$1
shift
venv=.venv-torch-$version
if [ ! -e "$venv/installed" ]; then
	rm -rf "$venv"
	.venv/bin/python -m venv --without-pip "$venv"
	# numpy: the interpreter of Triton 3.6 makes a number of an array in a way that numpy 2.4 refuses.
	.venv/bin/python -m pip --python "$venv/bin/python" install -q --disable-pip-version-check \
		"torch==$version" numpy==2.3.5 $(grep -E '^(pytest|pytest-xdist|pytest-benchmark|hypothesis)==' requirements/dev.txt)
	touch "$venv/installed"
fi
"$venv/bin/python" -c "import torch; print('torch', torch.__version__)"
"$venv/bin/python" -m pytest -q -p no:cacheprovider -k 'not kernels' tests/test_modules.py tests/test_traced.py \
	tests/test_compiled.py tests/test_inplace.py tests/test_linear.py tests/test_transforms.py tests/test_functional.py "$@"

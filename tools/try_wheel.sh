#!/bin/sh
# What would be published: dist/ built and checked, the wheel in a clean environment, .venv-wheel, with torch's CPU build and
# so without Triton and numpy, where the README's Python runs, and passes mypy --strict as a
# user's code does; only torch's own Tensor.backward has no types.
set -eu
rm -rf dist build .venv-wheel
.venv/bin/python -m build .
.venv/bin/python -m twine check --strict dist/*
.venv/bin/check-wheel-contents dist/*.whl

.venv/bin/python -m venv .venv-wheel
pip="$PWD/.venv-wheel/bin/python -m pip --disable-pip-version-check -q"
$pip install --no-deps --retries 1 --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" \
	"$(grep '^torch==' requirements/dev.txt)"
$pip install dist/*.whl
$pip check
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
.venv/bin/python - README.md >"$away/readme.py" <<'END'
import re, sys
print("\n".join(re.findall(r"```python\n(.*?)```", open(sys.argv[1], encoding="utf-8").read(), re.DOTALL)))
END
cat >"$away/clean.py" <<'END'
from importlib.util import find_spec
import softxent, torch
assert ".venv-wheel" in softxent.__file__, softxent.__file__
found = [name for name in ("triton", "numpy") if find_spec(name)]
print(f"softxent {softxent.__version__}, torch {torch.__version__}, beside {found or 'neither Triton nor numpy'}")
END
export PYTHONWARNINGS="ignore:Failed to initialize NumPy:UserWarning"
python=$PWD/.venv-wheel/bin/python
mypy=$PWD/.venv/bin/mypy
cd "$away"
"$python" clean.py
"$python" readme.py
"$mypy" --strict --allow-untyped-calls --python-executable "$python" readme.py

# The source distribution gives the same package.
"$python" -m pip --disable-pip-version-check -q install --no-deps --force-reinstall "$OLDPWD"/dist/*.tar.gz
"$python" clean.py
"$python" readme.py
echo "the wheel and the source distribution work"

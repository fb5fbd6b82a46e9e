#!/bin/sh
# An environment with another Triton: sh tools/triton_env.sh VERSION makes .venv-triton-VERSION beside .venv.
set -eu
version=$1
venv=.venv-triton-$version
# torch pins a Triton of its own, which is not the question here: everything but Triton comes from .venv.
if [ ! -e "$venv/installed" ]; then
	rm -rf "$venv"
	.venv/bin/python -m venv --without-pip "$venv"
	.venv/bin/python -m pip --python "$venv/bin/python" install -q --no-compile --no-deps "triton==$version"
	case $version in 3.6.*) # its interpreter makes a number of an array in a way that numpy 2.4 refuses
		.venv/bin/python -m pip --python "$venv/bin/python" install -q --no-compile --no-deps numpy==2.3.5 ;;
	esac
	site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	echo "$site" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	touch "$venv/installed"
fi
"$venv/bin/python" -c "import triton; assert triton.__version__ == '$version', triton.__version__"

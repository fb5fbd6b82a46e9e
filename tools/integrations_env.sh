#!/bin/sh
# An environment with the libraries of requirements/integrations.txt: .venv-integrations, beside .venv.
set -eu
venv=.venv-integrations
if [ ! -e "$venv/installed" ] || [ requirements/integrations.txt -nt "$venv/installed" ]; then
	rm -rf "$venv"
	.venv/bin/python -m venv --without-pip "$venv"
	# torch and the tools come from .venv, where pip sees them installed; -c holds them at their versions.
	site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	echo "$site" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	pip=".venv/bin/python -m pip --python $venv/bin/python --disable-pip-version-check"
	# timm's torchvision must be of torch's build: beside torch's CPU build, one from where that came.
	case $("$venv/bin/python" -c 'import torch; print(torch.__version__)') in
		*+cpu) index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} ;;
		*) index=${TORCH_INDEX:-} ;;
	esac
	if [ -n "$index" ]; then
		$pip install -q --no-compile --no-deps --retries 1 --extra-index-url "$index" "$(grep '^torchvision==' requirements/integrations.txt)"
	fi
	$pip install -q --no-compile -c requirements/dev.txt -r requirements/integrations.txt
	if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
		echo "torchvision is not of torch's build here, and is taken out: timm is not tested" >&2
		$pip uninstall -q -y torchvision
	fi
	touch "$venv/installed"
fi
"$venv/bin/python" - <<'END'
from importlib.metadata import version
names = "torch", "transformers", "trl", "peft", "accelerate", "lightning", "timm"
print(*(f"{name} {version(name)}" for name in names), sep=", ")
END

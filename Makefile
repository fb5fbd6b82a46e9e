# Two commands do everything on a fresh machine with Python 3.11 to 3.13:
#
#   make train      softmax regression on Fashion-MNIST, through the fused op       ARGS="--epochs 3"
#   make test       every test; with a GPU, the kernels on it as well               ARGS="-k softmax"
#   make bench      this machine measured, beside PyTorch and who else is installed  ARGS="cpu --widths 10,1000 --runs 3"
#
# They make .venv and install into it first. PYTHON=/path/to/python3.12 chooses the Python, and TORCH_INDEX=URL the
# package index of torch: unless there is a GPU, PyTorch's own CPU index is asked first, which saves gigabytes.

VENV = .venv
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/installed
ARGS =

.PHONY: help train test bench lint numeric notebook docs dist oldest newest matrix integrations codegen clean

help:
	@echo "make train | test | bench | lint | numeric | notebook | docs | dist | oldest | newest | matrix | integrations | codegen | clean      see the top of the Makefile"

train: $(INSTALLED)
	PYTHONPATH=kernels $(RUN) -m fmnist train $(ARGS)

test: $(INSTALLED)
	$(RUN) -m pytest -n auto --dist worksteal $(ARGS)
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(RUN) -m pytest --device cuda $(ARGS) || test $$? -eq 5; \
	else echo "no GPU here: the kernels ran in Triton's interpreter, and were compiled for GPUs offline"; fi

bench: $(INSTALLED)
	$(RUN) -m pytest bench/test_launch.py -q --benchmark-columns=median,iqr,rounds
	$(RUN) -m bench $(ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# What torch operations give, with each instruction set that PyTorch has for this CPU, and two threads, which share the
# large tensors; `make test` has the CPU's own set, and one thread.
NUMERIC = tests/test_functional.py tests/test_stats.py tests/test_softmax.py tests/test_soft_target.py \
	tests/test_options.py tests/test_inplace.py
numeric: $(INSTALLED)
	@case $$($(RUN) -c 'import torch; print(torch.backends.cpu.get_cpu_capability())') in \
		AVX512) sets='default avx2 avx512';; AVX2) sets='default avx2';; *) sets=default;; esac; \
	for set in $$sets; do \
		echo "instructions: $$set, threads: 2"; \
		ATEN_CPU_CAPABILITY=$$set OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
			$(RUN) -m pytest -q -p no:cacheprovider --no-header --only torch $(NUMERIC) || exit 1; \
	done

# The lesson as notebooks, lesson.ipynb and lesson.zh.ipynb, for Jupyter, which is not installed with the rest:
# .venv/bin/pip install jupyterlab. Here, where `import fmnist` finds it.
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
notebook: $(INSTALLED)
	for page in lesson lesson.zh; do \
		sed 's#](pictures/#](docs/pictures/#; s#](\.\./#](#; s#](lesson#](docs/lesson#' docs/$$page.md | \
		$(VENV)/bin/jupytext --from md --to ipynb --update-metadata '$(KERNEL)' -o $$page.ipynb - || exit 1; \
	done

# The pages as a site, in site/: every warning is an error.
docs: $(INSTALLED)
	$(RUN) -m pip install -q --no-compile --disable-pip-version-check -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# The wheel and the source distribution, in dist/: checked, and tried in an environment of their own.
dist: $(INSTALLED)
	sh tools/try_wheel.sh

# The kernels with every Triton that users have: imported, interpreted, compiled, emulated. In .venv-triton-* each.
matrix: $(INSTALLED)
	for version in 3.6.0 3.7.1 3.9.0; do sh tools/triton_matrix.sh $$version || exit 1; done

# In the training libraries of requirements/integrations.txt, with tiny models of random weights: nothing is downloaded.
integrations: $(INSTALLED)
	sh tools/integrations_env.sh
	.venv-integrations/bin/python -m pytest -q -p no:cacheprovider -rP --show-capture=stdout tests/test_integrations_*.py $(ARGS)

# The oldest Triton's compiler takes less of the language than its interpreter does, and than later compilers.
oldest: $(INSTALLED)
	sh tools/triton_env.sh 3.6.0
	.venv-triton-3.6.0/bin/python -m pytest -q -p no:cacheprovider -n auto tests/test_compiles.py tests/test_handles.py \
		tests/test_launcher.py \
		-k "cuda:80 or handles or launcher"

# What the newest Triton's compiler emits, executed: it fuses products where others do not.
newest: $(INSTALLED)
	sh tools/triton_env.sh 3.9.0
	.venv-triton-3.9.0/bin/python -m pytest -q -p no:cacheprovider -n auto tests/test_emulated.py

# What the compilers make of the launch choices, one for each way that rows are taken: a few minutes. As many GPUs at a time
# as there are cores. Then read `git diff`. Every choice, in an hour for a GPU: python bench/codegen.py --faults cuda:90
PAGES = bench/results/codegen
codegen: $(INSTALLED)
	sh tools/triton_env.sh 3.6.0
	sh tools/triton_env.sh 3.9.0
	$(RUN) bench/codegen.py --tested > $(PAGES).new
	mv $(PAGES).new $(PAGES)-triton-3.7.md
	for version in 3.6 3.9; do \
		.venv-triton-$$version.0/bin/python bench/codegen.py --tested cuda:90 > $(PAGES).new || exit 1; \
		mv $(PAGES).new $(PAGES)-triton-$$version.md; \
	done

clean:
	rm -rf .venv .venv-triton-* .venv-wheel .venv-integrations build dist site .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): requirements/dev.txt setup.py tools/venv.sh
	sh tools/venv.sh $(VENV)
	touch $@

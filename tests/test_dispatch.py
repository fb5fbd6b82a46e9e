"""Which implementation serves a tensor, in processes of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "kernels"


def run(code: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(KERNELS)} | environment
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


STEP = """
import sys, torch, softxent
loss = softxent.fused_softmax_xent(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1]))
loss.backward()
print(f"{loss.item():.6f}", "softxent.triton_kernels.rows" in sys.modules)
"""


def test_cpu_tensors_get_torch_operations_and_triton_is_not_used() -> None:
    assert run(STEP) == "1.098612 False"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (no build for this platform)")
def test_cpu_tensors_get_the_kernels_under_the_interpreter() -> None:
    assert run(STEP, TRITON_INTERPRET="1") == "1.098612 True"


def test_works_without_triton_and_says_what_the_gpu_needs() -> None:
    hide = "import sys; sys.modules['triton'] = None\n"
    code = "from softxent import dispatch\ntry: dispatch.kernel_module('rows')\nexcept ImportError as e: print(e)"
    worked, said = run(hide + STEP + code).splitlines()
    assert worked == "1.098612 False" and "GPU kernels need Triton >= 3.6, which is not installed" in said

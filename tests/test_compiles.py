"""Every kernel compiled offline for GPUs that are not here: no spill, no stack, and wide memory accesses.

In a process of its own, because nothing compiles where TRITON_INTERPRET was set before Triton was imported.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TARGETS = ("cuda:80", "cuda:90")

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (no build for this platform)"
)


def main(target: str) -> None:
    """Print, as JSON lines, what was made of each kernel that a step at each width and dtype would launch."""
    import torch

    from offline import Offline
    from softxent import fused_softmax_xent, log_softmax, softmax

    backend, arch = target.split(":")
    with Offline(backend, int(arch) if arch.isdigit() else arch) as compiled:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for n_cols in (10, 1000, 4096, 50257):
                logits = torch.zeros(300, n_cols, dtype=dtype, requires_grad=True)
                y = torch.zeros(300, dtype=torch.int64)
                fused_softmax_xent(logits, y, label_smoothing=0.1).backward()
                if dtype == torch.float32:
                    fused_softmax_xent(logits, y, torch.ones(n_cols), label_smoothing=0.1).backward()
                if dtype != torch.float16:
                    for op in (softmax, log_softmax):
                        op(logits, 1).backward(torch.zeros_like(logits))
                for kernel in compiled:
                    print(json.dumps({"case": f"{dtype} {n_cols}", **kernel.as_dict()}))
                compiled.clear()


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "kernels"), str(HERE)])
    result = subprocess.run([sys.executable, __file__, target], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    compiled: list[dict[str, Any]] = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in compiled} == {
        "row_loss.forward_kernel",
        "row_loss.backward_kernel",
        "softmax.forward_kernel",
        "softmax.backward_kernel",
    }
    for kernel in compiled:
        assert kernel["spill_bytes"] == kernel["stack_bytes"] == 0, kernel
        if kernel["case"].endswith(" 4096"):
            assert kernel["wide_loads"] > 0, kernel
            assert "forward" in kernel["kernel"] or kernel["wide_stores"] == kernel["stores"], kernel


if __name__ == "__main__":
    main(sys.argv[1])

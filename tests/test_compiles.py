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
# Each tile of the launch table, at row lengths that 16 divides and at ones it does not.
WIDTHS = {
    "float32": (10, 33, 100, 1000, 4096, 50257),
    "bfloat16": (10, 17, 100, 1000, 4096, 50257),
    "float16": (10, 50257),
    "float64": (10, 1000, 50257),
}

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
        for dtype, widths in WIDTHS.items():
            for n_cols in widths:
                logits = torch.zeros(300, n_cols, dtype=getattr(torch, dtype), requires_grad=True)
                soft = torch.zeros_like(logits).requires_grad_()
                weight = torch.ones(n_cols, dtype=logits.dtype)
                index = torch.zeros(300, dtype=torch.int64)
                fused_softmax_xent(logits, index).backward()
                fused_softmax_xent(logits, soft.detach()).backward()
                if dtype == "float32":
                    fused_softmax_xent(logits, index, weight, label_smoothing=0.1, reduction="none").sum().backward()
                    fused_softmax_xent(logits, soft, weight, label_smoothing=0.1, reduction="none").sum().backward()
                    for op in (softmax, log_softmax):
                        op(logits, 1).backward(soft.detach())
                for kernel in compiled:
                    print(json.dumps({"case": f"{dtype} {n_cols}", **kernel.as_dict()}))
                compiled.clear()


@pytest.fixture(scope="module")
def processes() -> dict[str, subprocess.Popen[str]]:
    """All targets at once: compiling is most of this suite's time."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "kernels"), str(HERE)])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {target: subprocess.Popen([sys.executable, __file__, target], env=env, **pipes) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(processes: dict[str, subprocess.Popen[str]], target: str) -> None:
    output, error = processes[target].communicate()
    assert processes[target].returncode == 0, error
    compiled: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert {kernel["kernel"] for kernel in compiled} == {
        "row_loss.forward_kernel",
        "row_loss.backward_kernel",
        "soft_target.forward_kernel",
        "soft_target.backward_kernel",
        "softmax.forward_kernel",
        "softmax.backward_kernel",
    }
    for kernel in compiled:
        # float64's log is a call, around which ptxas saves a register or two, with 200 to spare.
        most = 32 if kernel["case"].startswith("float64") else 0
        assert kernel["spill_bytes"] <= most and kernel["stack_bytes"] <= most, kernel
        if kernel["case"] in ("float32 4096", "bfloat16 4096"):
            assert kernel["wide_loads"] > 0, kernel
            assert "forward" in kernel["kernel"] or kernel["wide_stores"] == kernel["stores"], kernel


if __name__ == "__main__":
    main(sys.argv[1])

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
# Each choice of the launch table: rows that lie in granules of 16 bytes, and odd ones.
WIDTHS = {
    "float32": (10, 16, 9, 33, 64, 100, 250, 400, 1000, 1001, 2000, 4096, 8000, 16001, 30001, 32768, 50257, 128256),
    "bfloat16": (
        10,
        16,
        9,
        33,
        64,
        100,
        250,
        400,
        1000,
        1001,
        2000,
        4096,
        8000,
        16001,
        30001,
        32768,
        50257,
        50304,
        128256,
    ),
    "float16": (10, 1001, 50257, 128256),
    "float64": (10, 9, 33, 100, 200, 500, 1000, 2001, 4096, 50257),
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
                logits = torch.zeros(600, n_cols, dtype=getattr(torch, dtype), requires_grad=True)
                index = torch.zeros(600, dtype=torch.int64)
                fused_softmax_xent(logits, index).backward()
                if dtype == "float16" or n_cols in (33, 50257, 128256):
                    fused_softmax_xent(logits, index, reduction="none").sum().backward()
                if n_cols in (10, 100, 1000, 1001, 50257):
                    weight = torch.ones(n_cols, dtype=logits.dtype)
                    fused_softmax_xent(logits, index, weight, label_smoothing=0.1).backward()
                    soft = torch.zeros_like(logits).requires_grad_()
                    fused_softmax_xent(logits, soft.detach()).backward()
                    if dtype == "float32":
                        fused_softmax_xent(logits, soft, weight, label_smoothing=0.1, reduction="none").sum().backward()
                        for op in (softmax, log_softmax):
                            op(logits, 1).backward(soft.detach())
                if n_cols == 10:
                    fused_softmax_xent(logits[:256], index[:256]).backward()
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
        "few_classes.step_kernel",
        "few_classes.one_launch_kernel",
        "whole_row.step_kernel",
        "packed_row.step_kernel",
        "streaming.forward_kernel",
        "streaming.step_kernel",
        "streaming.backward_kernel",
        "mean.norm_kernel",
        "mean.reduce_kernel",
        "mean.scale_kernel",
        "soft_target.forward_kernel",
        "soft_target.backward_kernel",
        "softmax.forward_kernel",
        "softmax.backward_kernel",
    }
    for kernel in compiled:
        assert kernel["spill_bytes"] == 0 and kernel["stack_bytes"] == 0, kernel
        dtype, n_cols = kernel["case"].split()
        itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
        # Rows that a program holds go in accesses of 16 bytes, odd ones too. Single ones: target, z_y, w_y, n; the ends
        # of odd rows, up to 8 values of each of 2 granules; and what the target's thread holds of a packed row.
        if kernel["kernel"] in ("whole_row.step_kernel", "packed_row.step_kernel") and itemsize < 8:
            smoothed_and_odd = kernel["wide_loads"] == 0
            assert not smoothed_and_odd or int(n_cols) % (16 // itemsize), kernel


if __name__ == "__main__":
    main(sys.argv[1])

"""Every kernel compiled offline for GPUs that are not here: no spill, no stack, and wide memory accesses.

One launch choice for each regime, dtype and target (bench/codegen.py), and for a Hopper with options, each and all at
once; `make codegen` compiles every choice, with each option, everywhere. In processes of their own, because nothing
compiles where TRITON_INTERPRET was set before Triton was imported.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.codegen import TARGETS, narrow, over_budget

TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
LEAST_WARPS = 16 if TRITON >= (3, 7) else 8  # 3.6 gives some kernels of odd rows more registers
ROOT = Path(__file__).parents[1]
KERNELS = {
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
    "soft_rows.few_step_kernel",
    "soft_rows.step_kernel",
    "soft_streams.forward_kernel",
    "soft_streams.step_kernel",
    "soft_streams.backward_kernel",
    *(f"softmax.{rows}{way}_kernel" for rows in ("", "few_", "stream_") for way in ("forward", "backward")),
}

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (no build for this platform)"
)


def spilled(kernel: dict[str, Any]) -> int:
    """Bytes a thread that may leave the registers: none. But the code of Triton 3.9 for odd packed rows of float32 has
    no room for some of the values of the widest: stored, loaded again, and the stack."""
    odd_packed = kernel["kernel"].startswith("packed") and kernel["constants"]["ODD"]
    return 3 * 80 if TRITON >= (3, 9) and odd_packed and kernel["dtype"] == "float32" else 0


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills_and_in_wide_accesses(target: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    which = "--tested" if target == "cuda:90" else "--plain"
    command: list[Any] = [sys.executable, ROOT / "bench/codegen.py", which, "--json", target]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    output = process.stdout
    compiled: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    packed = set() if target.startswith("hip") else {"packed_row.step_kernel"}
    assert {kernel["kernel"] for kernel in compiled} == KERNELS - {"packed_row.step_kernel"} | packed
    for kernel in compiled:
        assert kernel["spill_bytes"] + kernel["stack_bytes"] <= spilled(kernel), kernel
        assert kernel["shared_bytes"] <= 48 << 10, kernel
        assert not narrow(kernel), kernel
        assert not over_budget(kernel), kernel
        if target.startswith("cuda") and not kernel["kernel"].startswith("mean"):
            # With all options at once there is a lot to compute for a byte, and less to wait for.
            least = 8 if "softcap" in kernel["options"] and "stats" in kernel["options"] else LEAST_WARPS
            assert kernel["resident_warps"] >= least, kernel
    clusters = [kernel for kernel in compiled if kernel["constants"].get("num_ctas", 1) > 1]
    assert bool(clusters) == (TRITON >= (3, 8) and target in ("cuda:90", "cuda:100"))
    assert all(kernel["distributed"] for kernel in clusters)  # they reduce through each other's shared memory


SCHEDULE = """
import torch
from offline import Offline
from softxent import fused_softmax_xent

logits, target = torch.zeros(600, 10, requires_grad=True), torch.zeros(600, dtype=torch.int64)
rows = torch.ones(600)
with Offline("cuda", 90) as compiled:
    counts = []
    for x in (0.1, 0.2, 0.9):
        options = {"label_smoothing": x, "z_loss": x, "softcap": 10 * x, "logit_scale": x, "normalizer": 10 * x}
        fused_softmax_xent(logits, target, sample_weight=rows, **options).backward()
        counts.append(len(compiled))
    fused_softmax_xent(logits, target).backward()
    counts.append(len(compiled))
print(*counts)
"""


def test_a_schedule_of_the_options_compiles_no_kernel_anew() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "tests"))
    process = subprocess.run([sys.executable, "-c", SCHEDULE], env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    first, *later, without = map(int, process.stdout.split())
    assert first >= 2 and later == [first, first]
    assert without > first  # which is seen

"""Every kernel compiled offline for GPUs that are not here: no spill, no stack, and wide memory accesses.

One launch choice for each way that rows are taken, and all options; bench/codegen.py compiles every choice too. In
processes of their own, because nothing compiles where TRITON_INTERPRET was set before Triton was imported.
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.codegen import TARGETS, narrow, over_budget, slowest_pipe
from bench.pipes import BYTES_A_CLOCK, by_pipe, slowest

ROOT = Path(__file__).parents[1]
KERNELS = {
    "narrow_rows.narrow_rows_kernel",
    "narrow_rows.small_batch_kernel",
    "wide_row.wide_row_kernel",
    "mean.norm_kernel",
    "mean.reduce_kernel",
    "mean.scale_kernel",
    "softmax.softmax_backward_kernel",
    "shard_row.sums_kernel",
    "shard_row.combine_kernel",
    "shard_row.gradient_kernel",
}

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (no build for this platform)"
)


def aside(kernel: dict[str, Any]) -> int:
    """Bytes a thread that may leave the registers: none, but of rows of bfloat16 a few with all options at once; and on
    sm_100 of the widest rows of 16 bits."""
    if kernel["target"] == "cuda:100" and kernel["threads"] == 1024:
        return 120
    together = kernel["options"].startswith("label_smoothing=0.1 z_loss") and kernel["dtype"] == "bfloat16"
    return 24 if together and kernel["n_cols"] == 32000 else 0


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills_and_in_wide_accesses(target: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command: list[Any] = [sys.executable, ROOT / "bench/codegen.py", "--tested", "--json", target]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    compiled: list[dict[str, Any]] = [json.loads(line) for line in process.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in compiled} == KERNELS
    for kernel in compiled:
        assert kernel["spill_bytes"] + kernel["stack_bytes"] <= aside(kernel), kernel
        assert kernel["shared_bytes"] <= 48 << 10, kernel
        assert not narrow(kernel), kernel
        assert not over_budget(kernel), kernel
        if target == "cuda:90" and kernel["options"] == "" and kernel["n_cols"] <= 131072 // kernel["itemsize"]:
            assert kernel["resident_warps"] >= 2 * kernel["threads"] // 32, kernel  # one loads while the other stores


def test_the_slowest_pipe_is_the_one_that_takes_longest() -> None:
    counted = by_pipe(["FFMA.FTZ", "MUFU.EX2", "F2F.F64.F32", "ISETP.GE.AND", "BRA", "LDG.E.128"])
    assert counted == {"issue": 6, "fma": 1, "mufu": 2, "alu": 1, "lsu": 1}
    assert slowest({"issue": 128.0, "mufu": 32.0}, BYTES_A_CLOCK) == ("mufu", 2.0)
    row = {"target": "cuda:90", "dtype": "float32", "itemsize": 4, "n_cols": 4096, "options": "", "constants": {}}
    row |= {"kernel": "wide_row.wide_row_kernel", "stores": 3}
    at_goal = 0.8 * (8 + 12 / 4096) / BYTES_A_CLOCK * 128
    for busy, over in ((0.99, False), (1.01, True)):
        assert over_budget(row | {"per_value": {"issue": busy * at_goal}}) is over
    row["per_value"] = {"issue": at_goal}
    of_shard = slowest_pipe(row | {"kernel": "shard_row.sums_kernel"})
    assert of_shard is not None and of_shard[1] > 1.9 * 0.8  # writes no gradient: half the bytes


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


def test_the_compilers_of_a_killed_run_end_with_it() -> None:
    """However it was killed: it cannot end them itself. They would go on for an hour."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command: list[Any] = [sys.executable, ROOT / "bench/codegen.py", "--tested", "cuda:90"]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        started: set[Path] = set()
        try:
            while "spawn_main" not in "".join(map(command_line, started)) and process.poll() is None:
                time.sleep(0.05)
                started = set(
                    map(process_of, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
                )
        finally:
            process.kill()
    assert started
    until = time.monotonic() + 60
    while (left := [of for of in started if command_line(of)]) and time.monotonic() < until:
        time.sleep(0.1)
    for of in left:
        os.kill(int(of.name), signal.SIGKILL)
    assert not left


def process_of(number: str) -> Path:
    return Path("/proc") / number


def command_line(process: Path) -> str:
    """Empty of a process that has ended."""
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""

"""The compiled kernels, executed: the PTX of each case runs on a CPU, every thread of it (ptx/).

No fault in any run; the same bits with other noise in registers and shared memory, and where the last of several stores
stays or the first; values as near to float64 as PyTorch's, contracted as ptxas may, too.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import emulated_cases
from emulated_cases import CASES, GROUPS
from exactness import assert_as_exact_as_torch
from softxent import dispatch

ROOT = Path(__file__).parents[1]
KERNELS = {
    "narrow": {"narrow_rows.narrow_rows_kernel", "narrow_rows.small_batch_kernel"},
    "wide": {"wide_row.wide_row_kernel"},
    "softmax": {"softmax.softmax_backward_kernel"},
    "shards": {"shard_row.sums_kernel", "shard_row.combine_kernel", "shard_row.gradient_kernel"},
}
# Where the interpreter sums in the same order: these have to be its bits.
AS_INTERPRETED = {"10": "gradient", "10 bfloat16": "gradient", "10, one launch": "gradient", "softmax 10": "result"}

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (no build for this platform)"
)


@pytest.mark.parametrize("group", GROUPS)
def test_compiled_kernels_run_without_a_fault_and_are_as_exact_as_torch(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command: list[Any] = [sys.executable, ROOT / "tests/emulated_cases.py", tmp_path / "found", *GROUPS[group]]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    found = torch.load(tmp_path / "found")
    assert list(found) == list(GROUPS[group])
    wrong = [f"{name}: {fault}" for name, one in found.items() for fault in one["faults"]]
    wrong += [f"{name}: {fault}" for name, one in found.items() for fault in in_results(name, one["outputs"])]
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    for name in AS_INTERPRETED.keys() & found.keys():
        what = AS_INTERPRETED[name]
        interpreted = emulated_cases.outputs(CASES[name], "ours")[what]
        if not torch.equal(bits(found[name]["outputs"][0][what]), bits(interpreted)):
            wrong.append(f"{name}: {what} is not as interpreted")
    assert not wrong, "\n".join(wrong)
    assert KERNELS[group] <= {kernel for one in found.values() for kernel, *_ in one["launches"]}


@pytest.mark.gpu(alone=True)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.arch == 90])
def test_a_gpu_has_the_same_bits_in_any_run_and_is_as_exact_as_torch(name: str, device: torch.device) -> None:
    """Every kernel on few rows: for compute-sanitizer too, which takes its time."""
    runs = [emulated_cases.outputs(CASES[name], "ours", device) for _ in range(2)]
    wrong = in_results(name, [{what: x.cpu() for what, x in run.items()} for run in runs])
    assert not wrong, "\n".join(wrong)


def in_results(name: str, runs: list[dict[str, torch.Tensor]]) -> list[str]:
    case, wrong = CASES[name], []
    torchs, exact = (emulated_cases.outputs(case, how) for how in ("torch", "exact"))
    for what, value in runs[0].items():
        if not torch.equal(bits(value), bits(runs[1][what])):
            wrong.append(f"{what} depends on noise")
        for run in runs[0], runs[-1]:
            try:
                if value.is_floating_point():
                    assert_as_exact_as_torch(run[what], torchs[what].to(value.dtype), exact[what], what)
                else:
                    assert torch.equal(run[what], exact[what]), what
            except AssertionError as error:
                wrong.append(str(error))
    return wrong


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)

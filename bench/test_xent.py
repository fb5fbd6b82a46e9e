"""A training step of the loss by pytest-benchmark: ours beside eager PyTorch, on the GPU if there is one.

    make bench
    pytest bench/test_xent.py --benchmark-autosave, and later --benchmark-compare --benchmark-compare-fail=median:10%

Each contender must be right first (bench/correctness.py). Read the figures of a group against each other: another run,
or another machine, is another matter. `gb_per_s` is of the bytes that a step must move (bench/cases.py).
"""

from typing import Any

import pytest
import torch

from bench import contenders
from bench.cases import DTYPES, SMALL, Case, inputs
from bench.correctness import check
from bench.machine import here
from bench.work import Work

SHAPES = (*SMALL, (256, 50257))


@pytest.mark.parametrize("name", ["softxent", "softxent-inplace", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_step(benchmark: Any, shape: tuple[int, int], dtype: str, name: str) -> None:
    machine = here()
    case = Case("cross_entropy", *shape, dtype, "step")
    work = Work(contenders.load(name, machine.device.type), case)
    given = inputs(case, machine.device, 0)
    found = check({name: work}, case, given, [1, 2])[name]
    assert not isinstance(found, str), found

    def step() -> None:
        work.once(given)
        machine.synchronize()

    device = torch.cuda.get_device_name() if machine.device.type == "cuda" else "CPU"
    benchmark.group = f"{device}, {shape[0]} x {shape[1]} {dtype}"
    benchmark(step)
    benchmark.extra_info |= {"torch": torch.__version__, **found}
    if benchmark.stats is not None:  # as with --benchmark-disable
        benchmark.extra_info["gb_per_s"] = case.least_bytes / benchmark.stats["median"] / 1e9

"""What the host does for a training step on a GPU, by pytest-benchmark, without one (bench/launch_cost.py)."""

from typing import Any

import pytest

from bench.cases import Case
from bench.launch_cost import SHAPE, steps


@pytest.mark.parametrize("name", ["eager", "ours, no launch", "ours, Triton's launches", "ours, by handles"])
def test_launch(benchmark: Any, name: str) -> None:
    with steps() as contenders:
        contenders[name]()  # compiled
        benchmark.group = f"host, {SHAPE[0]} x {SHAPE[1]}"
        benchmark(contenders[name])
    case = Case("cross_entropy", *SHAPE, "float32", "step")
    if benchmark.stats is not None:  # as with --benchmark-disable
        benchmark.extra_info["gb_per_s"] = case.least_bytes / benchmark.stats["median"] / 1e9

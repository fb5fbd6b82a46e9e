"""What the host does for a training step on a GPU, without one: python bench/launch_cost.py

The operation's own code runs with every kernel launch left out, and again with Triton's part of it up to the launch
itself (its key, its cache; not the driver's call), beside the whole of eager PyTorch's step on the CPU, arithmetic
included. They take turns in one process; ratios are medians over the turns. bench/test_launch.py has the same steps for
pytest-benchmark.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    for folder in ("kernels", "tests"):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from softxent import fused_softmax_xent

SHAPE = (256, 10)
Step = Callable[[], None]


def left_out(*_: Any, **__: Any) -> None:
    """In the place of a launch."""


@contextlib.contextmanager
def steps(shape: tuple[int, int] = SHAPE) -> Iterator[dict[str, Step]]:
    """By name; the kernels are compiled for a Hopper that is not there. In a process without TRITON_INTERPRET."""
    from triton.runtime.jit import JITFunction

    from offline import Offline

    logits = torch.randn(*shape, requires_grad=True)
    target = torch.randint(shape[1], shape[:1])

    def step(op: Callable[..., Tensor]) -> None:
        torch.autograd.grad(op(logits, target), logits)

    with Offline("cuda", 90) as compiled:
        step(fused_softmax_xent)
        assert compiled
        through_triton = JITFunction.run

        def ours(run: Any) -> None:
            JITFunction.run = run
            try:
                step(fused_softmax_xent)
            finally:
                JITFunction.run = through_triton

        yield {
            "eager": lambda: step(F.cross_entropy),
            "ours, no launch": lambda: ours(left_out),
            "ours, up to the launch": lambda: ours(through_triton),
        }


def microseconds(step: Step, repeats: int = 200) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats * 1e6


def main() -> None:
    with steps() as contenders:
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(30):
            for name, step in contenders.items():
                found[name].append(microseconds(step))
    print(f"torch {torch.__version__}, triton {triton.__version__}, {SHAPE[0]} x {SHAPE[1]}, as a share of eager "
          "PyTorch's step on the CPU:")  # fmt: skip
    for name, turns in found.items():
        share = median(ours / eager for ours, eager in zip(turns, found["eager"], strict=True))
        print(f"    {name:24s}{share:6.2f}")


if __name__ == "__main__":
    main()

"""What the host does for a training step on a GPU, without one: python bench/launch_cost.py

The operation's own code runs with every kernel launch left out; with Triton's own launches, up to the driver's call,
which is left out; and by handles (softxent/triton_kernels/handles.py), as it is. Beside them the whole of eager
PyTorch's step on the CPU, arithmetic included. They take turns in one process; ratios are medians over the turns.
bench/test_launch.py has the same steps for pytest-benchmark.
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
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from offline import pretended
    from softxent.triton_kernels import handles

    logits = torch.randn(*shape, requires_grad=True)
    target = torch.randint(shape[1], shape[:1])
    through_triton = JITFunction.run

    def step(op: Callable[..., Tensor]) -> None:
        torch.autograd.grad(op(logits, target), logits)

    def ours(run: Any, by_handles: bool) -> None:
        JITFunction.run, handles.ON = run, by_handles
        try:
            step(fused_softmax_xent)
        finally:
            JITFunction.run, handles.ON = through_triton, True

    with pretended(GPUTarget("cuda", 90, 32)):
        yield {
            "eager": lambda: step(F.cross_entropy),
            "ours, no launch": lambda: ours(left_out, False),
            "ours, Triton's launches": lambda: ours(through_triton, False),
            "ours, by handles": lambda: ours(through_triton, True),
        }


def microseconds(step: Step, repeats: int = 200) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats * 1e6


def main() -> None:
    with steps() as contenders:
        for step in contenders.values():  # compiled, remembered
            step()
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

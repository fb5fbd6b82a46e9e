"""What the host does for a training step on a GPU, without one: python bench/launch_cost.py

The operation's own code runs with every kernel launch left out, and again with Triton's part of it up to the launch
itself (its key, its cache; not the driver's call), beside the whole of eager PyTorch's step on the CPU, arithmetic
included. They take turns in one process; ratios are medians over the turns.
"""

import sys
import time
from collections.abc import Callable
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

from offline import Offline
from softxent import fused_softmax_xent


def main() -> None:
    from triton.runtime.jit import JITFunction

    logits = torch.randn(256, 10, requires_grad=True)
    target = torch.randint(10, (256,))

    def step(op: Callable[..., Tensor]) -> None:
        torch.autograd.grad(op(logits, target), logits)

    def microseconds(op: Callable[..., Tensor], repeats: int = 200) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            step(op)
        return (time.perf_counter() - start) / repeats * 1e6

    with Offline("cuda", 90) as compiled:
        step(fused_softmax_xent)
        print(f"kernels of a step at 256 x 10: {', '.join(kernel.kernel for kernel in compiled)}")
        through_triton = JITFunction.run

        def left_out(*_: Any, **__: Any) -> None:
            pass

        found: dict[str, list[float]] = {"eager": [], "ours, no launch": [], "ours, up to the launch": []}
        for _ in range(30):
            JITFunction.run = through_triton
            found["ours, up to the launch"].append(microseconds(fused_softmax_xent))
            JITFunction.run = left_out
            found["ours, no launch"].append(microseconds(fused_softmax_xent))
            JITFunction.run = through_triton
            found["eager"].append(microseconds(F.cross_entropy))
    print(f"torch {torch.__version__}, triton {triton.__version__}, as a share of eager PyTorch's step on the CPU:")
    for name, turns in found.items():
        share = median(ours / eager for ours, eager in zip(turns, found["eager"], strict=True))
        print(f"    {name:24s}{share:6.2f}")


if __name__ == "__main__":
    main()

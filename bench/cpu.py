"""A training step on the CPU beside eager PyTorch's: python bench/cpu.py prints time as a ratio, and peak memory.

The contenders take turns in one process, and each ratio is the median over the turns, with its quartiles: a shared
machine slows all of them alike. Memory is what PyTorch's allocator hands out during the step, at its highest, in
multiples of B, the logits' bytes; the logits themselves are not counted. `in place` writes the gradient over them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
import torch.nn.functional as F
from torch import Tensor

from softxent import fused_softmax_xent

SHAPES = ((256, 10), (65536, 10), (8192, 1000), (1024, 32000), (512, 128256))
Step = Callable[[Tensor, Tensor], Any]


def step(op: Callable[..., Tensor], **options: Any) -> Step:
    def run(leaf: Tensor, target: Tensor) -> Any:
        logits = Fresh.apply(leaf) if options else leaf
        return torch.autograd.grad(op(logits, target, **options), logits)

    return run


class Fresh(torch.autograd.Function):
    """Logits in the leaf's memory that are not the leaf: as a layer's output, they may be written over."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


CONTENDERS: dict[str, Step] = {
    "eager": step(F.cross_entropy),
    "softxent": step(fused_softmax_xent),
    "in place": step(fused_softmax_xent, inplace=True),
}


def example(n_rows: int, n_cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_rows, n_cols, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(n_cols, (n_rows,), generator=generator)


def times(logits: Tensor, target: Tensor, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step of each contender, one turn after the other."""
    start = time.perf_counter()
    for run in CONTENDERS.values():
        run(logits, target)
    once = time.perf_counter() - start
    repeats = max(1, int(0.02 / once))  # a turn takes long enough to time
    turns = max(7, int(seconds / (once * repeats)))
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(turns):
        for name, run in CONTENDERS.items():
            start = time.perf_counter()
            for _ in range(repeats):
                run(logits, target)
            found[name].append((time.perf_counter() - start) / repeats)
    return found


def peak_bytes(run: Step, logits: Tensor, target: Tensor) -> int:
    """The most that was allocated at once during a step, beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run(logits, target)
    del result
    kineto = profiled.profiler.kineto_results  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in kineto.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="of timing for each shape and dtype")
    seconds = parser.parse_args().seconds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| n_rows x n_cols | dtype | softxent / eager, time | in place / eager, time | peak memory: eager | softxent "
          "| in place |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|")
    for n_rows, n_cols in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            logits, target = example(n_rows, n_cols, dtype)
            found = times(logits, target, seconds)
            ratios = []
            for name in ("softxent", "in place"):
                turns = [ours / eager for ours, eager in zip(found[name], found["eager"], strict=True)]
                low, _, high = quantiles(turns, n=4)
                ratios.append(f"{median(turns):.2f} ({low:.2f} to {high:.2f})")
            size = logits.numel() * logits.itemsize
            memory = [f"{peak_bytes(run, logits, target) / size:.2f} B" for run in CONTENDERS.values()]
            cells = (f"{n_rows} x {n_cols}", str(dtype).removeprefix("torch."), *ratios, *memory)
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""From hidden states to the loss and its gradients, beside PyTorch, on a CPU: python bench/linear.py prints a table.

    eager                        F.linear, and F.cross_entropy of its result
    on logits, in place          F.linear, and fused_softmax_xent(..., inplace=True)
    F.linear_cross_entropy       with each of its policies of accumulation
    softxent                     fused_linear_softmax_xent, as it is and with a bound of 4 MB

Of each: the most bytes that a step has at once beside the gradients of input and weight; the error of the loss and of
the gradients, relative to the largest, against float64; and CPU time over eager's, the least of some turns taken one
after another. A quarter of the targets is ignored, or none.

The least floating point work is three products, 6 * n_rows * n_features * n_cols operations of the rows that count.
Liger's, Apple's and TRL's fused layers need a GPU.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).parents[1]
    sys.path[:0] = [str(root), str(root / "kernels")]

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import Cpu
from softxent import fused_linear_softmax_xent, fused_softmax_xent

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders() -> dict[str, Loss]:
    def torchs(policy: Any) -> Loss:
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options)

    return {
        "eager": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
        "on logits, in place": lambda x, w, y: fused_softmax_xent(F.linear(x, w), y, inplace=True),
        **{f"F.linear_cross_entropy, {p}": torchs(p) for p in ("auto", "accurate", "compact")},
        "softxent": fused_linear_softmax_xent,
        "softxent, 4 MB": lambda x, w, y: fused_linear_softmax_xent(x, w, y, max_logits_bytes=4_000_000),
    }


def inputs(
    n_rows: int, n_features: int, n_cols: int, dtype: torch.dtype, ignored: bool
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, n_features, generator=generator).to(dtype)
    w = (torch.randn(n_cols, n_features, generator=generator) * 0.02).to(dtype)
    y = torch.randint(n_cols, (n_rows,), generator=generator)
    if ignored:
        y[::4] = -100
    return x.requires_grad_(), w.requires_grad_(), y


def step(loss_of: Loss, x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = loss_of(x, w, y)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))  # type: ignore[return-value]


def cpu_seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def measure(x: Tensor, w: Tensor, y: Tensor, turns: int) -> dict[str, dict[str, float]]:
    exact = step(contenders()["eager"], x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), y)
    gradients = x.nbytes + w.nbytes
    found: dict[str, dict[str, float]] = {}
    for name, loss_of in contenders().items():
        results = step(loss_of, x, w, y)
        errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact, strict=True)]
        most = Cpu().peak_bytes(lambda: step(loss_of, x, w, y))  # noqa: B023
        found[name] = dict(zip(("loss", "dx", "dW"), errors, strict=True)) | {"MB": (most - gradients) / 1e6}
    seconds = dict.fromkeys(found, float("inf"))
    for _ in range(turns):
        for name, loss_of in contenders().items():
            seconds[name] = min(seconds[name], cpu_seconds(lambda: step(loss_of, x, w, y)))  # noqa: B023
    for name, one in found.items():
        one["time"] = seconds[name] / seconds["eager"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="2048x512x32000", metavar="ROWSxFEATURESxCLASSES")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n_rows, n_features, n_cols = map(int, arguments.shape.split("x"))
    print(f"{n_rows} x {n_features} -> {n_cols}; torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for dtype in arguments.dtypes.split(","):
        for ignored in (False, True):
            print(f"\n{dtype}, {'a quarter' if ignored else 'none'} ignored\n")
            print("| | MB beside the gradients | error of loss | of dx | of dW | CPU time over eager's |")
            print("|---|---:|---:|---:|---:|---:|")
            x, w, y = inputs(n_rows, n_features, n_cols, getattr(torch, dtype), ignored)
            for name, one in measure(x, w, y, arguments.turns).items():
                errors = " | ".join(f"{one[key]:.1e}" for key in ("loss", "dx", "dW"))
                print(f"| {name} | {one['MB']:.1f} | {errors} | {one['time']:.2f} |", flush=True)


if __name__ == "__main__":
    main()

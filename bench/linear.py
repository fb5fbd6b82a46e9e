"""From hidden states to the loss and its gradients, beside PyTorch and others: python bench/linear.py prints a table.

    eager                        F.linear, and F.cross_entropy of its result
    compile                      torch.compile of the same
    on logits, in place          F.linear, and fused_softmax_xent(..., inplace=True)
    F.linear_cross_entropy       with each of its policies of accumulation
    softxent                     fused_linear_softmax_xent, as it is and with a bound of 4 MB
    cce                          Apple's; on a CPU its variant for torch.compile
    liger, quack                 on a GPU. TRL calls Liger's

Of each: the most bytes that a step has at once beside the gradients of input and weight; how many products as large as
that of input and weight PyTorch was asked for, 3 for all rows, in parts or not (those of a kernel of one's own are not
counted); and the errors of the loss and of the gradients, relative to the largest, against float64. Whose gradient is
off by more than TOLERANCE gets no time. The others take turns: time over eager's in the same turn, its median, and
lowest to highest. On a CPU one thread, by CPU time. The limit is the time of the three products alone, which are the
least floating point work: 6 * n_rows * n_features * n_cols operations. A quarter of the targets is ignored, or none.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).parents[1]
    sys.path[:0] = [str(root), str(root / "kernels")]
    os.environ["KINETO_LOG_LEVEL"] = "99"  # of the profiler, which counts memory

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.contenders import Unavailable, compile_anew, need, need_compiler
from bench.machine import Machine, here, settle
from bench.timing import Contestant, in_turns, nothing
from softxent import fused_linear_softmax_xent, fused_softmax_xent

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = 0.05
FACTORS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}  # which arguments
PEERS = {  # name: module, distribution, function
    "liger": ("liger_kernel.transformers.functional", "liger-kernel", "liger_fused_linear_cross_entropy"),
    "quack": ("quack.linear_cross_entropy", "quack-kernels", "chunked_linear_cross_entropy"),
    "cce": ("cut_cross_entropy", "cut-cross-entropy", "linear_cross_entropy"),
}


def eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def contenders(device_type: str) -> dict[str, Loss | str]:
    """What to call, or why not."""

    def torchs(policy: Any) -> Loss | str:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"PyTorch {torch.__version__} has none"
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options)

    found: dict[str, Loss | str] = {
        "eager": eager,
        "on logits, in place": lambda x, w, y: fused_softmax_xent(F.linear(x, w), y, inplace=True),
        **{f"F.linear_cross_entropy, {p}": torchs(p) for p in ("auto", "accurate", "compact")},
        "softxent": fused_linear_softmax_xent,
        "softxent, 4 MB": partial(fused_linear_softmax_xent, max_logits_bytes=4_000_000),
    }
    for name in ("compile", *PEERS):
        try:
            found[name] = peer(name, device_type)
        except Unavailable as error:
            found[name] = str(error)
    return found


def peer(name: str, device_type: str) -> Loss:
    """Raises Unavailable."""
    if name == "compile":
        need_compiler(device_type)
        return compile_anew(eager)  # type: ignore[arg-type, return-value]
    module, distribution, function = PEERS[name]
    on_cpu = name == "cce" and device_type == "cpu"
    loss: Any = getattr(need(module, distribution, "cuda" if on_cpu else device_type)[0], function)
    return partial(loss, impl="torch_compile") if on_cpu else loss


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, ignored: bool, device: torch.device) -> list[Tensor]:
    n_rows, n_features, n_cols = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, n_features, generator=generator).to(device, dtype)
    w = (torch.randn(n_cols, n_features, generator=generator) * 0.02).to(device, dtype)
    y = torch.randint(n_cols, (n_rows,), generator=generator)
    if ignored:
        y[::4] = -100
    return [x.requires_grad_(), w.requires_grad_(), y.to(device)]


def step(loss_of: Loss, x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    loss = loss_of(x, w, y)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


def products(x: Tensor, w: Tensor) -> Callable[[], Any]:
    """Of the logits, and of the gradients of input and weight."""
    x, w = x.detach(), w.detach()
    g = x @ w.T
    return lambda: (torch.mm(x, w.T, out=g), g @ w, g.T @ x)


def counted(run: Callable[[], Any]) -> int:
    """Operations of the matrix products that PyTorch is asked for."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        run()
    total = 0
    for event in profiled.events() or ():
        if event.name in FACTORS:
            (m, k), (_, n) = (event.input_shapes[i] for i in FACTORS[event.name])
            total += 2 * m * k * n
    return total


def measure(x: Tensor, w: Tensor, y: Tensor, machine: Machine, seconds: float) -> dict[str, dict[str, Any]]:
    """By contender: its errors, memory in MB, products, and its times over eager's; or {"error": ...}."""
    exact = step(eager, x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), y)
    found: dict[str, dict[str, Any]] = {}
    ready = {"limit": Contestant(nothing, products(x, w), 1)}
    for name, loss_of in contenders(machine.device.type).items():
        if isinstance(loss_of, str):
            found[name] = {"error": loss_of}
            continue
        run = partial(step, loss_of, x, w, y)
        try:
            pairs = zip(run(), exact, strict=True)
            errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
            memory = (machine.peak_bytes(run) - x.nbytes - w.nbytes) / 1e6
            done = counted(run) / (2 * x.numel() * len(w))
        except Exception as error:  # the contender's own
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        found[name] = dict(zip(("loss", "dx", "dW"), errors, strict=True)) | {"MB": memory, "products": done}
        if max(errors) <= TOLERANCE:
            ready[name] = Contestant(nothing, run, 1)
    times = in_turns(ready, machine, seconds)
    for name, turns in times.items():
        ratios = [t / eager_t for t, eager_t in zip(turns, times["eager"], strict=True)]
        found.setdefault(name, {})["times"] = ratios
    return found


def row(name: str, one: dict[str, Any]) -> str:
    if "error" in one:
        return f"| {name} | {one['error']} | | | | | |"
    cells = [f"{one[key]:.{digits}f}" if one.get(key) else "" for key, digits in (("MB", 1), ("products", 2))]
    cells += [f"{one[key]:.1e}" if key in one else "" for key in ("loss", "dx", "dW")]
    times = one.get("times", [])
    cells.append(f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})" if times else "wrong: no time")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2048x512x32000", metavar="ROWSxFEATURESxCLASSES")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--seconds", type=float, default=10.0, help="of turns, for each table; three turns at least")
    arguments = parser.parse_args()
    machine = here()
    if machine.device.type == "cpu":
        settle(threads=1, run=0)
    n_rows, n_features, n_cols = map(int, arguments.shape.split("x"))
    print(f"{n_rows} x {n_features} -> {n_cols}; torch {torch.__version__}, {machine.name}")
    for dtype in arguments.dtypes.split(","):
        for ignored in (False, True):
            print(f"\n{dtype}, {'a quarter' if ignored else 'none'} ignored\n")
            of_values = "MB beside the gradients | products | error of loss | of dx | of dW"
            print(f"| | {of_values} | time over eager's, lower is better |")
            print("|---|---:|---:|---:|---:|---:|---:|")
            x, w, y = inputs((n_rows, n_features, n_cols), getattr(torch, dtype), ignored, machine.device)
            for name, one in measure(x, w, y, machine, arguments.seconds).items():
                print(row(name, one), flush=True)


if __name__ == "__main__":
    main()

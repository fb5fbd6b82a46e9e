"""A GPU in two minutes: python bench/quick.py DIR

A training step of the mean, and forward alone, beside a copy of the same bytes, eager PyTorch, torch.compile and Liger,
if it is there; checked against float64 first. A share: the least bytes (logits and targets read, gradient written) over
the time, as a part of the copy's speed. DIR/quick.json has every time, DIR/README.md the table. `python -m bench gpu`
asks more, and takes longer.

    graph    a CUDA graph of the step: the device alone
    calls    launched one by one, the host included
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from softxent import fused_softmax_xent

DTYPES = ("bfloat16", "float32")
WIDTHS = (10, 33, 100, 256, 512, 1000, 1001, 2000, 4096, 8192, 16384, 32000, 50257, 65536, 128256, 151936, 262144)
COMPILED = (10, 1000, 32000, 128256)  # widths at which torch.compile is timed, which compiles for seconds
MEMORY = (1000, 50257)  # at which peaks are looked at
SMALL = ((256, 10), (1024, 1000))
PROCESSES = 10  # that compile at a time
Op = Callable[[Tensor, Tensor], Tensor]


def rows_of(dtype: str, n_cols: int) -> int:
    """As many as make up 1 GiB, of few classes a half of it."""
    size = 1 << 30 if n_cols >= 512 else 1 << 29
    itemsize: int = getattr(torch, dtype).itemsize
    return size // (n_cols * itemsize) // 16 * 16


def data(n_rows: int, n_cols: int, dtype: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.empty(n_rows, n_cols, dtype=getattr(torch, dtype), device="cuda")
    some = max(1, (1 << 27) // n_cols)  # rows at a time, since random numbers are float32
    for part in logits.split(some):
        part.copy_(torch.randn(part.shape, device="cuda").mul_(3))
    return logits, torch.randint(n_cols, (n_rows,), device="cuda")


def liger() -> Op | None:
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    op: Op = liger_cross_entropy
    return op


def step(op: Op, logits: Tensor, target: Tensor) -> None:
    logits.grad = None
    op(logits, target).backward()


def check(dtype: str, n_cols: int) -> dict[str, Any]:
    """Errors relative to float64, for class indices, a part of them ignored, and for probabilities."""
    errors = {}
    logits, target = data(16384 if n_cols <= 512 else 320, n_cols, dtype)
    target[::7] = -100
    for kind, y in (("indices", target), ("probabilities", torch.softmax(logits.float() / 2, 1).to(logits.dtype))):
        ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss, expected = fused_softmax_xent(ours, y), F.cross_entropy(exact, y.double() if y.is_floating_point() else y)
        torch.autograd.backward([loss, expected])
        assert ours.grad is not None and exact.grad is not None
        errors[f"loss, {kind}"] = float(abs(loss.double() - expected) / expected)
        errors[f"gradient, {kind}"] = float((ours.grad - exact.grad).norm() / exact.grad.norm())
    with torch.no_grad():
        fused_softmax_xent(logits, target)
    return {"dtype": dtype, "n_cols": n_cols, "errors": errors}


def warm(i: int) -> None:
    """In a process of its own: the checks of its share, which compile what is timed, and torch.compile's code."""
    cases = [(True, *case) for case in itertools.product(DTYPES, COMPILED)]
    cases += [(False, *case) for case in itertools.product(DTYPES, WIDTHS)]
    for compiled, dtype, n_cols in cases[i::PROCESSES]:
        if compiled:
            logits, target = data(rows_of(dtype, n_cols), n_cols, dtype)
            step(torch.compile(F.cross_entropy, dynamic=False), logits.requires_grad_(), target)
        else:
            print(json.dumps(check(dtype, n_cols)), flush=True)


def times(run: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each."""
    run()
    event: Any = torch.cuda.Event
    events = [[event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def times_of_copy(logits: Tensor) -> list[float]:
    other = torch.empty_like(logits)
    return times(lambda: other.copy_(logits), 9)


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak(run: Callable[[], Any], matrix: int) -> float:
    """What a call needs at once besides what was there, in matrices."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / matrix


def measure(dtype: str, n_cols: int) -> dict[str, Any]:
    n_rows = rows_of(dtype, n_cols)
    logits, target = data(n_rows, n_cols, dtype)
    size = logits.numel() * logits.itemsize
    found: dict[str, Any] = {"dtype": dtype, "n_rows": n_rows, "n_cols": n_cols, "bytes": size}
    found["copy"] = times_of_copy(logits)
    z = logits.detach().requires_grad_()
    found["graph"] = times(captured(lambda: step(fused_softmax_xent, z, target)), 9)
    found["calls"] = times(lambda: step(fused_softmax_xent, z, target), 5)
    with torch.no_grad():
        found["forward"] = times(lambda: fused_softmax_xent(logits, target), 7)
    found["eager"] = times(lambda: step(F.cross_entropy, z, target), 2)
    if n_cols in MEMORY:
        z.grad = None
        found["peak"] = peak(lambda: step(fused_softmax_xent, z, target), size)
        z.grad = None
        found["peak, eager"] = peak(lambda: step(F.cross_entropy, z, target), size)
        z.grad, x = None, z * 1
        found["peak, inplace"] = peak(lambda: fused_softmax_xent(x, target, inplace=True).backward(), size)
        del x
    z.grad = None
    if n_cols in COMPILED:
        torch._dynamo.reset()
        compiled = torch.compile(F.cross_entropy, dynamic=False)
        found["compile"] = times(lambda: step(compiled, z, target), 3)
    if (op := liger()) is not None and n_cols >= 100:
        found["liger"] = times(lambda: step(op, z, target), 3)  # writes over the logits: last
    return found


def small(n_rows: int, n_cols: int) -> dict[str, Any]:
    """Microseconds of a step of a small batch: by calls, and in a graph of 20."""
    logits, target = data(n_rows, n_cols, "float32")
    logits.requires_grad_()
    found: dict[str, Any] = {"n_rows": n_rows, "n_cols": n_cols}
    for name, op in (("softxent", fused_softmax_xent), ("eager", F.cross_entropy)):
        turns = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                step(op, logits, target)
            torch.cuda.synchronize()
            turns.append((time.perf_counter() - start) * 1e4)

        def twenty(op: Op = op) -> None:
            for _ in range(20):
                step(op, logits, target)

        found[name] = {"calls": min(turns[1:]), "graph": median(times(captured(twenty), 20)) / 20 * 1e3}
    return found


def table(found: dict[str, Any]) -> Iterator[str]:
    yield f"# {found['device']}"
    yield ""
    versions = f"torch {found['torch']}, triton {found['triton']}"
    yield f"By `python bench/quick.py`, {versions}. Of a mean over 1 GiB of logits, to 256 columns 0.5 GiB; % of the"
    yield "speed of a copy of the logits in the same run; N x: how many times as long another takes, by calls."
    yield ""
    yield "| dtype | rows x columns | copy, TB/s | step, graph | step, calls | forward | eager | compile | Liger |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for one in found["cases"]:
        size, copy = one["bytes"], median(one["copy"])
        step_bytes = 1 + 8 * one["n_rows"] / (2 * size)  # over the copy's
        cells = [one["dtype"], f"{one['n_rows']} x {one['n_cols']}", f"{2 * size / copy / 1e9:.2f}"]
        cells += [f"{100 * step_bytes * copy / median(one[name]):.0f} %" for name in ("graph", "calls")]
        cells += [f"{100 * (step_bytes - 0.5) * copy / median(one['forward']):.0f} %"]
        cells += [
            f"{median(one[x]) / median(one['calls']):.2f} x" if x in one else "" for x in ("eager", "compile", "liger")
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    for one in found["small"]:
        ours, eager = one["softxent"], one["eager"]
        figures = (f"{x[how]:.1f}" for how in ("calls", "graph") for x in (ours, eager))
        yield "* {} x {} float32, microseconds of a step: by calls {}, eager {}; in a CUDA graph {}, eager {}".format(
            one["n_rows"], one["n_cols"], *figures
        )
    for one in found["cases"]:
        if "peak" in one:
            peaks = (f"{one[name]:.2f}" for name in ("peak", "peak, inplace", "peak, eager"))
            yield "* {} x {} {}, peak memory of a step in logits: {}, in place {}, eager {}".format(
                one["n_rows"], one["n_cols"], one["dtype"], *peaks
            )
    errors = [(kind, error, one["dtype"]) for one in found["checks"] for kind, error in one["errors"].items()]
    for dtype, kind in itertools.product(DTYPES, dict.fromkeys(kind for kind, *_ in errors)):
        largest = max(error for k, error, of in errors if (k, of) == (kind, dtype))
        yield f"* {dtype}, largest relative error against float64 at these widths, {kind}: {largest:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="of the results")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    if given.warm is not None:
        warm(given.warm)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(given.folder), "--warm"]
    start = time.monotonic()
    processes = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=os.environ)
        for i in range(PROCESSES)
    ]
    printed = [process.communicate()[0] for process in processes]
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checks": [json.loads(line) for text in printed for line in text.splitlines() if line.startswith("{")],
        "cases": [],
        "small": [],
    }
    print(f"checked and compiled in {time.monotonic() - start:.0f} s: {len(found['checks'])} of "
          f"{len(DTYPES) * len(WIDTHS)} widths", flush=True)  # fmt: skip
    for dtype, n_cols in itertools.product(DTYPES, WIDTHS):
        found["cases"].append(measure(dtype, n_cols))
        (given.folder / "quick.json").write_text(json.dumps(found))
    found["small"] += [small(*shape) for shape in SMALL]
    (given.folder / "quick.json").write_text(json.dumps(found))
    text = "\n".join(table(found)) + "\n"
    (given.folder / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

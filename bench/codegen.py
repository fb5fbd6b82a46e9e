"""What the compiler makes of the launch choices, without a GPU: python bench/codegen.py prints it as a table.

    python bench/codegen.py                      each choice, for TARGETS, with the Triton that is installed
    python bench/codegen.py cuda:90 --tested     those that the tests compile
    python bench/codegen.py --faults             only what puts bytes aside, accesses memory by less than it could, or
                                                 takes more instructions than there is time for
    python bench/codegen.py cuda:90 --json       a JSON object a kernel, instructions only where they have a budget

Triton's wheel has the whole tool chain, and the operation's own host code runs, on tensors without data: each kernel is
compiled as a launch on that device would compile it. In a process of its own, without TRITON_INTERPRET.

Instructions are counted in the code, all that a thread has for each value of a row, those of a loop as often as it goes
round. An upper bound, since a chunk without an end or the target skips some. bench/pipes.py says which pipe is slowest.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    for folder in ("kernels", "tests", "."):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch

from bench.pipes import by_pipe, slowest

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
REGISTERS, WARPS = 65536, 64  # of a multiprocessor
SOFT = {"op": "probabilities", "dtarget": True}
ALL = {
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "softcap": 30.0,
    "logit_scale": 0.5,
    "weight": True,
    "sample_weight": True,
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"label_smoothing": 0.1},
    {"z_loss": 1e-4, "logit_scale": 0.5, "sample_weight": True},
    {"softcap": 30.0, "weight": True},
    {"stats": "of all rows"},
    {"stats": "differentiated"},
    {"reduction": "none"},
    SOFT | {"target": "float32"},
    ALL | {"stats": "of all rows"},
    ALL | {"stats": "differentiated"},
    ALL | SOFT,
)


class Case(NamedTuple):
    dtype: str
    n_cols: int
    options: dict[str, Any]  # of fused_softmax_xent; "op" for another operation; "n_rows"

    def __str__(self) -> str:
        options = {name: True if name == "weight" else value for name, value in self.options.items()}
        named = (f"{name}={value}" if value not in ("", True) else name for name, value in options.items())
        return " ".join(named)


NARROW = (1, 2, 3, 8, 9, 10, 16, 31, 32, 33, 64, 100, 101, 128, 200, 256, 257, 512, 1000, 1001, 1024)
WIDE = (1025, 50257, 128256, *(n + odd for n in (2048, 4096, 8192, 16384, 32000, 65536, 262144) for odd in (0, 1)))
TESTED = {  # one width of each way that rows are taken, odd ones too
    "float32": (10, 100, 1001, 2048, 16384, 50257, 131072),
    "bfloat16": (10, 1000, 4096, 32000, 50257, 131072),
    "float16": (101, 65536),
    "float64": (10, 5000),
}
# Where the tests compile options too: each in narrow rows and in wide ones; in odd rows those that go together.
TESTED_OPTIONS = {
    ("float32", 100): OPTIONS,
    ("float32", 1001): OPTIONS[5:],
    ("float32", 50257): OPTIONS[5:],
    ("bfloat16", 32000): OPTIONS,
}


def cases(some: bool) -> Iterator[Case]:
    """some: those that the tests compile."""
    for dtype in TESTED:
        for n_cols in TESTED[dtype] if some else (*NARROW, *WIDE):
            yield Case(dtype, n_cols, {})
            yield Case(dtype, n_cols, SOFT)
            if n_cols <= 32:
                yield Case(dtype, n_cols, {"n_rows": 256})
            for options in TESTED_OPTIONS.get((dtype, n_cols), ()) if some else OPTIONS:
                yield Case(dtype, n_cols, options)
            if n_cols in (5000, 50257) or (not some and n_cols > 1024):
                yield Case(dtype, n_cols, {"op": "shard"})
            if (not some and n_cols > 1024) or (dtype, n_cols) == ("bfloat16", 32000):
                yield Case(dtype, n_cols, ALL | {"op": "shard", "stats": "differentiated"})
                yield Case(dtype, n_cols, ALL | {"op": "shard", "target": "float32"})
            if not some or n_cols in (10, 50257):
                yield Case(dtype, n_cols, {"op": "softmax"})
                yield Case(dtype, n_cols, {"op": "log_softmax"})


def run(case: Case) -> None:
    """A step of the case, with tensors of zeros, whose kernels are compiled and not run."""
    import softxent

    options = dict(case.options)
    dtype, op = getattr(torch, case.dtype), options.pop("op", None)
    n_rows = options.pop("n_rows", 600)
    logits = torch.zeros(n_rows, case.n_cols, dtype=dtype, requires_grad=True)
    if op in ("softmax", "log_softmax"):
        getattr(softxent, op)(logits, 1).backward(logits.detach())
        return
    target = torch.zeros(n_rows, dtype=torch.int64)
    if op == "probabilities" or (op == "shard" and "target" in options):
        dtarget, of = options.pop("dtarget", False), options.pop("target", case.dtype)
        target = torch.zeros_like(logits, dtype=getattr(torch, of), requires_grad=dtarget)
    if "weight" in options:
        options["weight"] = torch.ones(case.n_cols, dtype=dtype)
    if "sample_weight" in options:
        options["sample_weight"] = torch.ones(n_rows)
    stats = options.pop("stats", None)
    if op == "shard":
        from softxent.options import Inputs, Options

        inputs = Inputs(logits.detach(), target, options.pop("weight", None), options.pop("sample_weight", None))
        shard_step(inputs, Options(**options), stats is not None)
        return
    if stats is None:
        softxent.fused_softmax_xent(logits, target, **options).sum().backward()
        return
    found = softxent.fused_softmax_xent_with_stats(logits, target, **options)
    if stats == "differentiated":
        torch.autograd.backward([getattr(found, name).sum() for name in ("lse", "entropy", "target_logprob")])
    else:
        found.loss.backward()


def shard_step(inputs: Any, options: Any, stats: bool) -> None:
    """Of the rows of a shard, the second of eight; what the ranks exchange is no kernel of ours."""
    from softxent.options import Stats
    from softxent.parallel.shards import Shard, fields_of
    from softxent.triton_kernels import shards

    n_cols = inputs.logits.shape[1]
    shard = Shard(n_cols, n_cols, 8 * n_cols, n_cols, None)
    wanted = ("lse", "entropy", "prediction") if stats else ()
    fields = fields_of(inputs, options, wanted)
    gathered = torch.stack([shards.sums(inputs, options, shard, fields)] * 8)
    loss, of_rows, row = shards.combine(gathered, inputs, options, shard, fields, wanted)
    dlogits = shards.gradient_like(inputs.logits, inputs.logits.dtype)
    dstats = of_rows._replace(prediction=None) if stats else Stats()
    soft = inputs.target.is_floating_point()
    dtarget = shards.gradient_like(inputs.logits, inputs.target.dtype) if soft else None
    shards.gradient(row, loss, dstats, inputs, options, shard, dlogits, dtarget)


def measure(target: str, some: bool, all_counted: bool) -> Iterator[dict[str, Any]]:
    """What was made of each kernel that is new with a case; its instructions counted, or only where `has_budget`."""
    from offline import Offline

    backend, arch = target.split(":")
    with Offline(backend, int(arch) if arch.isdigit() else arch) as compiled:
        for case in cases(some):
            run(case)
            for kernel in compiled:
                row = {"target": target, "dtype": case.dtype, "n_cols": case.n_cols, "options": str(case)}
                row |= kernel.as_dict()
                row["itemsize"] = getattr(torch, case.dtype).itemsize
                row["resident_warps"] = (
                    resident_warps(kernel.registers, kernel.threads // 32) if backend == "cuda" else 0
                )
                if all_counted or has_budget(row):
                    row["per_value"] = per_value(row, *kernel.opcodes())
                yield row
            compiled.clear()


def resident_warps(registers: int, warps: int) -> int:
    """Warps that fit into a multiprocessor together, by their registers, which come by 256 a warp."""
    return min(WARPS, REGISTERS // (-(-registers * 32 // 256) * 256) // warps * warps)


def per_value(row: dict[str, Any], code: list[str], loops: list[list[str]]) -> dict[str, float] | None:
    """Instructions for each value of a row, by pipe; all of them are "issue". None for kernels of no rows."""
    constants, threads, n_cols = row["constants"], row["threads"], row["n_cols"]
    found, in_loops = by_pipe(code), by_pipe(chain(*loops))
    if "ROWS" in constants:
        times, values = 1.0, constants["ROWS"] * n_cols / threads
    elif "HELD" in constants:
        chunk = threads * constants["UNROLL"] * constants["GRANULE"]
        times, values = max(0, -(-n_cols // chunk) - constants["HELD"]), n_cols / threads
    elif row["kernel"] == "softmax.softmax_backward_kernel":
        times, values = -(-n_cols // constants["BLOCK_N"]), n_cols * constants["BLOCK_M"] / threads
    else:
        return None
    return {pipe: (number + (times - 1) * in_loops[pipe]) / values for pipe, number in found.items()}


def slowest_pipe(row: dict[str, Any]) -> tuple[str, float] | None:
    """Of a Hopper, and its time in that of the bytes; None where instructions were not counted."""
    if row["target"] != "cuda:90" or not row.get("per_value"):
        return None
    of_shard = row["kernel"].startswith("shard_row")
    soft = "op=probabilities" in row["options"] or (of_shard and "target=" in row["options"])
    dtarget = "dtarget" in row["options"] or (of_shard and soft)
    writes = row["kernel"] == "shard_row.gradient_kernel" if of_shard else row["stores"] > 2
    values = 1 + soft + writes * (1 + dtarget)
    return slowest(row["per_value"], row["itemsize"] * values + 12 / row["n_cols"])  # a class read, a loss written


def narrow(row: dict[str, Any]) -> bool:
    """Whether wide rows are not accessed 16 bytes at a time, but for single accesses: of a row's target, its logit and
    its weights, the mean's divisor, the loss and the stats; and of the ends of odd rows."""
    constants = row["constants"]
    if constants.get("GRANULE", 1) == 1:
        return False
    aligned = not constants["ODD"] and row["dtype"] != "float64"
    if row["target"].startswith("hip") and not aligned:  # as far as AMD's compiler sees
        return False
    if row["kernel"] != "wide_row.wide_row_kernel":  # of a shard: read once, and written or not
        writes = row["kernel"] == "shard_row.gradient_kernel"
        return bool(row["wide_loads"] < constants["UNROLL"] or row["wide_stores"] < writes * constants["UNROLL"])
    step = row["wide_stores"] > 0 or row["stores"] > 6  # more than the loss and the stats
    stores = constants["UNROLL"] * (1 + constants["HELD"])
    loads = stores + step * constants["UNROLL"]  # of those that are not held, twice
    return bool(row["wide_loads"] < loads or (step and row["wide_stores"] < stores))


def has_budget(row: dict[str, Any]) -> bool:
    """On a Hopper, plain: options compute more, and float64 has units of its own. Not forward alone of narrow odd rows,
    which go value by value."""
    plain = row["options"] == "" and (row["constants"].get("WIDTH", 2) > 1 or row["stores"] > 2)
    return bool(row["target"] == "cuda:90" and row["dtype"] != "float64" and plain)


# The goal is 0.8 of the bytes' time, and 1 of rows of less than 256 columns. What misses it: how far, and why it may.
BOTH_WAYS = "counted with both ways through a chunk, of which fewer are executed (executed.md)"
MISSES: dict[tuple[str, int], tuple[float, str]] = {
    ("float32", 2048): (1.4, f"98 % of a copy on an H100; {BOTH_WAYS}"),
    ("bfloat16", 4096): (1.1, f"100 % of a copy on an H100; {BOTH_WAYS}"),
    ("bfloat16", 32000): (0.9, f"98 % of a copy on an H100; {BOTH_WAYS}"),
    ("bfloat16", 50257): (0.95, f"an odd row: {BOTH_WAYS}; not timed since its ends were taken apart"),
    ("float16", 65536): (1.0, f"forward alone, of half the bytes; {BOTH_WAYS}; not timed"),
}


def over_goal(row: dict[str, Any]) -> bool:
    found = slowest_pipe(row) if has_budget(row) else None
    return found is not None and found[1] > (0.8 if row["n_cols"] >= 256 else 1.0)


def over_budget(row: dict[str, Any]) -> bool:
    """Whether a pipe is busy for longer than the goal, and than is said of a miss."""
    most, _ = MISSES.get((row["dtype"], row["n_cols"]), (0.0, ""))
    found = slowest_pipe(row)
    return over_goal(row) and found is not None and found[1] > most


def misses(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if over_goal(row):
            pipe, busy = slowest_pipe(row) or ("", 0.0)
            _, why = MISSES.get((row["dtype"], row["n_cols"]), (0.0, "not looked into"))
            name = row["kernel"].removesuffix("_kernel")
            yield f"* {name}, {row['dtype']} {row['n_cols']}: {pipe} {busy:.2f} of the bytes' time: {why}"


def faults(row: dict[str, Any]) -> str:
    """What tests of the brief set do not let pass, or nothing."""
    aside = row["spill_bytes"] + row["stack_bytes"]
    found = {f"{aside} bytes aside": aside > 0, "narrow": narrow(row), "over budget": over_budget(row)}
    return ", ".join(name for name, is_so in found.items() if is_so)


HEAD = (
    "| kernel | dtype | n_cols | options | tile | threads | registers | warps | shared | spilled | loads | stores "
    "| instructions | slowest pipe |"
)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield HEAD
    yield "|" + "---|" * (HEAD.count("|") - 1)
    for row in rows:
        constants = row["constants"]
        sizes = "ROWS", "SPAN", "UNROLL", "GRANULE", "HELD", "BLOCK_M", "BLOCK_N", "BLOCK"
        tile = [constants[name] for name in sizes if name in constants]
        cells = (
            row["kernel"].removesuffix("_kernel"),
            row["dtype"],
            row["n_cols"],
            row["options"],
            " x ".join(map(str, tile)),
            row["threads"],
            row["registers"],
            row["resident_warps"] or "",
            row["shared_bytes"],
            row["spill_bytes"] + row["stack_bytes"],
            f"{row['wide_loads']} + {row['loads'] - row['wide_loads']}",
            f"{row['wide_stores']} + {row['stores'] - row['wide_stores']}",
            "" if row["per_value"] is None else f"{row['per_value']['issue']:.1f}",
            "{} {:.2f}".format(*found) if (found := slowest_pipe(row)) else "",
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def named_faults(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if found := faults(row):
            case = " ".join(str(row[name]) for name in ("dtype", "n_cols", "options") if row[name] != "")
            yield f"* {row['kernel'].removesuffix('_kernel')}, {case}: {found}"


def measured(target: str, some: bool, only_faults: bool) -> list[dict[str, Any]]:
    """In a process of its own."""
    return list(measure(target, some, not only_faults))


def end_with(parent: int) -> None:
    """This process ends when the one that started it does, however that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help="cuda:90, hip:gfx942, ...")
    parser.add_argument("--tested", dest="some", action="store_true", help="only the cases that the tests compile")
    parser.add_argument("--faults", action="store_true", help="only what should not be, and how many were looked at")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    arguments = parser.parse_args()
    if arguments.json:
        for target in arguments.targets:
            for row in measure(target, arguments.some, all_counted=False):
                print(json.dumps(row), flush=True)
        return
    if arguments.faults:
        more = "Named are kernels that put bytes aside, access less than 16 bytes at a time, or take too long."
    else:
        more = (
            "Loads and stores: those of 16 bytes + narrower ones. The slowest pipe is a Hopper's (bench/pipes.py), in "
            "the time that its bytes take of an H100; an H200 moves them 1.43 times as fast."
        )
    print(f"Made by `python bench/codegen.py {' '.join(sys.argv[1:])}`.\n")
    page = "What the tests compile" if arguments.some else "Every choice"
    print(f"{page}; triton {triton.__version__}, torch {torch.__version__.split('+')[0]}. {more}")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=end_with, initargs=(os.getpid(),)) as pool:
        of_targets = pool.map(partial(measured, some=arguments.some, only_faults=arguments.faults), arguments.targets)
        for target, rows in zip(arguments.targets, of_targets, strict=True):
            print(f"\n## {target}\n")
            lines = [*(named_faults(rows) if arguments.faults else table(rows))]
            n_named = len(lines)
            if missed := [*misses(rows)]:
                lines += ["", "Slower than the goal, 0.8 of the bytes' time, 1 of less than 256 columns:", "", *missed]
            if arguments.faults:
                lines.append(f"\n{len(rows)} kernels, {n_named} of them named here.")
            print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()

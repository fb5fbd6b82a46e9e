"""What the compiler makes of every launch choice, without a GPU: python bench/codegen.py prints it as a table.

    python bench/codegen.py                      each choice, for TARGETS, with the Triton that is installed
    python bench/codegen.py cuda:90 --brief      one choice for each regime and dtype
    python bench/codegen.py cuda:90 --plain      of those, the ones without options
    python bench/codegen.py cuda:90 --tested     and those with options that the tests compile for a Hopper
    python bench/codegen.py --faults             each choice, but only those shown that put bytes aside, access memory
                                                 by less than 16 bytes, or take more instructions than there is time for
    python bench/codegen.py cuda:90 --json       a JSON object a kernel, instructions only where they have a budget

Triton's wheel has the whole tool chain, and the operation's own host code runs, on tensors without data: each kernel is
compiled as a launch on that device would compile it. In a process of its own, without TRITON_INTERPRET.

Instructions are counted in the code, a thread's number for each value of a row that it works on: an upper bound where
code is skipped, as after a target that is ignored. Of the kernels that stream rows their loops are counted.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    for folder in ("kernels", "tests"):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
REGISTERS, WARPS = 65536, 64  # of a multiprocessor
SMOOTHED = {"label_smoothing": 0.1}
WEIGHTED = {"label_smoothing": 0.1, "weight": True}
SCALED = {"z_loss": 1e-4, "logit_scale": 0.5, "sample_weight": True}
CAPPED = {"softcap": 30.0, "weight": True}
STATS = {"stats": "of all rows"}
DIFFERENTIATED = {"stats": "differentiated"}
SOFT = {"op": "soft_target"}
ALL = SMOOTHED | CAPPED | SCALED
BEYOND: tuple[dict[str, Any], ...] = (SCALED, CAPPED, STATS, DIFFERENTIATED)  # what PyTorch has not


class Case(NamedTuple):
    dtype: str
    n_cols: int
    options: dict[str, Any]  # of fused_softmax_xent; "op" for another operation; "n_rows"

    def __str__(self) -> str:
        options = {name: True if name == "weight" else value for name, value in self.options.items()}
        named = (f"{name}={value}" if value not in ("", True) else name for name, value in options.items())
        return " ".join(named)


READS = {  # of a matrix, where it is not 1
    "streaming.step_kernel": 2,
    "soft_rows.few_step_kernel": 2,
    "soft_rows.step_kernel": 2,
    "soft_streams.forward_kernel": 2,
    "soft_streams.step_kernel": 4,
    "soft_streams.backward_kernel": 2,
    "softmax.backward_kernel": 2,
    "softmax.stream_forward_kernel": 2,
    "softmax.stream_backward_kernel": 4,
}
BRIEF = {
    "float32": (10, 100, 1000, 1001, 32768, 50257, 131072),
    "bfloat16": (10, 1001, 32768, 50257, 65536, 131072),
    "float16": (1001, 131072),
    "float64": (10, 1000, 131072),
}
# All options at once: few classes, odd rows value by value, packed, streamed.
TOGETHER = (("float32", 10), ("float32", 1001), ("bfloat16", 32768), ("float32", 131072))


def is_plain(case: Case) -> bool:
    """With no option that adds to what a kernel computes."""
    more = {"label_smoothing", "z_loss", "softcap", "stats", "dtarget", "target"}
    return not more & set(case.options) and case.options.get("op") != "log_softmax"


def is_tested(case: Case) -> bool:
    """Without options; every one with a row in granules, and with an odd one; and all at once, in every regime."""
    each = case.dtype == "float32" and (case.n_cols in (1000, 1001) or case.options.get("op") == "log_softmax")
    return (
        is_plain(case)
        or each
        or case.options.keys() >= ALL.keys()
        or (case.n_cols == 1001 and "target" in case.options)
    )


EVERY, BRIEFLY = "Every choice", "One choice for each regime, dtype and kind of option"
SETS: dict[str | None, tuple[Callable[[Case], bool], str]] = {  # and what its page is said to be
    None: (lambda _: True, EVERY),
    "brief": (lambda _: True, BRIEFLY),
    "plain": (is_plain, BRIEFLY + ", without those that add to what a kernel computes"),
    "tested": (is_tested, BRIEFLY + ", as far as the tests compile them for a Hopper"),
}


def cases(brief: bool, clusters: bool) -> Iterator[Case]:
    """Rows that fill their tile, and that lie in granules of 16 bytes; and odd ones."""
    from softxent import launch

    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2), ("float64", 8)):
        tiles = [block_n for block_n, *_ in launch.WHOLE[max(4, size)]]
        wider = {2 * tiles[-1], 2 * tiles[-1] - 9, 50257, 128256}
        few = {2, 3, 10, 16, 31, 32}
        common = dtype in ("float32", "bfloat16")
        for n_cols in BRIEF[dtype] if brief else sorted(few | {*tiles, *BRIEF[dtype]} | {n - 7 for n in tiles} | wider):
            yield Case(dtype, n_cols, {})
            if (dtype == "float32" and n_cols in (10, 1000)) or (not brief and dtype != "float16"):
                yield Case(dtype, n_cols, WEIGHTED)
            if (dtype, n_cols) in (("bfloat16", 50257), ("bfloat16", 65536)) or (not brief and n_cols >= 8192):
                yield Case(dtype, n_cols, SMOOTHED)
            some = (10, 1000, 1001, 131072, *(() if brief else (1024, 8192, 16384, 32768, 50257, 65536)))
            if (n_cols in some and common) or (dtype, n_cols) == ("bfloat16", 50257):
                for options in BEYOND:
                    yield Case(dtype, n_cols, options)
            if (dtype, n_cols) in TOGETHER:
                yield Case(dtype, n_cols, ALL | STATS)
                yield Case(dtype, n_cols, ALL | SOFT | {"dtarget": True})
                if dtype == "float32":
                    yield Case(dtype, n_cols, ALL | DIFFERENTIATED)
            if n_cols > 65536 or (not brief and dtype == "float32"):
                yield Case(dtype, n_cols, {"reduction": "none"})
            if n_cols > 65536 and size < 8 and clusters:
                yield Case(dtype, n_cols, {"cluster": True})
            if n_cols in few:
                yield Case(dtype, n_cols, {"n_rows": 256})
            if n_cols in (10, 100, 1000, 1001, 32768, 50257, 131072) or not brief:
                yield Case(dtype, n_cols, SOFT)
                if (n_cols in (10, 1000, 1001) and common) or not brief:
                    yield Case(dtype, n_cols, SOFT | {"dtarget": True})
                    yield Case(dtype, n_cols, SOFT | WEIGHTED | {"dtarget": True})
                    if common:
                        yield Case(dtype, n_cols, SOFT | CAPPED | SCALED)
                elif (dtype, n_cols) == ("bfloat16", 50257):
                    yield Case(dtype, n_cols, SOFT | CAPPED | SCALED)
                if n_cols > 65536 or not brief:
                    yield Case(dtype, n_cols, SOFT | {"reduction": "none"})
                if dtype == "bfloat16" and n_cols > 32:
                    yield Case(dtype, n_cols, SOFT | {"target": "float32"})
            if n_cols in (10, 1000, 1001, 32768, 50257, 131072) or (not brief and n_cols > 32):
                yield Case(dtype, n_cols, {"op": "softmax"})
                if common or not brief:
                    yield Case(dtype, n_cols, {"op": "log_softmax"})


def run(case: Case) -> None:
    """A step of the case, with tensors of zeros, whose kernels are compiled and not run."""
    import softxent
    from softxent import launch

    options = dict(case.options)
    launch.CLUSTERS = options.pop("cluster", False)
    dtype, op = getattr(torch, case.dtype), options.pop("op", None)
    n_rows = options.pop("n_rows", 600)
    logits = torch.zeros(n_rows, case.n_cols, dtype=dtype, requires_grad=True)
    if op in ("softmax", "log_softmax"):
        getattr(softxent, op)(logits, 1).backward(logits.detach())
        return
    target = torch.zeros(n_rows, dtype=torch.int64)
    if op == "soft_target":
        dtarget, of = options.pop("dtarget", False), options.pop("target", case.dtype)
        target = torch.zeros_like(logits, dtype=getattr(torch, of), requires_grad=dtarget)
    if "weight" in options:
        options["weight"] = torch.ones(case.n_cols, dtype=dtype)
    if "sample_weight" in options:
        options["sample_weight"] = torch.ones(n_rows)
    stats = options.pop("stats", None)
    if stats is None:
        softxent.fused_softmax_xent(logits, target, **options).sum().backward()
        return
    found = softxent.fused_softmax_xent_with_stats(logits, target, **options)
    if stats == DIFFERENTIATED["stats"]:
        torch.autograd.backward([getattr(found, name).sum() for name in ("lse", "entropy", "target_logprob")])
    else:
        found.loss.backward()


def measure(target: str, some: str | None, all_counted: bool) -> Iterator[dict[str, Any]]:
    """What was made of each kernel that is new with a case, of every one or of a set; its instructions counted, or only
    where `has_budget`."""
    from offline import Offline

    backend, arch = target.split(":")
    with Offline(backend, int(arch) if arch.isdigit() else arch) as compiled:
        import triton

        new = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
        for case in cases(some is not None, new and backend == "cuda" and int(arch) >= 90):
            if not SETS[some][0](case):
                continue
            run(case)
            for kernel in compiled:
                row = {"target": target, "dtype": case.dtype, "n_cols": case.n_cols, "options": str(case)}
                row |= kernel.as_dict()
                row["resident_warps"] = (
                    resident_warps(kernel.registers, kernel.threads // 32) if backend == "cuda" else 0
                )
                if all_counted or has_budget(row):
                    row["instructions"], row["loops"] = kernel.count()
                    row["per_value"] = per_value(row)
                yield row
            compiled.clear()


def resident_warps(registers: int, warps: int) -> int:
    """Warps that fit into a multiprocessor together, by their registers, which come by 256 a warp."""
    return min(WARPS, REGISTERS // (-(-registers * 32 // 256) * 256) // warps * warps)


def per_value(row: dict[str, Any]) -> float | None:
    """Instructions for each value of a row; None for kernels of no rows."""
    constants, threads, n_cols = row["constants"], row["threads"], row["n_cols"]
    module = row["kernel"].split(".")[0]
    if "ROWS" in constants:
        return float(row["instructions"] * threads / (constants["ROWS"] * n_cols))
    if "BLOCK_M" in constants:
        return float(row["instructions"] * threads * constants.get("num_ctas", 1) / (constants["BLOCK_M"] * n_cols))
    if module == "packed_row":
        return float(row["instructions"] * threads / n_cols)
    if row["kernel"] in ("streaming.backward_kernel", "soft_streams.backward_kernel"):
        return float(row["instructions"] * threads / constants["BLOCK"])
    if module in ("streaming", "softmax", "soft_streams"):
        values = constants["THREADS"] * constants["VECTOR"]
        at_once = 2 if row["kernel"] in ("softmax.stream_backward_kernel", "soft_streams.step_kernel") else 4
        if row["kernel"] == "soft_streams.step_kernel" and row["dtype"] == "float64" and "softcap" in row["options"]:
            at_once = 1
        values = constants["UNROLL"] * values, at_once * values  # of the sums' loop, and of what is written
        return float(sum(loop * threads / block for loop, block in zip(row["loops"], values, strict=False)))
    return None


def narrow(row: dict[str, Any]) -> bool:
    """Whether rows that lie in granules, or are odd and held on chip, are not accessed 16 bytes at a time.

    Single accesses: of a row's target, its logit and its weights, the parts of the mean's divisor, the loss and the
    stats; the ends of odd rows, of each matrix; and what else the target's thread holds of a packed row. A row of
    [..., 64] has a few of each a thread.
    AMD's compiler does not see the alignment of odd rows.
    """
    constants = row["constants"]
    granule, odd = constants.get("GRANULE", 1), constants.get("ODD", False)
    if granule == 1 or row["kernel"].startswith("mean") or (odd and row["target"].startswith("hip")):
        return False
    if odd and row["kernel"] == "soft_streams.forward_kernel":  # which sums, value by value, and no more
        return False
    written = 5 * ("stats" in row["options"]) + 6 * ("dtarget" in row["options"])
    singles = row["loads"] - row["wide_loads"], row["stores"] - row["wide_stores"] - written
    if odd and "weight" in row["options"].split() and row["kernel"].startswith("soft_"):  # which starts elsewhere
        singles = 0, singles[1]
    if odd and "stream" in row["kernel"]:  # summed value by value: their bits must not depend on alignment
        singles = 0, singles[1]
    return bool(
        row["wide_loads"] == 0 or 0 < row["wide_stores"] < row["wide_loads"] // 6 or singles[0] > 20 or singles[1] > 6
    )


def has_budget(row: dict[str, Any]) -> bool:
    """On a Hopper, rows of 1000 values and more that lie in granules, plain: label smoothing and stats sum more, a
    softcap is computed, odd rows have ends, and float64 has units of its own."""
    constants = row["constants"]
    more = any(name in row["options"] for name in ("label_smoothing", "softcap", "stats"))
    plain = not more and not constants.get("ODD") and constants.get("GRANULE", 1) > 1
    return bool(row["target"] == "cuda:90" and row["n_cols"] >= 1000 and row["dtype"] != "float64" and plain)


def over_budget(row: dict[str, Any]) -> bool:
    """Whether there are more instructions than a Hopper has time for while the bytes pass: an H200 issues 15.6 a value
    while it reads 2 bytes at 4.3 TB/s, 7.8 a byte that has to move."""
    if not has_budget(row) or row["per_value"] is None:
        return False
    itemsize = 4 if row["dtype"] == "float32" else 2
    reads = READS.get(row["kernel"], 1)
    writes = 0 if row["wide_stores"] == 0 else 1
    return bool(row["per_value"] > 7.8 * itemsize * (reads + writes))


def faults(row: dict[str, Any]) -> str:
    """What tests of the brief set do not let pass, or nothing."""
    aside = row["spill_bytes"] + row["stack_bytes"]
    found = {f"{aside} bytes aside": aside > 0, "narrow": narrow(row), "over budget": over_budget(row)}
    return ", ".join(name for name, is_so in found.items() if is_so)


COLUMNS: tuple[str, ...] = ("kernel", "dtype", "n_cols", "options", "tile", "threads", "registers", "warps", "shared")
COLUMNS += ("spilled", "loads", "stores", "instructions")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for row in rows:
        constants = row["constants"]
        sizes = "ROWS", "N_COLS", "BLOCK_M", "BLOCK_N", "BLOCK", "CHUNKS"
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
            "" if row["per_value"] is None else f"{row['per_value']:.1f}",
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def named_faults(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if found := faults(row):
            case = " ".join(str(row[name]) for name in ("dtype", "n_cols", "options") if row[name] != "")
            yield f"* {row['kernel'].removesuffix('_kernel')}, {case}: {found}"


def measured(target: str, some: str | None, only_faults: bool) -> list[dict[str, Any]]:
    """In a process of its own. What is found in the course of hours is said at once."""
    rows = []
    for row in measure(target, some, not only_faults):
        rows.append(row)
        if only_faults and faults(row):
            print(target, *named_faults([row]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help="cuda:90, hip:gfx942, ...")
    for name, (_, page) in SETS.items():
        if name is not None:
            parser.add_argument(f"--{name}", dest="some", action="store_const", const=name, help=page.lower())
    parser.add_argument("--faults", action="store_true", help="only what should not be, and how many were looked at")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    arguments = parser.parse_args()
    if arguments.json:
        for target in arguments.targets:
            for row in measure(target, arguments.some, all_counted=False):
                print(json.dumps(row), flush=True)
        return
    more = "Loads and stores: those of 16 bytes + narrower ones."
    if arguments.faults:
        more = "Named are kernels that put bytes aside, access less than 16 bytes at a time, or take too long."
    print(f"Made by `python bench/codegen.py {' '.join(sys.argv[1:])}`.\n")
    print(f"{SETS[arguments.some][1]}; triton {triton.__version__}, torch {torch.__version__.split('+')[0]}. {more}")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        try:
            of_targets = pool.map(measured, arguments.targets, repeat(arguments.some), repeat(arguments.faults))
            for target, rows in zip(arguments.targets, of_targets, strict=True):
                print(f"\n## {target}\n")
                lines = [*(named_faults(rows) if arguments.faults else table(rows))]
                if arguments.faults:
                    lines.append(f"\n{len(rows)} kernels, {len(lines)} of them named here.")
                print(*lines, sep="\n", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


if __name__ == "__main__":
    main()

"""Bytes and messages of a loss whose classes are spread over devices: python bench/scaling.py prints docs/scaling.md's
tables. Everything here is computed from formulas, nothing is measured.

P devices share the classes of the same n rows: each has n * V / P logits. A ring moves, in and out of each device,

    all-gather of b bytes from each device        (P - 1) * b            in P - 1 steps
    all-reduce of b bytes                         2 * (P - 1) / P * b    in 2 * (P - 1) steps

Thakur, Rabenseifner and Gropp (2005), "Optimization of collective communication operations in MPICH"; Patarasuk and
Yuan (2009), "Bandwidth optimal all-reduce algorithms for clusters of workstations". With trees and recursive doubling
the steps are log2(P) for P - 1; the bytes stay, or grow.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

N_CLASSES = 262_144
LOGIT, SUM = 2, 4  # bytes: bfloat16, float32
FEWEST, LOSS, STATS = 3, 6, 8  # numbers that a device gives of a row: at least, at most for the loss, with every stat
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8  # devices that have the fast links to each other


class Traffic(NamedTuple):
    """Of one device, in one direction."""

    n_bytes: float
    steps: int


def all_gather(n_bytes: float, ranks: int) -> Traffic:
    """Of so many bytes from each."""
    return Traffic((ranks - 1) * n_bytes, ranks - 1)


def all_reduce(n_bytes: float, ranks: int) -> Traffic:
    """Of so many bytes that each has: a reduce-scatter, and an all-gather of what it leaves on each."""
    return Traffic(2 * (ranks - 1) / ranks * n_bytes, 2 * (ranks - 1))


def three_all_reduces(n_rows: float, ranks: int) -> Traffic:
    """The maximum, the sum of exponentials, and the target's logit of each row."""
    n_bytes, steps = all_reduce(n_rows * SUM, ranks)
    return Traffic(3 * n_bytes, 3 * steps)


def one_all_gather(n_rows: float, ranks: int, numbers: int) -> Traffic:
    return all_gather(n_rows * numbers * SUM, ranks)


def break_even(ranks: int, numbers: int, latency_times_bandwidth: float, trees: bool) -> float:
    """Rows below which one all-gather takes less time than three all-reduces, at latency + bytes / bandwidth a step:

    steps * latency + bytes / bandwidth is the same for both.
    """
    fewer, more = one_all_gather(1, ranks, numbers), three_all_reduces(1, ranks)
    each = math.log2(ranks) / (ranks - 1) if trees else 1.0
    return (more.steps - fewer.steps) * each * latency_times_bandwidth / (fewer.n_bytes - more.n_bytes)


def on_the_wire(n_rows: int) -> str:
    head = "devices", "logits gathered", "three all-reduces", *(f"one all-gather, {k}" for k in (FEWEST, LOSS, STATS))
    rows = []
    for ranks in DEVICES:
        ours = (one_all_gather(n_rows, ranks, k) for k in (FEWEST, LOSS, STATS))
        logits = all_gather(n_rows * N_CLASSES / ranks * LOGIT, ranks)
        rows.append([ranks, *(megabytes(way.n_bytes) for way in (logits, three_all_reduces(n_rows, ranks), *ours))])
    return table(head, rows)


def messages(latency: float, bandwidth: float) -> str:
    head = "devices", "steps: one all-gather", "three all-reduces", "rows, in rings", "rows, in trees"
    rows = []
    for ranks in DEVICES:
        steps = one_all_gather(1, ranks, FEWEST).steps, three_all_reduces(1, ranks).steps
        even = (break_even(ranks, FEWEST, latency * bandwidth, trees) for trees in (False, True))
        rows.append([ranks, *steps, *(f"{round(n, -2):,.0f}" for n in even)])
    return table(head, rows)


def on_the_chip(n_rows: int) -> str:
    """What a device holds, and what its memory moves, of logits and their gradient; and of what is exchanged."""
    head = "devices", "logits held, gathered", "moved", "logits held, spread", "moved", f"of {LOSS} numbers gathered"
    rows = []
    for ranks in DEVICES:
        whole, slice_ = n_rows * N_CLASSES * LOGIT, n_rows * N_CLASSES / ranks * LOGIT
        gathered = slice_ + whole + 2 * whole  # sent, written as it comes; then a step's read and write
        spread = 3 * slice_  # read, read again once the others' sums are there, and the gradient written
        sums = n_rows * LOSS * SUM * ranks
        rows.append([ranks, *map(megabytes, (whole, gathered, slice_, spread, sums))])
    return table(head, rows)


def on_a_mesh(n_rows: int, features: int) -> str:
    """Classes over the devices of a node, rows over the nodes: the bytes of a device do not grow with their number."""
    head = "devices", "rows in all", f"one all-gather, {FEWEST}", "three all-reduces", "normalizer", "input's gradient"
    rows = []
    for devices in DEVICES:
        nodes = devices // NODE
        ways = one_all_gather(n_rows, NODE, FEWEST), three_all_reduces(n_rows, NODE)
        normalizer = f"{all_reduce(8, nodes).n_bytes:.0f} B"
        gradient = all_reduce(n_rows * features * LOGIT, NODE)
        bytes_of = [megabytes(way.n_bytes) for way in (*ways, gradient)]
        rows.append([devices, f"{nodes * n_rows:,}", *bytes_of[:2], normalizer, bytes_of[2]])
    return table(head, rows)


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.2f} MB" if n_bytes < 1e7 else f"{n_bytes / 1e6:,.0f} MB"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines) + "\n"


def page(n_rows: int = 8192, features: int = 8192, latency: float = 5e-6, bandwidth: float = 50e9) -> str:
    """The tables, each behind the line that says what it is."""
    of = f"{n_rows:,} rows of {N_CLASSES:,} classes"
    link = f"a step of {latency * 1e6:g} µs and a link of {bandwidth / 1e9:g} GB/s"
    return "\n".join(
        [
            f"On the wire, in and out of each device, a step of {of}:\n",
            on_the_wire(n_rows),
            f"Steps one after another in rings; and the rows below which one all-gather of {FEWEST} is sooner done, at "
            f"{link}:\n",
            messages(latency, bandwidth),
            "On the chip, each device, forward and backward:\n",
            on_the_chip(n_rows),
            f"Classes over {NODE} devices, {n_rows:,} rows to each {NODE}; the input's gradient is of {features:,} "
            "features in bfloat16, all-reduced:\n",
            on_a_mesh(n_rows, features),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bytes and messages of a loss whose classes are spread over devices.")
    parser.add_argument("--rows", dest="n_rows", type=int, default=8192, help="rows that the devices share")
    parser.add_argument("--features", type=int, default=8192, help="of the hidden states")
    parser.add_argument("--latency", type=float, default=5e-6, help="of a step, in seconds")
    parser.add_argument("--bandwidth", type=float, default=50e9, help="of a link in one direction, in bytes a second")
    print(page(**vars(parser.parse_args())), end="")

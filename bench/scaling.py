"""Bytes and messages of a loss whose classes are spread over devices: python bench/scaling.py prints docs/scaling.md's
tables. Everything here is computed from formulas, nothing is measured.

P devices share the classes of the same n rows: each has n * V / P logits. A ring moves, in and out of each device,

    all-gather of b bytes from each device        (P - 1) * b            in P - 1 steps
    all-reduce of b bytes                         2 * (P - 1) / P * b    in 2 * (P - 1) steps
    reduce-scatter of b bytes                     (P - 1) / P * b        in P - 1 steps

Thakur, Rabenseifner and Gropp (2005), "Optimization of collective communication operations in MPICH"; Patarasuk and
Yuan (2009), "Bandwidth optimal all-reduce algorithms for clusters of workstations". With trees and recursive doubling
the steps are log2(P) for P - 1; the bytes stay, or grow.
"""

import argparse
import math
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
    collectives: int

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        return Traffic(self.n_bytes + other.n_bytes, self.steps + other.steps, self.collectives + other.collectives)


def all_gather(n_bytes: float, ranks: int) -> Traffic:
    """Of so many bytes from each."""
    return Traffic((ranks - 1) * n_bytes, ranks - 1, 1)


def reduce_scatter(n_bytes: float, ranks: int) -> Traffic:
    """Of so many bytes that each has."""
    return Traffic((ranks - 1) / ranks * n_bytes, ranks - 1, 1)


def all_reduce(n_bytes: float, ranks: int) -> Traffic:
    """Of so many bytes that each has: a reduce-scatter, and an all-gather of what it leaves on each."""
    both = reduce_scatter(n_bytes, ranks) + all_gather(n_bytes / ranks, ranks)
    return both._replace(collectives=1)


def gathered_logits(n_rows: float, ranks: int) -> Traffic:
    return all_gather(n_rows * N_CLASSES / ranks * LOGIT, ranks)


def three_all_reduces(n_rows: float, ranks: int) -> Traffic:
    """The maximum, the sum of exponentials, and the target's logit of each row."""
    one = all_reduce(n_rows * SUM, ranks)
    return one + one + one


def one_all_gather(n_rows: float, ranks: int, numbers: int) -> Traffic:
    return all_gather(n_rows * numbers * SUM, ranks)


def break_even(ranks: int, numbers: int, latency_times_bandwidth: float, trees: bool) -> float:
    """Rows below which one all-gather takes less time than three all-reduces, at latency + bytes / bandwidth a step:

    steps * latency + bytes / bandwidth is the same for both.
    """
    fewer, more = one_all_gather(1, ranks, numbers), three_all_reduces(1, ranks)
    each = math.log2(ranks) / (ranks - 1) if trees else 1.0
    return (more.steps - fewer.steps) * each * latency_times_bandwidth / (fewer.n_bytes - more.n_bytes)


def on_the_wire(n_rows: int) -> list[list[str]]:
    head = "devices", "logits gathered", "three all-reduces", *(f"one all-gather, {k}" for k in (FEWEST, LOSS, STATS))
    rows = [list(head)]
    for ranks in DEVICES:
        ours = (one_all_gather(n_rows, ranks, k) for k in (FEWEST, LOSS, STATS))
        ways = gathered_logits(n_rows, ranks), three_all_reduces(n_rows, ranks), *ours
        rows.append([str(ranks), *(megabytes(way.n_bytes) for way in ways)])
    return rows


def messages(latency: float, bandwidth: float) -> list[list[str]]:
    head = "devices", "steps: one all-gather", "three all-reduces", "rows, in rings", "rows, in trees"
    rows = [list(head)]
    for ranks in DEVICES:
        steps = one_all_gather(1, ranks, FEWEST).steps, three_all_reduces(1, ranks).steps
        even = (break_even(ranks, FEWEST, latency * bandwidth, trees) for trees in (False, True))
        rows.append([str(ranks), *map(str, steps), *(f"{round(n, -2):,.0f}" for n in even)])
    return rows


def on_the_chip(n_rows: int) -> list[list[str]]:
    """What a device holds, and what its memory moves, of logits and their gradient; and of what is exchanged."""
    head = "devices", "logits held, gathered", "moved", "logits held, spread", "moved", f"of {LOSS} numbers gathered"
    rows = [list(head)]
    for ranks in DEVICES:
        whole, slice_ = n_rows * N_CLASSES * LOGIT, n_rows * N_CLASSES / ranks * LOGIT
        gathered = slice_ + whole + 2 * whole  # sent, written as it comes; then a step's read and write
        spread = 3 * slice_  # read, read again once the others' sums are there, and the gradient written
        sums = n_rows * LOSS * SUM * ranks
        rows.append([str(ranks), *map(megabytes, (whole, gathered, slice_, spread, sums))])
    return rows


def on_a_mesh(n_rows: int, features: int) -> list[list[str]]:
    """Classes over the devices of a node, rows over the nodes: the bytes of a device do not grow with their number."""
    head = "devices", "rows in all", f"one all-gather, {FEWEST}", "three all-reduces", "normalizer", "input's gradient"
    rows = [list(head)]
    for devices in DEVICES:
        nodes = devices // NODE
        ways = (
            one_all_gather(n_rows, NODE, FEWEST).n_bytes,
            three_all_reduces(n_rows, NODE).n_bytes,
        )
        gradient = all_reduce(n_rows * features * LOGIT, NODE).n_bytes
        normalizer = f"{all_reduce(8, nodes).n_bytes:.0f} B"
        cells = *map(megabytes, ways), normalizer, megabytes(gradient)
        rows.append([str(devices), f"{nodes * n_rows:,}", *cells])
    return rows


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.2f} MB" if n_bytes < 1e7 else f"{n_bytes / 1e6:,.0f} MB"


def table(rows: list[list[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---:"] * len(head), *rest]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def page(n_rows: int = 8192, features: int = 8192, latency: float = 5e-6, bandwidth: float = 50e9) -> str:
    """The tables, each behind the line that says what it is."""
    of = f"{n_rows:,} rows of {N_CLASSES:,} classes"
    link = f"a step of {latency * 1e6:g} µs and a link of {bandwidth / 1e9:g} GB/s"
    return "\n".join(
        [
            f"On the wire, in and out of each device, a step of {of}:\n",
            table(on_the_wire(n_rows)),
            f"Steps one after another in rings; and the rows below which one all-gather of {FEWEST} is sooner done, at "
            f"{link}:\n",
            table(messages(latency, bandwidth)),
            "On the chip, each device, forward and backward:\n",
            table(on_the_chip(n_rows)),
            f"Classes over {NODE} devices, {n_rows:,} rows to each {NODE}; the input's gradient is of {features:,} "
            "features in bfloat16, all-reduced:\n",
            table(on_a_mesh(n_rows, features)),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bytes and messages of a loss whose classes are spread over devices.")
    parser.add_argument("--rows", type=int, default=8192, help="rows that the devices share")
    parser.add_argument("--features", type=int, default=8192, help="of the hidden states")
    parser.add_argument("--latency", type=float, default=5e-6, help="of a step, in seconds")
    parser.add_argument("--bandwidth", type=float, default=50e9, help="of a link in one direction, in bytes a second")
    given = parser.parse_args()
    print(page(given.rows, given.features, given.latency, given.bandwidth), end="")

"""What the compiled kernels execute: python bench/executed.py prints it as a table.

The PTX that Triton compiles for sm_90 runs on a CPU, every thread of it (tests/ptx). Counted are its instructions, the
32-byte sectors that warps access, the sectors that have to come from memory or go there (each once), and the passes
over the banks of shared memory beyond the fewest. Beside them is what bench/codegen.py counts in the machine code,
without running it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for folder in ("kernels", "tests", "."):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch

from bench.codegen import per_value
from emulated_cases import CASES, Case, outputs

HEAD = (
    "| case | kernel | instructions a value | special | machine code | sectors a load | a store | sectors a value "
    "| bytes from memory | to memory | bank conflicts |"
)
ROWS = "narrow_rows.narrow_rows_kernel", "narrow_rows.small_batch_kernel", "wide_row.wide_row_kernel"
WHY = """
Of each case the kernels that work on rows. A value is one of the matrix of logits; bytes are multiples of its bytes.
Special instructions are those of the units for exponentials and reciprocals.

The machine code has another number of instructions than are executed here, because

* ptxas makes fewer of PTX: moves vanish, a product and a sum become one, offsets become part of an access;
* of wide rows every path through a chunk is counted there: one without an end of its row or the target skips some;
* what is computed once a row weighs more where a row has few values, or a tile has more columns than the row: threads
  beyond its end go through the same instructions, and are counted here where no branch skips them.

An access that is aligned and of neighbours takes 4 sectors of 4 bytes a thread, 16 of 16; one more where its row starts
within a sector. A wide row is loaded twice, but for what stays in registers, and comes from memory once.
"""


def rows(name: str, case: Case) -> Iterator[list[str]]:
    from offline import opcodes
    from ptx.emulated import Emulated

    with Emulated(case.arch) as launches:
        outputs(case._replace(ignored=False), "ours")
    values = case.n_rows * case.n_cols
    for launch in launches:
        if launch.name not in (*ROWS, "softmax.softmax_backward_kernel"):
            continue
        totals = launch.report.totals()
        static: dict[str, Any] = {"kernel": launch.name, "constants": launch.constants, "n_cols": case.n_cols}
        static["threads"] = launch.report.kernel.threads
        in_code = per_value(static, *opcodes(launch.code))
        sectors = totals["load_sectors"] + totals["store_sectors"]
        yield [
            name,
            launch.name.split(".")[1].removesuffix("_kernel"),
            f"{totals['instructions'] / values:.1f}",
            f"{totals['special'] / values:.2f}",
            "" if in_code is None else f"{in_code['issue']:.1f}",
            f"{totals['load_sectors'] / max(1, totals['loads']):.1f}",
            f"{totals['store_sectors'] / max(1, totals['stores']):.1f}",
            f"{sectors / values:.3f}",
            f"{totals['bytes_from_memory'] / (values * case.dtype.itemsize):.2f}",
            f"{totals['bytes_to_memory'] / (values * case.dtype.itemsize):.2f}",
            str(totals["bank_conflicts"]),
        ]


def main() -> None:
    import triton

    torch.set_num_threads(1)
    print("Made by `python bench/executed.py`.\n")
    print(f"PTX for sm_90, but where a case says another; triton {triton.__version__}.")
    print(WHY)
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    for name, case in CASES.items():
        for cells in rows(name, case):
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

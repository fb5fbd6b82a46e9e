"""What the compiler makes of the peers' kernels beside ours, without a GPU: python bench/peers_code.py [cuda:90]

A step of each contender whose kernels are Triton's runs its own host code, on tensors of zeros; its launches are
compiled as `tests/offline.py` compiles ours, and none runs. Instructions a value are counted in the code: those of a
loop, which is run until the row's end, for the values of a block, and all others for the row. They are an upper bound
where code is skipped, as for rows that are ignored, or where the compiler unrolled a loop.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for folder in ("kernels", "tests", "."):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch

from bench import codegen, contenders, pretend
from bench.cases import Case, Inputs
from bench.contenders import Contender, Unsupported
from bench.work import Work

WIDTHS = (10, 1000, 32000, 50257, 128256)
N_ROWS = 600
NOTE = "Loads and stores: of 16 bytes + narrower ones. Asynchronous copies, as of pipelined loops, are not among them."
COLUMNS = ("n_cols", "dtype", "contender", "kernel", "block", "threads", "registers", "spilled", "loads", "stores")


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", nargs="?", default="cuda:90")
    target = parser.parse_args().target
    print(f"triton {triton.__version__}, torch {torch.__version__.split('+')[0]}, for {target}\n")
    for op, mode in (("cross_entropy", "step"), ("softmax", "forward")):
        found, reasons = pretend.peers(op)
        ours = contenders.load("softxent" if op == "cross_entropy" else "softxent-softmax", "cpu")
        print(*pretend.versions({ours.name: ours} | found, reasons), sep="\n")
        print(f"\n## {op}, {mode}\n\n{NOTE}\n")
        print("| " + " | ".join(COLUMNS) + " | instructions a value |\n|" + "---|" * (len(COLUMNS) + 1))
        for n_cols in WIDTHS if op == "cross_entropy" else WIDTHS[:-1]:
            for dtype in ("bfloat16", "float32"):
                case = Case(op, N_ROWS, n_cols, dtype, mode)
                for contender in (ours, *found.values()):
                    for cells in compiled(contender, case, target, ours=contender is ours):
                        print("| " + " | ".join(map(str, (n_cols, dtype, contender.name, *cells))) + " |", flush=True)
        print()


def compiled(contender: Contender, case: Case, target: str, ours: bool) -> Iterator[tuple[object, ...]]:
    """The cells of each kernel that a step launches on logits, after its name."""
    from offline import Offline

    backend, arch = target.split(":")
    with nullcontext() if ours else pretend.gpu(), Offline(backend, int(arch)) as kernels:
        try:
            work = Work(contender, case)
        except Unsupported as error:
            yield (str(error), *[""] * 7)
            return
        work.once(zeros(case))
    for kernel in kernels:
        row = kernel.as_dict() | {"n_cols": case.n_cols, "options": ""}
        if row["kernel"].startswith("mean."):  # ours: sums of a number a row, and the gradient's scale, which is 1
            continue
        code, loops = kernel.opcodes()
        if ours:
            by_pipe = codegen.per_value(row, code, loops)
            values = None if by_pipe is None else by_pipe["issue"]
        else:
            values = per_value(row, len(code), sum(map(len, loops)))
        block = next((row["constants"][key] for key in BLOCKS if key in row["constants"]), "")
        yield (
            *(row["kernel"].removesuffix("_kernel"), block, row["threads"], row["registers"]),
            row["spill_bytes"] + row["stack_bytes"],
            f"{row['wide_loads']} + {row['loads'] - row['wide_loads']}",
            f"{row['wide_stores']} + {row['stores'] - row['wide_stores']}",
            "" if values is None else f"{values:.1f}",
        )


BLOCKS = ("BLOCK_SIZE", "BLOCK_N", "N_COLS", "BLOCK")


def zeros(case: Case) -> Inputs:
    logits = torch.zeros(case.n_rows, case.n_cols, dtype=case.torch_dtype, requires_grad=case.mode != "forward")
    gradient = torch.ones(logits.shape if case.op == "softmax" else (), dtype=logits.dtype)
    return Inputs(logits, torch.zeros(case.n_rows, dtype=torch.int64), gradient)


def per_value(row: dict[str, Any], instructions: int, looped: int) -> float | None:
    """Instructions for each value of a row; None for a kernel that works on no block of it."""
    block = row["constants"].get("BLOCK_SIZE", row["constants"].get("BLOCK"))
    if block is None:
        return None
    blocks = -(-row["n_cols"] // block)
    looped = looped if blocks > 1 else 0
    # a program for each block of a row has no loop; then all of it is done for each block
    instructions = looped * blocks + (instructions - looped) * (1 if looped else blocks)
    return float(instructions * row["threads"] / row["n_cols"])


if __name__ == "__main__":
    main()

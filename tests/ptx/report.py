"""What a launch did: faults, and counts by instruction."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from .text import Kernel

Counts = np.ndarray[Any, np.dtype[np.int64]]
SPECIAL = ("ex2.", "rcp.", "div.full", "div.f")  # of the units that make approximations


class Fault(NamedTuple):
    kind: str
    detail: str
    instructions: tuple[int, ...]


class Report:
    def __init__(self, kernel: Kernel) -> None:
        n = len(kernel.code)
        self.kernel = kernel
        self.counted: Counter[Fault] = Counter()
        self.issued = np.zeros(n, np.int64)  # by instruction: warps
        self.lanes = np.zeros(n, np.int64)  # threads, but for those whose predicate is false
        self.sectors = np.zeros(n, np.int64)  # of global memory
        self.wanted = np.zeros(n, np.int64)  # bytes asked of it
        self.passes = np.zeros(n, np.int64)  # over the banks of shared memory
        self.bytes_from_memory = self.bytes_to_memory = 0  # sectors that were touched, once each
        self.needed = np.zeros(n, np.int64)  # the passes if no two words were in one bank

    def fault(self, kind: str, detail: str, instructions: list[int], times: int) -> None:
        self.counted[Fault(kind, detail, tuple(instructions))] += times

    @property
    def faults(self) -> list[str]:
        """kind: what, how many times [where]"""
        return [
            f"{fault.kind}: {fault.detail}, {times} times ["
            + "; ".join(f"{self.kernel.code[i].source} {self.kernel.code[i].text}" for i in fault.instructions)
            + "]"
            for fault, times in self.counted.items()
        ]

    @property
    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.counted}

    def totals(self) -> dict[str, int]:
        """Of the launch."""

        def of(counts: Counts, *opcodes: str) -> int:
            return int(sum(n for n, i in zip(counts, self.kernel.code, strict=True) if i.opcode.startswith(opcodes)))

        return {
            "instructions": int(self.lanes.sum()),
            "warp_instructions": int(self.issued.sum()),
            "special": of(self.lanes, *SPECIAL),
            "loads": of(self.lanes_of_warps(), "ld.global"),
            "stores": of(self.lanes_of_warps(), "st.global"),
            "load_sectors": of(self.sectors, "ld.global"),
            "store_sectors": of(self.sectors, "st.global"),
            "load_bytes": of(self.wanted, "ld.global"),
            "store_bytes": of(self.wanted, "st.global"),
            "bytes_from_memory": self.bytes_from_memory,
            "bytes_to_memory": self.bytes_to_memory,
            "bank_passes": int(self.passes.sum()),
            "bank_conflicts": int((self.passes - self.needed).sum()),
            "barriers": of(self.issued, "bar."),
            "shuffles": of(self.issued, "shfl.", "redux."),
        }

    def lanes_of_warps(self) -> Counts:
        """Warps of which some thread takes part."""
        return np.where(self.lanes > 0, self.issued, 0)

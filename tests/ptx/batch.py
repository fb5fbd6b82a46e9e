"""Some programs of a launch, run together: their registers, and which of their threads an instruction is of."""

from typing import Any

import numpy as np

from .formats import NAN, RAW, TYPES, Array
from .report import Report
from .text import Instruction, Kernel

WARP = 32
ALL_LANES = 0xFFFFFFFF


class Stop(Exception):
    """Execution cannot go on after this fault."""


class Batch:
    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], first: int, count: int, seed: int) -> None:
        self.kernel = kernel
        self.random = np.random.default_rng((seed, first))
        self.reverse = seed % 2 == 1  # of stores at once the first stays
        self.programs, self.n = count, count * kernel.threads
        number = np.arange(self.n)
        self.program = number // kernel.threads  # within the batch
        self.thread = first * kernel.threads + number  # of the launch
        within = number % kernel.threads
        self.lane = within % WARP
        self.warp = self.program * -(-kernel.threads // WARP) + within // WARP
        self.warps = count * -(-kernel.threads // WARP)
        self.lanes_there = self._by_warp(np.arange(self.n))
        index = first + self.program
        x, y, z = grid
        special = {
            "%tid.x": within, "%tid.y": 0, "%tid.z": 0, "%ntid.x": kernel.threads, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": index % x, "%ctaid.y": index // x % y, "%ctaid.z": index // (x * y), "%nctaid.x": x,
            "%nctaid.y": y, "%nctaid.z": z, "%laneid": self.lane,
        }  # fmt: skip
        self.special = {name: np.broadcast_to(np.asarray(value, np.uint32), self.n) for name, value in special.items()}
        self.registers: dict[str, Array] = {}
        self.epoch = np.zeros(self.n, np.int32)  # barriers that a thread has passed
        self.active: Array | None = None  # the threads that an instruction is of; None: all
        self.now: Instruction = kernel.code[0]
        self.spaces: dict[str, Any] = {}  # Memory
        self.report: Report

    @property
    def threads(self) -> Array:
        """The active ones."""
        return np.arange(self.n) if self.active is None else self.active

    def of_active(self, values: Array) -> Array:
        return values if self.active is None else values[self.active]

    def full(self, values: Array) -> Array:
        """A value for each active thread."""
        return values if len(values) > 1 else np.broadcast_to(values, len(self.threads))

    def get(self, name: str) -> Array:
        """A register's bits in the active threads."""
        values = self.special.get(name)
        if values is None:
            values = self.registers.get(name)
        if values is None:
            values = self.registers[name] = self._noise(name)
        return self.of_active(values)

    def put(self, name: str, bits: Array) -> None:
        if self.active is None:
            self.registers[name] = bits if len(bits) == self.n else np.full(self.n, bits[0])
            return
        before = self.registers.get(name)
        after = self._noise(name) if before is None else before.copy()  # which others may hold too
        after[self.active] = bits
        self.registers[name] = after

    def _noise(self, name: str) -> Array:
        size = TYPES[self.kernel.registers[name]].size
        noise = self.random.integers(0, 256, self.n * max(1, size), np.uint8)
        return noise.view(RAW[size]) if size else (noise & 1).astype(bool)

    def fault(self, kind: str, detail: str, times: int) -> None:
        self.report.fault(kind, detail, [self.now.index], times)

    def _by_warp(self, threads: Array) -> Array:
        bits = np.zeros(self.warps, np.uint32)
        np.bitwise_or.at(bits, self.warp[threads], np.uint32(1) << self.lane[threads].astype(np.uint32))
        return bits

    def meet(self, mask: int) -> None:
        """All lanes of a warp that an exchange's mask names have to be at it, and no others."""
        if self.active is None and mask == ALL_LANES:
            return
        there = self._by_warp(self.threads)
        wanted = self.lanes_there & np.uint32(mask)
        wrong = (there != 0) & (there != wanted)
        if wrong.any():
            self.fault("absent", f"lanes of the mask {mask:#x}", int(wrong.sum()))


def canonical(bits: Array, kind: str) -> Array:
    """A result of arithmetic as integers see it: every NaN is the same."""
    values = np.ascontiguousarray(bits).view(np.float32 if kind == "f32" else np.float64)
    nan = np.isnan(values)
    if not nan.any():
        return bits
    out: Array = np.where(nan, NAN[kind], values.view(NAN[kind].dtype)).view(bits.dtype)
    return out

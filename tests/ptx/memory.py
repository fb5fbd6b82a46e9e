"""Global memory, which is the tensors of a launch, and the shared memory of its programs; what is checked and counted.

A tensor's addresses are made up, 2^40 apart, so that none is reached past the end of another. Each access is logged,
and races.py looks through the log.
"""

from typing import NamedTuple

import numpy as np

from .batch import WARP, Batch, Stop
from .formats import RAW, Array

SECTOR, BANKS, WORD = 32, 32, 4  # bytes of a sector, and of a word in a bank
APART = 40  # address bits of a region


class Access(NamedTuple):
    """One instruction's accesses, of the threads that took part."""

    instruction: int
    at: Array  # offset
    width: int  # bytes of a value
    values: int  # side by side
    thread: Array  # of the launch
    epoch: Array  # barriers before
    written: list[Array] | None  # raw values


class Region:
    """Memory that a launch may access: bytes, from the first of them. They start at a multiple of 16."""

    def __init__(self, name: str, base: int, data: Array, first: int = 0) -> None:
        assert base % 16 == 0  # as large as accesses are: their offsets are multiples of their sizes too
        self.name, self.base, self.data, self.first = name, base, data, first
        sectors = (base % SECTOR + len(data) + SECTOR - 1) // SECTOR
        self.loaded, self.stored = np.zeros(sectors, bool), np.zeros(sectors, bool)
        self.log: list[Access] = []


class Memory:
    """A state space: load and store `count` values of `width` bytes a thread, which have to align together."""

    def load(self, batch: Batch, address: Array, width: int, count: int) -> list[Array]:
        raise NotImplementedError

    def store(self, batch: Batch, address: Array, width: int, values: list[Array]) -> None:
        raise NotImplementedError

    @staticmethod
    def align(batch: Batch, address: Array, size: int) -> None:
        wrong = (address & (size - 1)) != 0
        if wrong.any():
            batch.fault("alignment", f"of {size} bytes", int(wrong.sum()))
            raise Stop


def put_in_order(batch: Batch, memory: Array, at: Array, values: list[Array]) -> None:
    """Where threads store to one place, the last stays, or the first."""
    for k, value in enumerate(values):
        if batch.reverse:
            memory[(at + k)[::-1]] = value[::-1]
        else:
            memory[at + k] = value


class Global(Memory):
    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions

    def load(self, batch: Batch, address: Array, width: int, count: int) -> list[Array]:
        out = [np.zeros(len(address), RAW[width]) for _ in range(count)]
        for region, which, at in self._find(batch, address, width * count):
            memory = _words(region.data, width)
            for k in range(count):
                out[k][which] = memory[at // width + k]
            region.loaded[(at + region.base % SECTOR) // SECTOR] = True
            self._log(batch, region, which, at, width, count, None)
        return out

    def store(self, batch: Batch, address: Array, width: int, values: list[Array]) -> None:
        for region, which, at in self._find(batch, address, width * len(values)):
            given = [value[which] for value in values]
            put_in_order(batch, _words(region.data, width), at // width, given)
            region.stored[(at + region.base % SECTOR) // SECTOR] = True
            self._log(batch, region, which, at, width, len(values), given)

    def _find(self, batch: Batch, address: Array, size: int) -> list[tuple[Region, Array | slice, Array]]:
        """The regions, which of the accesses go there, and where. Those that go nowhere are left out."""
        self.align(batch, address, size)
        self._count(batch, address, size)
        number = address >> APART
        found: list[tuple[Region, Array | slice, Array]] = []
        left = len(address)
        for one in np.unique(number) if (number != number[0]).any() else number[:1]:
            region = next((region for region in self.regions if region.base >> APART == one), None)
            if region is None:
                continue
            at = address - region.base
            inside = (number == one) & (at >= region.first) & (at + size <= len(region.data))
            whole = bool(inside.all())
            left -= int(inside.sum())
            if inside.any():
                found.append((region, slice(None) if whole else inside, at if whole else at[inside]))
        if left:
            batch.fault("bounds", f"{size} bytes of global memory", left)
        return found

    @staticmethod
    def _count(batch: Batch, address: Array, size: int) -> None:
        """Sectors by warps; an aligned access of at most a sector touches one."""
        if batch.active is None and batch.kernel.threads % WARP == 0:
            rows = (address // SECTOR).reshape(-1, WARP)
            rows = np.sort(rows, axis=1) if (rows[:, 1:] < rows[:, :-1]).any() else rows
            n = len(rows) + int((rows[:, 1:] != rows[:, :-1]).sum())
        else:
            n = len(np.unique(np.stack([batch.of_active(batch.warp), address // SECTOR]), axis=1)[0])
        batch.report.sectors[batch.now.index] += n
        batch.report.wanted[batch.now.index] += len(address) * size

    @staticmethod
    def _log(
        batch: Batch,
        region: Region,
        which: Array | slice,
        at: Array,
        width: int,
        count: int,
        written: list[Array] | None,
    ) -> None:
        threads = batch.threads[which]
        access = Access(batch.now.index, at, width, count, batch.thread[threads], batch.epoch[threads], written)
        region.log.append(access)


class Shared(Memory):
    """Of each program its own. It is noise before it is written."""

    def __init__(self, batch: Batch, size: int) -> None:
        self.size, self.stride = size, -(-max(size, 1) // 16) * 16
        self.data = batch.random.integers(0, 256, batch.programs * self.stride, np.uint8)
        self.written = np.zeros(len(self.data), bool)
        self.log: list[Access] = []

    def load(self, batch: Batch, address: Array, width: int, count: int) -> list[Array]:
        at = self._find(batch, address, width * count)
        memory, written = self.data.view(RAW[width]), self.written.view(RAW[width])
        known = np.frombuffer(b"\1" * width, RAW[width])[0]
        unwritten = sum((written[at // width + k] != known for k in range(count)), np.zeros(len(at), bool))
        if unwritten.any():
            batch.fault("unwritten", "shared memory is read", int(unwritten.sum()))
        self._log(batch, at, width, count, None)
        return [memory[at // width + k] for k in range(count)]

    def store(self, batch: Batch, address: Array, width: int, values: list[Array]) -> None:
        at = self._find(batch, address, width * len(values))
        put_in_order(batch, self.data.view(RAW[width]), at // width, values)
        for k in range(width * len(values)):
            self.written[at + k] = True
        self._log(batch, at, width, len(values), values)

    def _find(self, batch: Batch, address: Array, size: int) -> Array:
        self.align(batch, address, size)
        outside = (address < 0) | (address + size > self.size)
        if outside.any():
            batch.fault("bounds", f"{size} bytes of shared memory", int(outside.sum()))
            raise Stop
        self._count(batch, address, size)
        offset: Array = address + batch.of_active(batch.program) * self.stride
        return offset

    @staticmethod
    def _count(batch: Batch, address: Array, size: int) -> None:
        """Passes: the most different words of one bank. 8 bytes a thread are served by halves of a warp, 16 by
        quarters."""
        parts = max(1, size // WORD)
        group = batch.of_active(batch.warp) * parts + batch.of_active(batch.lane) // (WARP // parts)
        group, place = np.unique(np.stack([group, address // (parts * WORD)]), axis=1)  # aligned: of as many banks each
        _, in_bank = np.unique(group * BANKS + place % (BANKS // parts), return_inverse=True)
        most = np.zeros(int(group.max()) + 1, np.int64)
        np.maximum.at(most, group, np.bincount(in_bank)[in_bank])
        batch.report.passes[batch.now.index] += int(most.sum())
        batch.report.needed[batch.now.index] += int((most > 0).sum())

    def _log(self, batch: Batch, at: Array, width: int, count: int, written: list[Array] | None) -> None:
        thread, epoch = batch.of_active(batch.thread), batch.of_active(batch.epoch)
        self.log.append(Access(batch.now.index, at, width, count, thread, epoch, written))


def _words(data: Array, width: int) -> Array:
    return data[: len(data) // width * width].view(RAW[width])

"""A launch: the programs of a grid, a batch at a time; warps, barriers, and threads that go different ways."""

from collections.abc import Sequence

import numpy as np

from . import exchange, transfers  # noqa: F401, whose instructions are listed in FORMS
from .batch import Batch, Stop
from .formats import RAW, TYPES, Array
from .instructions import BARRIER, EXIT, Step, decode
from .memory import SECTOR, Global, Region, Shared
from .operands import Machine
from .races import find_races
from .report import Report
from .text import Kernel, Unmodelled

BATCH = 8192  # threads
MOST_STEPS = 1_000_000  # of a batch: beyond, it will not end


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    arguments: Sequence[Array],  # raw bits [1], addresses among them
    regions: list[Region],
    shared_bytes: int = 0,
    seed: int = 0,
) -> Report:
    """Runs the kernel on the regions' memory. A fault after which a GPU could not go on ends the launch."""
    if len(arguments) != len(kernel.parameters):
        raise Unmodelled(f"{len(arguments)} arguments for {len(kernel.parameters)} parameters")
    parameters = dict(zip(kernel.parameters, arguments, strict=True))
    for name, bits in parameters.items():
        if bits.dtype != RAW[TYPES[kernel.parameters[name]].size]:
            raise Unmodelled(f"an argument of {bits.dtype} for {kernel.parameters[name]} {name}")
    machine = Machine(kernel, parameters)
    steps = [decode(machine, instruction) for instruction in kernel.code]
    for instruction in kernel.code:
        if instruction.guard and kernel.registers.get(instruction.guard[0]) != "pred":
            raise Unmodelled(instruction.text)
    x, y, z = (*grid, 1, 1)[:3]
    report, memory = Report(kernel), Global(regions)
    at_once = max(1, BATCH // kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, x * y * z, at_once):
            batch = Batch(kernel, (x, y, z), first, min(at_once, x * y * z - first), seed)
            shared = Shared(batch, shared_bytes)
            batch.report, batch.spaces = report, {"global": memory, "shared": shared}
            try:
                Schedule(batch, steps).run()
            except Stop:
                break
            find_races(report, shared.log, "shared memory")
        for region in regions:
            find_races(report, region.log, region.name)
    report.bytes_from_memory = SECTOR * sum(int(region.loaded.sum()) for region in regions)
    report.bytes_to_memory = SECTOR * sum(int(region.stored.sum()) for region in regions)
    return report


class Schedule:
    """Which threads of a batch go on, and where."""

    def __init__(self, batch: Batch, steps: list[Step]) -> None:
        self.batch, self.steps, self.end = batch, steps, len(steps)
        self.meeting = set(batch.kernel.labels.values())  # where others may come from elsewhere
        self.at = np.zeros(batch.n, np.int64)  # the next instruction of each thread
        self.waiting = np.zeros(batch.n, bool)  # at a barrier
        self.taken = 0

    def run(self) -> None:
        while True:
            ready = ~self.waiting & (self.at < self.end)
            if ready.any():
                first = int(self.at[ready].min())
                self._go_on(first, np.flatnonzero(ready & (self.at == first)))
            elif self.waiting.any():
                self._release()
            else:
                return

    def _go_on(self, pc: int, group: Array) -> None:
        """These threads, which are together, until they part, or others may join them."""
        batch, report = self.batch, self.batch.report
        together = len(group) == batch.n
        everyone = None if together else group
        warps = batch.warps if together else len(np.unique(batch.warp[group]))
        while True:
            batch.now, batch.active = batch.kernel.code[pc], everyone
            took = self._guarded(group, everyone)
            report.issued[pc] += warps
            report.lanes[pc] += took
            result = self.steps[pc](batch) if took else None
            pc += 1
            self.taken += 1
            if self.taken > MOST_STEPS:
                batch.fault("endless", f"after {MOST_STEPS} instructions", 1)
                raise Stop
            if result is None:
                if pc < self.end and (together or pc not in self.meeting):
                    continue
            elif together and took == batch.n and result != EXIT:  # all of the batch
                if result == BARRIER:
                    batch.epoch = batch.epoch + 1
                else:
                    pc = result
                if pc < self.end:
                    continue
                result = None
            self.at[group] = pc
            if result == BARRIER:
                self.waiting[batch.threads] = True
            elif result is not None:
                self.at[batch.threads] = self.end if result == EXIT else result
            return

    def _guarded(self, group: Array, everyone: Array | None) -> int:
        """How many of the group the instruction is of, which become the active ones."""
        batch = self.batch
        if batch.now.guard is None:
            return len(group)
        name, negated = batch.now.guard
        true = batch.get(name) != negated
        took = int(np.count_nonzero(true))
        if took < len(group):
            batch.active = np.flatnonzero(true) if everyone is None else everyone[true]
        return took

    def _release(self) -> None:
        """Nobody goes on but from a barrier: all threads of a program have to be there, and at the same one."""
        batch = self.batch
        by_program = self.waiting.reshape(batch.programs, -1)
        places = self.at.reshape(batch.programs, -1)
        for waiting, at in zip(by_program, places, strict=True):
            if waiting.any() and (not waiting.all() or (at != at[0]).any()):
                first = int(at[waiting].min())
                batch.now = batch.kernel.code[first - 1]
                here = int((waiting & (at == first)).sum())
                batch.fault("barrier", f"reached by {here} of {len(at)} threads", 1)
        batch.epoch = batch.epoch + self.waiting
        self.waiting[:] = False

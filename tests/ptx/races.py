"""Accesses that nothing orders: of two threads to the same bytes, one of them a store, and no barrier between."""

from collections.abc import Sequence

import numpy as np

from .formats import RAW, Array
from .memory import Access
from .report import Report

NOBODY, SEVERAL = -1, -2
UNIT, PROGRAM, EPOCH, THREAD, STORE, INSTRUCTION, VALUE = range(7)  # rows of the table


def find_races(report: Report, log: Sequence[Access], where: str) -> None:
    if not any(access.written for access in log):
        return
    unit = min(access.width for access in log)  # bytes that are accessed together
    suspect = _accessed_by_several(log, unit)
    if not suspect.any():
        return
    table = np.concatenate([_rows(access, unit, suspect, report.kernel.threads) for access in log], axis=1)
    _judge(report, table, (UNIT,), PROGRAM, f"of programs in {where}")
    _judge(report, table, (UNIT, PROGRAM, EPOCH), THREAD, f"of a program's threads in {where}")


def _units(access: Access, unit: int) -> Array:
    """[threads, units]"""
    units: Array = access.at[:, None] // unit + np.arange(access.width * access.values // unit)
    return units


def _accessed_by_several(log: Sequence[Access], unit: int) -> Array:
    """Units that some thread stores to, and another accesses, at whatever time."""
    end = max(int(access.at.max()) + access.width * access.values for access in log) // unit + 1
    storing, loading = np.full(end, NOBODY), np.full(end, NOBODY)
    for access in log:
        by = storing if access.written else loading
        at = _units(access, unit)
        thread = np.broadcast_to(access.thread[:, None], at.shape)
        before = by[at]
        by[at] = np.where((before == NOBODY) | (before == thread), thread, SEVERAL)
        by[at[(by[at] != thread) & (by[at] != SEVERAL)]] = SEVERAL  # of this instruction's threads
    suspect: Array = (storing == SEVERAL) | ((storing != NOBODY) & (loading != NOBODY) & (loading != storing))
    return suspect


def _rows(access: Access, unit: int, suspect: Array, threads: int) -> Array:
    at = _units(access, unit)
    here = suspect[at]
    value = np.zeros(at.shape, np.uint64)
    if access.written:
        value = np.ascontiguousarray(np.stack(access.written, axis=1)).view(RAW[unit]).astype(np.uint64)
    thread, epoch = (np.broadcast_to(x[:, None], at.shape)[here] for x in (access.thread, access.epoch))
    n = len(thread)
    store, instruction = np.full(n, access.written is not None), np.full(n, access.instruction)
    return np.stack([at[here], thread // threads, epoch, thread, store, instruction, value[here].view(np.int64)])


def _judge(report: Report, table: Array, keys: tuple[int, ...], by: int, who: str) -> None:
    """A group, of the same keys, races where it is of several `by`, and something is stored: not if all of it stores
    one value, as copies of it do."""
    rows = table[:, np.lexsort([table[key] for key in (by, *reversed(keys))])]
    new = np.concatenate([[True], (rows[list(keys), 1:] != rows[list(keys), :-1]).any(0)])
    group = np.cumsum(new) - 1
    start = np.flatnonzero(new)

    def differs(row: int) -> Array:
        several: Array = np.maximum.reduceat(rows[row], start) != np.minimum.reduceat(rows[row], start)
        return several

    stores = np.add.reduceat(rows[STORE], start)
    all_store = stores == np.diff(np.append(start, len(group)))
    racing = differs(by) & (stores > 0) & (~all_store | differs(VALUE))
    at_once = all_store & ~differs(INSTRUCTION)
    for kind, which in (("conflict", racing & at_once), ("race", racing & ~at_once)):
        if which.any():
            first = np.unique(rows[INSTRUCTION, group == np.flatnonzero(which)[0]])
            report.fault(kind, who, [int(i) for i in first[:3]], int(which.sum()))

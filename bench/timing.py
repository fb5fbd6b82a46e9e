"""Contenders timed in turns: whatever slows the machine, its clocks or its neighbours, slows all of them alike.

On a GPU each has two figures. "graph": a CUDA graph of one call on each of several sets of inputs, together more than
three L2 caches, so that none is found there; nothing of the host is in it. "calls": the same calls, launched one by
one, host included. On a CPU there are calls, and only their ratios mean anything.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from bench.cases import Inputs
from bench.machine import CannotCapture, Machine
from bench.work import Run, Work, restore

MOST_SETS = 128  # of inputs: the smallest, as 256 x 10, stay in the cache nevertheless
FEWEST, MOST = 7, 50  # turns
TURN = 0.01  # seconds of a CPU's
LONG, FEW = 0.5, 3  # seconds of a turn that is too long for so many, and how many of it


@dataclass
class Contestant:
    """What is timed, once a turn: `before` without the clock, then `run`, which makes `calls` calls."""

    before: Run
    run: Run
    calls: int


@dataclass
class Timed:
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)  # as Measurement's, of one run
    not_captured: str | None = None  # why there is no graph


def sets_of(machine: Machine, bytes_of_one: int) -> int:
    """How many sets of inputs are more than three L2 caches, and no fewer than two where there is one."""
    if not machine.l2_bytes:
        return 1
    return max(2, min(MOST_SETS, 3 * machine.l2_bytes // max(1, bytes_of_one) + 1))


def contest(
    works: dict[str, Work], sets: Sequence[Inputs], machine: Machine, seconds: float, copy: Run | None = None
) -> dict[str, Timed]:
    """Every contender in turns, for about so many seconds each method. `copy` copies the logits of all sets."""
    found = {name: Timed() for name in works} | ({"copy": Timed()} if copy else {})
    given = (
        [inputs.logits.detach().clone() for inputs in sets]
        if any(w.contender.overwrites for w in works.values())
        else []
    )
    if machine.graphs:
        ready = {}
        for name, work in works.items():
            try:
                ready[name] = by_graph(work, sets, given, machine)
            except CannotCapture as error:
                found[name].not_captured = str(error)
        if copy and ready:
            ready["copy"] = Contestant(nothing, machine.capture(copy), len(sets))
        for name, times in in_turns(ready, machine, seconds).items():
            found[name].seconds["graph"] = [times]
        ready.clear()
    ready = {name: by_calls(work, sets, given, machine) for name, work in works.items()}
    if copy:
        ready["copy"] = Contestant(nothing, copy, len(sets))
    for name, times in in_turns(ready, machine, seconds).items():
        found[name].seconds["calls"] = [times]
    return found


def by_graph(work: Work, sets: Sequence[Inputs], given: Sequence[Tensor], machine: Machine) -> Contestant:
    """Raises CannotCapture."""
    if work.case.mode == "backward":  # its forward is outside, on another stream
        raise CannotCapture("backward alone is timed by calls")
    return Contestant(partial(restored, sets, given), machine.capture(partial(each, work, sets)), len(sets))


def by_calls(work: Work, sets: Sequence[Inputs], given: Sequence[Tensor], machine: Machine) -> Contestant:
    """Calls launched one by one: on each set, or as often as makes a time that a CPU's clock can tell."""
    if work.case.mode == "backward" or given or machine.graphs:
        states: list[Any] = []

        def before() -> None:
            restored(sets, given)
            states[:] = [work.prepare(inputs) for inputs in sets]

        def run() -> None:
            while states:
                work.run(states.pop(0))

        return Contestant(before, run, len(sets))
    once = min(machine.seconds(partial(work.once, sets[0])) for _ in range(5))  # one may be late
    calls = max(1, min(1000, int(TURN / max(once, 1e-6))))
    return Contestant(nothing, partial(repeat, partial(work.once, sets[0]), calls), calls)


def in_turns(contestants: dict[str, Contestant], machine: Machine, seconds: float) -> dict[str, list[float]]:
    """Seconds of one call of each, turn by turn; in each turn in another order. One round before the clock counts."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    start = time.perf_counter()
    one_turn(contestants, order, machine)
    one = time.perf_counter() - start
    fewest = FEWEST if one < LONG else FEW
    for _ in range(max(fewest, min(MOST, int(seconds / max(one, 1e-9))))) if contestants else ():
        shuffle(order)
        for name, taken in one_turn(contestants, order, machine).items():
            found[name].append(taken)
    return found


def one_turn(contestants: dict[str, Contestant], order: Sequence[str], machine: Machine) -> dict[str, float]:
    found = {}
    for name in order:
        contestants[name].before()
        found[name] = machine.seconds(contestants[name].run) / contestants[name].calls
    return found


def each(work: Work, sets: Sequence[Inputs]) -> None:
    for inputs in sets:
        work.once(inputs)


def repeat(run: Run, times: int) -> None:
    for _ in range(times):
        run()


def restored(sets: Sequence[Inputs], given: Sequence[Tensor]) -> None:
    """Before everyone's turn, where someone overwrites them."""
    for inputs, logits in zip(sets, given, strict=False):
        restore(inputs, logits)


def nothing() -> None:
    pass

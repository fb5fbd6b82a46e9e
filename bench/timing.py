"""Contenders timed in turns: whatever slows the machine, its clocks or its neighbours, slows all of them alike.

On a GPU each has two figures. "graph": a CUDA graph of one call on each of several sets of inputs, together more than
three L2 caches, so that none is found there; nothing of the host is in it. "calls": the same calls, launched one by
one, host included. On a CPU there are calls, and only their ratios mean anything.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from bench.cases import Inputs
from bench.machine import CannotCapture, Machine
from bench.results import Measurement
from bench.work import Run, Work, restore

MOST_SETS = 128  # of inputs: the smallest, as 256 x 10, stay in the cache nevertheless
CPU_BYTES = 1 << 21  # of inputs in turn on a CPU, so that one call on each takes long enough to be timed
FEWEST, MOST = 7, 50  # turns
TURN = 0.01  # seconds of a CPU's
LONG, FEW = 0.5, 3  # seconds of a turn that is too long for so many, and how many of it


@dataclass
class Contestant:
    """What is timed, once a turn: `before` without the clock, then `run`, which makes `calls` calls."""

    before: Run
    run: Run
    calls: int


def sets_of(machine: Machine, bytes_of_one: int) -> int:
    """How many sets of inputs are more than three L2 caches, and no fewer than two; of a CPU's large ones, one."""
    fewest, wanted = (2, 3 * machine.l2_bytes) if machine.graphs else (1, CPU_BYTES)
    return max(fewest, min(MOST_SETS, wanted // max(1, bytes_of_one) + fewest - 1))


def given_to(works: dict[str, Work], sets: Sequence[Inputs]) -> list[Tensor]:
    """The logits of the sets, to restore them where one of the contenders overwrites them; else none."""
    return [inputs.logits.detach().clone() for inputs in sets if any(work.overwrites for work in works.values())]


def contest(
    works: dict[str, Work], sets: Sequence[Inputs], machine: Machine, seconds: float, copy: Run
) -> dict[str, Measurement]:
    """Every contender in turns, for about so many seconds each method. `copy` copies the logits of all sets."""
    case = next(iter(works.values())).case
    found = {name: Measurement(case, name) for name in (*works, "copy")}
    given = given_to(works, sets)
    if machine.graphs:
        ready = {}
        for name, work in works.items():
            try:
                ready[name] = by_graph(work, sets, given, machine)
            except CannotCapture as error:
                found[name].not_captured = str(error)
        if ready:
            ready["copy"] = Contestant(nothing, machine.capture(copy), len(sets))
        for name, times in in_turns(ready, machine, seconds).items():
            found[name].seconds["graph"] = [times]
        ready.clear()
    ready = {name: by_calls(work, sets, given, machine) for name, work in works.items()}
    ready["copy"] = Contestant(nothing, copy, len(sets))
    for name, times in in_turns(ready, machine, seconds).items():
        found[name].seconds["calls"] = [times]
    return found


def by_graph(work: Work, sets: Sequence[Inputs], given: Sequence[Tensor], machine: Machine) -> Contestant:
    """Raises CannotCapture."""
    return Contestant(partial(restored, sets, given), machine.capture(partial(each, work, sets)), len(sets))


def by_calls(work: Work, sets: Sequence[Inputs], given: Sequence[Tensor], machine: Machine) -> Contestant:
    """Calls launched one by one: on each set, and as often as makes a time that a CPU's clock can tell."""
    rounds = 1
    if not machine.graphs and not work.overwrites:
        once = min(machine.seconds(partial(each, work, sets)) for _ in range(5))  # one may be late
        rounds = max(1, min(1000, int(TURN / max(once, 1e-6))))
    calls = [*sets] * rounds
    return Contestant(partial(restored, sets, given), partial(each, work, calls), len(calls))


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
        work.run(inputs)


def restored(sets: Sequence[Inputs], given: Sequence[Tensor]) -> None:
    """Before everyone's turn, where someone overwrites them."""
    for inputs, logits in zip(sets, given, strict=False):
        restore(inputs, logits)


def nothing() -> None:
    pass

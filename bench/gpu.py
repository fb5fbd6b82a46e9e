"""All there is to know of a GPU from one command that ends in time, and goes on where it was cut off.

    1  the first call of every contender at every case, which compiles: in as many processes as there are cores
    2  the suite: correct, timed, correct again                              results.json
    3  table and pictures                                                    table.md ...

Each case is timed for its share of what is left, none is begun that would not end in time, and one that hangs is ended
with the process. Each is written as soon as it is known, and the same command, again, does what is left. Nothing but
torch, triton, numpy and matplotlib is needed, nor anything installed. The kernels' tests: pytest --device cuda.

Exit status: 0 all done and right; 1 softxent was wrong; 3 time was up, run it again.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from bench import contenders, results, suite
from bench.cases import Case
from bench.doubts import doubts
from bench.machine import Cuda, Machine, Rehearsal
from bench.results import BadInput, Results
from bench.table import limit

RESERVE = 25.0  # seconds for table and pictures
GRACE = 10.0  # of them, for the case in hand when the time was up
FIRST = 0.5  # of the time, at most, for first calls
EACH = 10 << 30  # bytes of the device's memory that a process may need
MARK = "first: "  # before what a process found
ROOT = Path(__file__).parents[1]


def run(given: argparse.Namespace, machine: Machine, cases: list[Case], options: Sequence[str]) -> int:
    start = time.monotonic()
    deadline = start + 60 * given.minutes - min(RESERVE, 6 * given.minutes)
    path = given.out / "results.json"
    found = suite.begin(machine, path, given.contenders or contenders.REGISTRY)
    suite.introduce(found)
    cached_in_one_place(found.environment.setdefault("cache", secrets.token_hex(6)))
    first = found.environment.setdefault("first_calls", {})
    if len(found.cases()) < len(cases) and not first:
        first |= all_first_calls(machine, options, start + (deadline - start) * FIRST)
        print(f"{len(first)} first calls after {time.monotonic() - start:.0f} s; measuring")
    results.save(found, path)

    def end(found: Results, left: list[Case]) -> int:
        print(*conclusion(found, left), sep="\n")
        return 1 if any(wrong_of_ours(found)) else 3 if left else 0

    def unfinished(found: Results) -> list[Case]:
        return [case for case in cases if case not in found.cases()]

    def give_up() -> None:
        """Of a case that takes too long, or for ever: nothing else can end it. What is in the file stays."""
        status = 3
        try:
            kept = results.load(path)
            left = unfinished(kept)
            print(f"time is up, and this has not ended: {left[0] if left else 'the last measurement'}")
            status = end(kept, left) or 3
        finally:
            leave(status)

    alarm = threading.Timer(max(0.0, deadline - time.monotonic()) + GRACE, give_up)
    alarm.daemon = True
    alarm.start()
    try:
        left = suite.run(cases, machine, found, path, given.seconds or 0.2, deadline, first)
    except suite.Lost as error:
        print(f"the device is lost; run the same command again, which leaves this out: {error}")
        left = unfinished(found)
    finally:
        alarm.cancel()
    return end(found, left)


def leave(status: int) -> None:
    """Without the thread that hangs, which no exception reaches."""
    sys.stdout.flush()
    os._exit(status)


def machine_for(given: argparse.Namespace) -> Machine:
    if given.rehearse:
        return Rehearsal()
    if not torch.cuda.is_available():
        raise BadInput("there is no GPU here; --rehearse lets the CPU stand in for one")
    return Cuda()


def cached_in_one_place(name: str) -> None:
    """What is compiled for these results: new, so that compiling can be timed, and shared by the processes."""
    folder = Path(tempfile.gettempdir()) / f"softxent-bench-{name}"
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")


def all_first_calls(machine: Machine, options: Sequence[str], until: float) -> dict[str, float]:
    """Seconds by case and contender, of the processes that ended in time."""
    n = 1 if machine.rehearsed else max(1, min((os.cpu_count() or 2) - 2, machine.memory_bytes // EACH))
    own = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench", "part", str(i), f"--of={n}", *options],
            cwd=ROOT, env=own, stdout=subprocess.PIPE, text=True,
        )
        for i in range(n)
    ]  # fmt: skip
    found: dict[str, float] = {}
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.monotonic()))
        process.kill()
        lines = process.communicate()[0].splitlines()
        for line in lines:  # among whatever else a contender prints
            if line.startswith(MARK):
                found |= json.loads(line.removeprefix(MARK))
    return found


def first_calls(given: argparse.Namespace, cases: list[Case]) -> Iterator[dict[str, float]]:
    """In a process of its own: each contender's first call at each case of its part, which compiles its kernels."""
    machine = machine_for(given)
    found = suite.begin(machine, None, given.contenders or contenders.REGISTRY)
    available = suite.load_all(found, machine)
    for contender in available.values():  # what is imported or begun once is not compiling
        suite.first_call(Case("cross_entropy", 64, 96, "float32", "step"), contender, machine)
    for case in cases[given.number :: given.of]:
        for name, contender in available.items():
            if name != "eager":
                taken = suite.first_call(case, contender, machine)
                if taken is not None:
                    yield {f"{name} at {case}": round(taken, 6)}
        machine.free()


def wrong_of_ours(found: Results) -> Iterator[str]:
    for one in found.measurements:
        if one.contender.startswith("softxent") and one.error and not one.error.startswith(suite.DOES_NOT):
            yield f"{one.contender} at {one.case}: {one.error}"


def conclusion(found: Results, left: list[Case]) -> Iterator[str]:
    if "copy" in found.ceilings:
        yield f"the limit: {limit(found)}"
    yield from (f"doubtful: {text}" for text in doubts(found))
    yield from (f"wrong: {text}" for text in wrong_of_ours(found))
    yield f"{len(found.cases())} cases measured, {len(left)} left{': run the same command again' if left else ''}"

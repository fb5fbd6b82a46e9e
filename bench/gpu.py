"""All there is to know of a GPU from one command that ends in time, and goes on where it was cut off.

    1  the tests that run the kernels, uninterpreted                         DIR/parts.json
    2  the first call of every contender at every case, which compiles       DIR/parts.json
    3  the suite: correct, timed, correct again                              DIR/results.json
    4  table, pictures, and the summary                                      DIR/summary.md ...

1 and 2 run in as many processes as there are cores for, and end when their part of the time is over; 3 runs alone. Each
case is timed for its share of what is left, none is begun that would not end in time, and one that hangs is ended with
the process. Each part is written as soon as it is known, and the same command, again, does what is left. Nothing but
torch, triton, numpy, pytest and matplotlib is needed, nor anything installed.

Exit status: 0 all done and right; 1 a test failed, or softxent was wrong; 3 time was up, run it again.
"""

import argparse
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench import contenders, results, suite
from bench.cases import Case
from bench.doubts import doubts
from bench.machine import Cuda, Machine, Rehearsal
from bench.parts import Parts
from bench.results import BadInput, Results

RESERVE = 25.0  # seconds for pictures and summary
GRACE = 10.0  # of them, for the case in hand when the time was up
TESTS = ["--device", "cuda"]
REHEARSED_TESTS = ["tests/test_softmax.py", "-k", "kernels"]  # in the interpreter
EACH = 10 << 30  # bytes of the device's memory that a process may need
MARK = "first: "  # before what a process found

Say = Callable[[str], None]


def run(given: argparse.Namespace, cases: list[Case], say: Say) -> int:
    machine = machine_for(given)
    start = time.monotonic()
    deadline = start + 60 * given.minutes - min(RESERVE, 6 * given.minutes)
    out: Path = given.out
    found = suite.begin(machine, out / "results.json", given.contenders or list(contenders.REGISTRY), say)
    found.environment.setdefault("cache", secrets.token_hex(6))
    cached_in_one_place(found.environment["cache"])
    results.save(found, out / "results.json")
    workers = 1 if given.rehearse else max(1, min((os.cpu_count() or 2) - 2, machine.memory_bytes // EACH))
    parts = Parts(out / "parts.json", found.environment["sources"], given.parts, workers, say)

    tested: dict[str, Any] = {}
    if not given.no_tests:
        until = start + (deadline - start) * 0.35
        cache = {"TRITON_CACHE_DIR": os.environ["TRITON_CACHE_DIR"] + "-of-tests"}  # first calls find none of it
        tested = parts.run("tests", until, partial(test_command, given), tests_of, cache)
        say(f"tests: {summary_of_tests(tested, given.parts)}")
    until = start + (deadline - start) * (0.3 if given.no_tests else 0.6)
    first = parts.run("first calls", until, partial(first_command, given), first_of)
    say(f"first calls after {time.monotonic() - start:.0f} s; measuring")
    seconds = {(one["case"], one["contender"]): one["seconds"] for part in first.values() for one in part["found"]}

    def end(found: Results, left: list[Case]) -> int:
        conclude(out, found, tested, given, left)
        say((out / "summary.md").read_text())
        missing = given.parts - len(tested) if not given.no_tests else 0
        wrong = any(part["status"] for part in tested.values()) or any(wrong_of_ours(found))
        return 1 if wrong else 3 if left or missing else 0

    def unfinished(found: Results) -> list[Case]:
        return [case for case in cases if case not in found.cases()]

    def give_up() -> None:
        """Of a case that takes too long, or for ever: nothing else can end it. What is in the file stays."""
        status = 3
        try:
            kept = results.load(out / "results.json")
            left = unfinished(kept)
            say(f"time is up, and this has not ended: {left[0] if left else 'the last measurement'}")
            status = end(kept, left) or 3
        finally:
            leave(status)

    alarm = threading.Timer(max(0.0, deadline - time.monotonic()) + GRACE, give_up)
    alarm.daemon = True
    alarm.start()
    try:
        left = suite.run(cases, machine, found, out / "results.json", given.seconds or 0.2, say, deadline, seconds)
    except suite.Lost as error:
        say(f"the device is lost; run the same command again, which leaves this out: {error}")
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


def test_command(given: argparse.Namespace, i: int) -> list[str]:
    """Warnings of another version of torch are no failures here."""
    which = REHEARSED_TESTS if given.rehearse else TESTS
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", f"--shard={i}/{given.parts}"]
    return [sys.executable, "-m", "pytest", *which, *options]


def tests_of(stdout: str) -> str:
    """pytest's last line: how many passed."""
    lines = stdout.strip().splitlines()
    if not lines:
        raise ValueError("nothing was printed")
    return lines[-1].strip("= ")


def summary_of_tests(tested: dict[str, Any], parts: int) -> str:
    counts: dict[str, int] = {}
    for part in tested.values():
        words = str(part["found"]).replace(",", "").split()
        for number, what in pairwise(words):
            if number.isdecimal() and what in ("passed", "failed", "skipped", "error", "errors"):
                counts[what] = counts.get(what, 0) + int(number)
    text = ", ".join(f"{number} {what}" for what, number in counts.items()) or "none ran"
    left = parts - len(tested)
    return text + (f"; {left} of {parts} parts are left" if left else "")


def first_of(stdout: str) -> list[dict[str, Any]]:
    """What `first_calls` found, among whatever else a contender prints."""
    return [json.loads(line.removeprefix(MARK)) for line in stdout.splitlines() if line.startswith(MARK)]


def first_command(given: argparse.Namespace, i: int) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "bench",
        "first",
        f"--shard={i}/{given.parts}",
        f"--dtypes={','.join(given.dtypes)}",
    ]
    if given.contenders:
        command.append(f"--contenders={','.join(given.contenders)}")
    if given.widths:
        command.append(f"--widths={','.join(map(str, given.widths))}")
    if given.size:
        command.append(f"--size={given.size}")
    return command + (["--rehearse"] if given.rehearse else [])


def first_calls(given: argparse.Namespace, cases: list[Case]) -> Iterator[dict[str, Any]]:
    """In a process of its own: each contender's first call at each case of its part, which compiles its kernels."""
    machine = machine_for(given)
    i, of = map(int, given.shard.split("/"))
    found = suite.begin(machine, None, given.contenders or list(contenders.REGISTRY), lambda _: None)
    available = suite.load_all(found, machine)
    for contender in available.values():  # what is imported or begun once is not compiling
        tiny = Case(contender.op, 64, 96, "float32", "step")
        suite.first_call(tiny, contender, machine)
    for case in cases[i::of]:
        for name, contender in available.items():
            if contender.op == case.op and not name.startswith("eager"):
                taken = suite.first_call(case, contender, machine)
                if taken is not None:
                    yield {"case": str(case), "contender": name, "seconds": round(taken, 3)}
        machine.free()


def wrong_of_ours(found: Results) -> Iterator[str]:
    for one in found.measurements:
        if one.contender.startswith("softxent") and one.error and not one.error.startswith(suite.DOES_NOT):
            yield f"{one.contender} at {one.case}: {one.error}"


def conclude(out: Path, found: Results, tested: dict[str, Any], given: argparse.Namespace, left: list[Case]) -> None:
    from bench.pictures import pictures
    from bench.table import limit, table

    (out / "table.md").write_text(table(found))
    names = [path.name for path in pictures(found, out)]
    versions = {key: found.environment.get(key) for key in ("torch", "triton", "python", "commit")}
    lines = [f"# {found.device}{', a rehearsal on a CPU' if found.rehearsed else ''}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in versions.items()), ""]
    lines += [f"* tests: {'not asked for' if given.no_tests else summary_of_tests(tested, given.parts)}"]
    lines += [f"* {limit(found)}"] if "copy" in found.ceilings else []
    lines += [f"* doubtful: {text}" for text in doubts(found)]
    lines += [
        f"* {len(found.cases())} cases measured, {len(left)} left{': run the same command again' if left else ''}"
    ]
    lines += [f"* wrong: {text}" for text in wrong_of_ours(found)]
    for name, entry in found.contenders.items():
        if "unavailable" in entry:
            lines.append(f"* {name}: {entry['unavailable']}")
    lines += ["", *shares(found), "", f"See table.md, {', '.join(names) or 'no pictures'}, results.json."]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def shares(found: Results) -> Iterator[str]:
    """A training step: softxent's share of the copy, and how many times as long each other contender takes."""
    others = [name for name in contenders.CROSS_ENTROPY if name != "softxent"]
    others = [name for name in others if "version" in found.contenders.get(name, {})]
    yield "| training step | softxent, of the copy | " + " | ".join(f"{name} / softxent" for name in others) + " |"
    yield "|---|---:|" + "---:|" * len(others)
    for case in found.cases():
        if (case.op, case.mode, case.kind) != ("cross_entropy", "step", "mean"):
            continue
        measured = found.of(case)
        ours = measured.get("softxent")
        taken = ours.median() if ours else None
        share = found.share_of_copy(ours) if ours else None
        noisy = {name for name, one in measured.items() if found.noisy(one)}
        cell = "noisy" if "softxent" in noisy else "" if share is None else f"{100 * share:.0f} %"
        cells = [f"{case.n_rows} x {case.n_cols} {case.dtype}", cell]
        for name in others:
            other = measured[name].median() if name in measured else None
            cells.append("noisy" if noisy & {name, "softxent"} else f"{other / taken:.2f}" if other and taken else "")
        yield "| " + " | ".join(cells) + " |"

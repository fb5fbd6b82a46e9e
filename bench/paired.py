"""Two checkouts side by side: compare --run A B. This checkout measures; the package comes from A, and from B.

A run is a pair of processes, one for each. They take turns, A B, B A, ..., so that clocks and neighbours touch both
alike; on a CPU both on the same core, for the CPU time of one thread. Then two new processes: what differs between
processes of the same code, as where memory lies, is noise too, and often the larger part. The size of the environment,
which moves the stack, is drawn anew for each (Mytkowicz, Diwan, Hauswirth and Sweeney, "Producing wrong data without
doing anything obviously wrong!", ASPLOS 2009). Freed memory is kept by the process: page faults would come and go.

Tried on two busy cores, with two copies of the same code, 10 to 12 runs: the standard deviation of a run's difference
was 2 to 11 % by the wall clock and by CPU time; both on one core, 1 to 8 % by the clock and 1 to 2 % by CPU time.

The processes are asked in lines of JSON:
    {"case": [...], "contender": name}   ->  {"method": "graph" or "calls", "peak_bytes"} or {"error": what is wrong}
    {}                                   ->  {"seconds": of a call in one turn}
"""

import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.results import BadInput, Measurement, Results

ROOT = Path(__file__).parents[1]
TURNS = 40
KEPT = str(1 << 31)  # bytes of freed memory that glibc keeps


class Process:
    """One checkout's package, at work for one run."""

    def __init__(self, checkout: Path, run: int, threads: int) -> None:
        folders = [checkout / "kernels", ROOT, ROOT / "tests"]
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "MALLOC_TRIM_THRESHOLD_": KEPT,
            "MALLOC_MMAP_THRESHOLD_": KEPT,
            "PADDING": "x" * random.randrange(4096),
            "KINETO_LOG_LEVEL": "99",  # of the profiler, which counts memory
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | own
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", str(checkout), str(run), str(threads)],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise BadInput(f"a process ended with {self.process.wait()}; what it said is above") from None
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def side_by_side(
    a: Path, b: Path, cases: Sequence[Case], names: Sequence[str], runs: int, threads: int
) -> tuple[Results, Results]:
    """Both, with run i of one beside run i of the other."""
    both: list[Results] = []
    for run in range(runs):
        with ExitStack() as stack:
            processes = [Process(checkout, run, threads) for checkout in (a, b)]
            for process in processes:
                stack.callback(process.end)
            about = [process.ask(about=True) for process in processes]
            if not both:
                both = [Results(one.pop("device"), one, {name: {"version": ""} for name in names}) for one in about]
            for case in cases:
                for name in names:
                    one_run(processes, both, case, name, run)
        print(f"run {run + 1} of {runs}: {', '.join(told(both))}")
    return both[0], both[1]


def one_run(processes: Sequence[Process], both: Sequence[Results], case: Case, name: str, run: int) -> None:
    answers = [process.ask(case=case, contender=name) for process in processes]
    found = [results.of(case).get(name) or Measurement(case, name) for results in both]
    for results, one, answer in zip(both, found, answers, strict=True):
        if not run:
            results.measurements.append(one)
        one.error = one.error or answer.get("error")
        one.peak_bytes = max(one.peak_bytes or 0, answer.get("peak_bytes", 0))
    if any("error" in answer for answer in answers):
        return
    turns: list[list[float]] = [[], []]
    for turn in range(TURNS + 1):
        for i in (0, 1) if (turn + run) % 2 else (1, 0):
            taken = processes[i].ask()["seconds"]
            if turn:  # the first one is not counted
                turns[i].append(taken)
    for one, answer, times in zip(found, answers, turns, strict=True):
        one.seconds.setdefault(answer["method"], []).append(times)


def told(both: Sequence[Results]) -> Iterator[str]:
    """Of the last run: B's time over A's, or what is wrong."""
    for one in both[0].measurements:
        other = both[1].of(one.case)[one.contender]
        if one.error or other.error:
            yield f"{one.contender} at {one.case}: {one.error or other.error}"
        elif one.method == other.method:
            yield f"{other.runs()[-1] / one.runs()[-1]:.3f}"


def checkout(given: str, stack: ExitStack) -> Path:
    """A folder with the package's sources, or those of a commit in a temporary one. Raises BadInput."""
    folder = Path(given).resolve()
    if not folder.is_dir():
        done = subprocess.run(["git", "archive", given, "kernels"], cwd=ROOT, capture_output=True)
        if done.returncode:
            raise BadInput(f"{given} is neither a folder nor a commit of this repository")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
    if not (folder / "kernels/softxent").is_dir():
        raise BadInput(f"{folder} is no checkout: it has no kernels/softxent")
    return folder

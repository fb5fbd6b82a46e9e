"""A process of bench/paired.py: python -m bench.worker CHECKOUT RUN THREADS, asked by lines on its standard input."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bench import contenders, suite
from bench.cases import Case, inputs
from bench.contenders import Unavailable, Unsupported
from bench.correctness import check, in_words
from bench.machine import CannotCapture, Machine, here, settle
from bench.timing import Contestant, by_calls, by_graph, given_to, sets_of
from bench.work import Work


def main() -> None:
    folder, run, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    import softxent

    if not Path(softxent.__file__).is_relative_to(folder):
        sys.exit(f"softxent came from {softxent.__file__}, not from {folder}")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    settle(threads, run)
    machine = here()
    ready: Contestant | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if "about" in question:
            answer: dict[str, Any] = {"device": machine.name} | suite.environment(machine, folder)
        elif "case" in question:
            ready = None  # its memory, before the next takes its own
            answer, ready = begin(Case(*question["case"]), question["contender"], machine)
        else:
            assert ready
            ready.before()
            answer = {"seconds": machine.seconds(ready.run) / ready.calls}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def begin(case: Case, name: str, machine: Machine) -> tuple[dict[str, Any], Contestant | None]:
    """Right first: nobody who is wrong is timed."""
    try:
        work = Work(contenders.load(name, machine.device.type), case)
        sets = [inputs(case, machine.device, suite.SEED + i) for i in range(sets_of(machine, case.matrix_bytes))]
        given = given_to({name: work}, sets)
        errors = check({name: work}, case, sets[0], [suite.SEED + 1000, suite.SEED + 1001])[name]
    except Unsupported as error:
        return {"error": f"{suite.DOES_NOT}: {error}"}, None
    except Unavailable as error:
        return {"error": str(error)}, None
    except Exception as error:  # the contender's own
        return {"error": in_words(error)}, None
    if isinstance(errors, str):
        return {"error": errors}, None
    peak = machine.peak_bytes(partial(work.run, sets[0]))
    try:
        if not machine.graphs:
            raise CannotCapture
        method, ready = "graph", by_graph(work, sets, given, machine)
    except CannotCapture:
        method, ready = "calls", by_calls(work, sets, given, machine)
    return {"method": method, "peak_bytes": peak}, ready


if __name__ == "__main__":
    main()

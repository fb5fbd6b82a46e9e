"""What the command for a GPU machine does with its processes: in time, gone on with, and what hangs is ended."""

import re
import runpy
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import command, gpu, quick, suite
from bench.command import main
from bench.machine import Rehearsal

ROOT = Path(__file__).parents[1]
STARTS = ("python", "timeout", "ncu")


def test_first_calls_are_what_the_processes_tell_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among other lines, and of one that hangs what it has told by then."""
    program = (
        "import time; print('noise'); print('first: {\"a at b\": 0.5}'); print('first: {\"c at d\": 2}', flush=True);"
        "time.sleep(100)"
    )
    started = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: started([sys.executable, "-c", program], **options))
    start = time.monotonic()
    assert gpu.all_first_calls(Rehearsal(), [], start + 4) == {"a at b": 0.5, "c at d": 2}
    assert time.monotonic() - start < 30


def test_shards_of_the_tests_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected in this process, in which the interpreter is installed already."""
    monkeypatch.setitem(sys.modules, "interpreter", SimpleNamespace(install=lambda: None))

    def collected(*options: str) -> list[str]:
        found: list[str] = []

        class Collector:
            def pytest_collection_finish(self, session: pytest.Session) -> None:
                found.extend(item.nodeid for item in session.items)

        file = str(ROOT / "tests/test_bench_table.py")
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *options, file], plugins=[Collector()])
        return found

    parts = [collected(f"--shard={i}/2") for i in range(2)]
    assert all(parts) and sorted(parts[0] + parts[1]) == sorted(collected())


def test_a_case_that_never_ends_ends_with_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, statuses = threading.Event(), []

    def hanging(*_: Any) -> list[Any]:
        assert ended.wait(60), "nobody ended it"
        return []

    def leave(status: int) -> None:
        statuses.append(status)
        ended.set()

    monkeypatch.setattr(suite, "run", hanging)
    monkeypatch.setattr(gpu, "leave", leave)
    monkeypatch.setattr(gpu, "cached_in_one_place", lambda name: None)
    monkeypatch.setattr(gpu, "all_first_calls", lambda *_: {})
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    small = ["--contenders", "softxent,eager", "--widths", "10", "--dtypes", "float32"]
    main(["gpu", "--rehearse", "--minutes", "0.001", "--out", str(tmp_path), *small])
    assert statuses == [3]
    said = capsys.readouterr().out
    assert "time is up, and this has not ended: cross_entropy step 410 x 10 float32 mean\n" in said
    assert "0 cases measured" in said


def test_the_commands_for_fifteen_minutes_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.strip() for line in (ROOT / "bench/README.md").read_text().splitlines() if "DIR" in line]
    commands = [shlex.split(re.split(r"\s{3,}", line)[0]) for line in lines if line.startswith(STARTS)]
    quick_ones = [[*words[words.index("bench/quick.py") + 1 :]] for words in commands if "bench/quick.py" in words]
    others = [words[words.index("bench") + 1 :] for words in commands if "bench" in words]
    assert len(quick_ones) == 4 and len(others) == 1
    for words in [
        ["gpu", f"--out={folder}", "--minutes=4", *quick.CASES, *rest] for folder, *rest in quick_ones
    ] + others:
        given = command.parser().parse_args(words)
        assert command.cases_of(given, on_cpu=False)


def test_quick_is_the_suite_with_the_cases_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    given = command.parser().parse_args(["gpu", "--out", "folder", *quick.CASES])
    cases = command.cases_of(given, on_cpu=False)
    assert {(case.op, case.kind) for case in cases} == {("cross_entropy", "mean")}
    assert len(cases) == (7 + 2) * 2 * 2, "widths and small shapes, dtypes, step and forward"
    called: list[list[str]] = []
    monkeypatch.setattr("runpy.run_module", lambda name, run_name: called.append([name, *sys.argv[1:]]))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["quick.py", "folder", "--rehearse"])
    runpy.run_path(str(ROOT / "bench/quick.py"), run_name="__main__")
    assert called == [["bench", "gpu", "--out=folder", "--minutes=4", *quick.CASES, "--rehearse"]]

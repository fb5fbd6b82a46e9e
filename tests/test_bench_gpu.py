"""What the command for a GPU machine does with its processes: in time, kept, gone on with, and failures told."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu, suite
from bench.command import main
from bench.parts import ROOT, Parts

Lines = list[str]


def run(path: Path, commands: dict[int, str], until: float = 60.0, code: str = "c") -> tuple[dict[str, Any], Lines]:
    said: Lines = []

    def command(i: int) -> list[str]:
        return [sys.executable, "-c", commands.get(i, f"print({i})")]

    parts = Parts(path, code, 3, 1, said.append)
    return parts.run("work", time.monotonic() + until, command, json.loads), said


def test_each_part_is_kept_and_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    found, _ = run(path, {})
    assert {key: part["found"] for key, part in found.items()} == {"0": 0, "1": 1, "2": 2}
    again, _ = run(path, dict.fromkeys(range(3), "print(9)"))
    assert again == found
    other, _ = run(path, dict.fromkeys(range(3), "print(9)"), code="another")
    assert {part["found"] for part in other.values()} == {9}


def test_what_does_not_end_in_time_is_left_for_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    start = time.monotonic()
    found, _ = run(path, {2: "import time; time.sleep(100)"}, until=4.0)
    assert sorted(found) == ["0", "1"] and time.monotonic() - start < 30
    found, _ = run(path, {})
    assert sorted(found) == ["0", "1", "2"]


def test_a_part_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    found, said = run(tmp_path / "parts.json", {1: "import sys; print('why'); sys.exit(5)", 2: "print('no JSON')"})
    assert found["1"]["status"] == 5 and found["2"]["status"] == 1 and found["0"]["status"] == 0
    assert any("why" in line for line in said) and any("no JSON" in line for line in said)


def test_the_sum_of_the_tests() -> None:
    shard = {"status": 0, "found": "3 passed, 2 deselected in 1.2s"}
    failed = {"status": 1, "found": "1 failed, 4 passed in 3s"}
    assert gpu.summary_of_tests({"0": shard, "1": shard, "2": failed}, 3) == "10 passed, 1 failed"
    assert gpu.summary_of_tests({"0": shard}, 3) == "3 passed; 2 of 3 parts are left"


def test_shards_of_the_tests_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected in this process, in which the interpreter is installed already."""
    monkeypatch.setitem(sys.modules, "interpreter", SimpleNamespace(install=lambda: None))

    def collected(*options: str) -> list[str]:
        found: list[str] = []

        class Collector:
            def pytest_collection_finish(self, session: pytest.Session) -> None:
                found.extend(item.nodeid for item in session.items)

        arguments = [
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            *options,
            str(ROOT / "tests/test_bench_table.py"),
        ]
        pytest.main(arguments, plugins=[Collector()])
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
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    small = ["--contenders", "softxent,eager", "--widths", "10", "--dtypes", "float32"]
    main(["gpu", "--rehearse", "--no-tests", "--minutes", "0.001", "--out", str(tmp_path), *small])
    assert statuses == [3]
    assert "time is up, and this has not ended: cross_entropy step 410 x 10 float32 mean\n" in capsys.readouterr().out
    assert "0 cases measured" in (tmp_path / "summary.md").read_text()

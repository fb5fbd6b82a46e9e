"""What the command for a GPU machine does with its processes: in time, kept, gone on with, and failures told."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import gpu
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
    found, _ = run(path, {2: "import time; time.sleep(100)"}, until=8.0)
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


def test_shards_of_the_tests_are_all_of_them() -> None:
    def collected(*options: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
        ended = subprocess.run([*command, "tests/test_fmnist_idx.py"], cwd=ROOT, capture_output=True, text=True)
        return [line for line in ended.stdout.splitlines() if "::" in line]

    parts = [collected(f"--shard={i}/2") for i in range(2)]
    assert all(parts) and sorted(parts[0] + parts[1]) == sorted(collected())

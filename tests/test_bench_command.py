"""The command line: one clear line and 2 for what cannot be used; a whole run on a CPU and on a rehearsed GPU."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import command, gpu
from bench.command import main
from bench.machine import Cpu

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
SMALL = "--contenders softxent,eager --widths 10 --dtypes float32 --size 0.02 --seconds 0.02".split()


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema": 99}))
    (tmp_path / "file").touch()
    for arguments, said in (
        (["cpu", "--contenders", "eager,vapour"], "unknown contender 'vapour'; there are softxent, "),
        (["cpu", "--widths", "10,many"], "argument --widths: invalid widths value: '10,many'"),
        (["cpu", "--widths", "0"], "argument --widths: invalid widths value: '0'"),
        (["cpu", "--dtypes", "int8"], "unknown dtype 'int8'"),
        (["cpu", "--only", "vapour"], "no case has 'vapour' in its name; one is cross_entropy step "),
        (["cpu", "--seconds", "-1"], "argument --seconds: invalid positive float value: '-1'"),
        (["cpu", "--runs", "0"], "argument --runs: invalid positive int value: '0'"),
        (["cpu", "--out", tmp_path / "file"], "file cannot be written"),
        (["compare", other, other], "has schema 99; this suite reads schema 3"),
        (["compare", tmp_path / "none.json", other], "none.json: No such file"),
        (["show", tmp_path / "file"], "is not JSON"),
        (["gpu", "--out", tmp_path / "gpu"], "there is no GPU here"),
        (["fly"], "invalid choice: 'fly'"),
    ):
        status, line = in_process(arguments)
        assert status == 2, arguments
        assert line.startswith("bench: ") and said in line and line.count("\n") == 1, line


def in_process(arguments: Sequence[object]) -> tuple[int, str]:
    """Exit status and stderr, without the seconds that an import of torch takes."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(list(map(str, arguments))), said.getvalue()


def test_a_cpu_is_measured_shown_compared_and_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    done = bench("cpu", "--out", out, *SMALL, "--runs", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content = json.loads((out / "results.json").read_text())
    assert content["device"].startswith("CPU ") and content["environment"]["before"]["clock"] == "CPU time"
    assert {one["contender"] for one in content["measurements"]} == {"softxent", "eager", "copy"}
    assert all(one["error"] is None and len(one["seconds"]["calls"]) == 2 for one in content["measurements"])
    assert "| 256 x 10 | " in (out / "table.md").read_text()
    step = next(line for line in done.stdout.splitlines() if line.startswith("cross_entropy step 256 x 10"))
    assert " x (" in step or "noisy" in step
    assert "limit" in step and "Lower is better" in done.stdout
    files = {"results.json", "table.md", "ratio-cross-entropy.png", "memory-cross-entropy.png"}
    assert {path.name for path in out.iterdir()} == files, "the runs are merged"
    assert in_process(["compare", out / "results.json", out / "results.json"]) == (0, "")

    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    given = command.parser().parse_args(["cpu", "--publish"])
    for word in ("new", "replaced"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            command.finished(given, out, Cpu())
        assert said.getvalue().count(f"{word}: ") == len(files)
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name.startswith("cpu-") and {path.name for path in folder.iterdir()} == files


def test_what_git_keeps_is_not_written_unless_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    status, line = in_process(["cpu", "--out", tmp_path / "cpu"])
    assert status == 2 and "--publish" in line and not (tmp_path / "cpu").exists()


def test_help_says_what_is_measured_and_how() -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        main(["--help"])
    for words in ("against float64 first", "take turns", "noise", "the limit", "--publish", "compare --run"):
        assert words in " ".join(said.getvalue().split())


def test_a_gpu_is_rehearsed_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First with no time at all, then with enough: the second finds the first's files."""
    rehearsal = ["gpu", "--rehearse", "--out", tmp_path, *SMALL, "--minutes"]
    monkeypatch.setattr(gpu, "cached_in_one_place", lambda name: None)  # it would stay so for other tests
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert in_process([*rehearsal, 0.001]) == (3, "")
    assert "0 cases measured" in said.getvalue() and "run the same command again" in said.getvalue()
    assert "says nothing about any GPU" in (tmp_path / "table.md").read_text()

    done = bench(*rehearsal, 9)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with" in done.stdout and ", 0 left" in done.stdout
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rehearsed"] and content["ceilings"]["copy"] > 0
    step = next(one for one in content["measurements"] if one["contender"] == "softxent")
    assert set(step["seconds"]) == {"graph", "calls"} and step["first_seconds"] > 0
    assert len(list(tmp_path.iterdir())) <= 8

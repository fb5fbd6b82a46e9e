"""The lesson's table: all 27 ideas, and nothing named in it that is not there."""

import os
import pydoc
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fmnist import __main__, scratch, train
from fmnist_runs import without_pictures
from softxent import dispatch

ROOT = Path(__file__).parents[1]
README = (ROOT / "fmnist" / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| *(\d+) \|(.*)\|$", README, re.MULTILINE)
LESSON = README.split("## Where the notes slip")[0]


def test_all_27_ideas_are_there_in_order_each_with_something_to_run_or_read() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 28))
    for number, row in ROWS:
        _, _, see_it = row.split("|")
        assert "`" in see_it, f"idea {number}"


def test_every_test_named_exists() -> None:
    defined = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 12 and named <= defined, named - defined


def test_every_module_and_function_named_exists() -> None:
    for name in re.findall(r"python -m (?:pydoc )?(fmnist\.\w+)", README):
        import_module(name)
    for name in re.findall(r"`scratch\.(\w+)`", README):
        assert callable(getattr(scratch, name))
    for path in re.findall(r"python (bench/\w+\.py)", README):
        assert (ROOT / path).is_file()
    for name in re.findall(r"\b(\w+\.py)\b(?= +\w| *,)", README.split("## Where things are")[1]):
        assert (ROOT / "fmnist" / name).is_file(), name


def test_every_command_of_the_lesson_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one folder, on the sample, an epoch each. Pictures are drawn for the run that the lesson looks at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FMNIST_DATA", "sample")
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    commands = [command for command in re.findall(r"`(python [^`]+)`", LESSON) if "<name>" not in command]
    assert len(commands) >= 16 and len(set(commands)) >= 14
    for command in dict.fromkeys(commands):
        with monkeypatch.context() as patch:
            if " train " in command and "--name lesson" not in command:
                without_pictures(patch)
            assert done(command) == 0, command
        assert capsys.readouterr().out, command
    for path in ("fashion-mnist.png", *(f"runs/lesson/{name}" for name in ("report.html", "predictions.png"))):
        assert (tmp_path / path).stat().st_size > 10_000, path


def test_the_lessons_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FMNIST_DATA", "sample")
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    without_pictures(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(train, "one_epoch", ctrl_c)
        assert done("python -m fmnist train --name cut") == 130
    (command,) = re.findall(r"`(python [^`]+--resume[^`]+)`", README)
    assert __main__.main(command.replace("<name>", "cut").split()[3:]) == 0


def done(command: str) -> int:
    """Run a command line of the lesson, in this process where it can be; its exit code."""
    _, *words = command.split()
    if words[0] != "-m":  # a script, whose workers want a process of their own
        options = ["--data", "sample", "--epochs", "1", "--workers", "1"]
        script = [sys.executable, str(ROOT / words[0]), *options]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        finished = subprocess.run(script, env=env, capture_output=True, text=True)
        print(finished.stdout, finished.stderr)
        return finished.returncode
    _, module, *arguments = words
    if module == "pydoc":
        print(pydoc.render_doc(import_module(arguments[0])))
        return 0
    fewer = ["--epochs", "1"] if arguments[:1] == ["train"] or module == "fmnist.scratch" else []
    main = import_module("fmnist.__main__" if module == "fmnist" else module).main
    try:
        return int(main([*arguments, *fewer]))
    except SystemExit as exit:  # of --help and of bad options
        return int(exit.code or 0)

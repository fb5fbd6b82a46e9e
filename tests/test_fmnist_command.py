"""How commands end: the exit code, one line, and no traceback, whichever of them it is."""

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import softxent
from fmnist.__main__ import COMMANDS, _parser, main
from fmnist.command import Parser, exit_code
from fmnist.errors import Interrupted, UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (None, 0, ""),
        (UserError("no such thing"), 2, "fmnist: no such thing\n"),
        (Interrupted("this goes on"), 130, "fmnist: this goes on\n"),
        (KeyboardInterrupt(), 130, "fmnist: interrupted\n"),
    ],
)
def test_each_end_has_its_code_and_at_most_one_line(
    raised: BaseException | None, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> None:
        if raised is not None:
            raise raised

    assert exit_code(act) == code
    assert capsys.readouterr().err == line


def test_a_bad_option_is_one_line_that_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        Parser(prog="python -m fmnist.scratch").parse_args(["--colour"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "fmnist: unrecognized arguments: --colour; see python -m fmnist.scratch --help\n"
    )


def test_a_bad_option_of_a_command_names_the_help_of_that_command(capsys: pytest.CaptureFixture[str]) -> None:
    for given, program in ((["data", "--colour", "red"], "python -m fmnist data"), (["--colour"], "python -m fmnist")):
        with pytest.raises(SystemExit):
            main(given)
        unknown = " ".join(given[-2:]).removeprefix("data ")
        assert capsys.readouterr().err == f"fmnist: unrecognized arguments: {unknown}; see {program} --help\n"


def test_a_reader_that_has_seen_enough_ends_the_lesson_quietly() -> None:
    """python -m fmnist.scratch | head -1"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": "kernels:.",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "fmnist.scratch", "--data", "sample", "--epochs", "1000000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "outputs [0.1, 10.0, 0.1]\n"
            process.stdout.close()
            assert process.wait(timeout=60) == 1
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_a_name_that_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONIOENCODING=ascii, and a run called shirt in Chinese."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert exit_code(lambda: print("runs/衬衫")) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"runs/\\u886c\\u886b\n"  # type: ignore[attr-defined]


def test_alone_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in COMMANDS)


def test_the_version_is_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"softxent {softxent.__version__}") and torch.__version__ in out and out.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_sentences_with_examples_that_are_understood(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "None" not in out and "==SUPPRESS==" not in out
    examples = re.findall(r"^  python -m fmnist (.+)$", out, re.MULTILINE)
    assert len(examples) == len(COMMANDS[command].examples) >= 1
    parser = _parser(command)
    for example in examples:
        assert parser.parse_args(shlex.split(example)).command == command
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for action in subparsers.choices[command]._actions:
        assert action.help and (action.help[0].isupper() or action.dest == "help"), action.dest

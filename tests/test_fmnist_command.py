"""How commands end: the exit code, one line, and no traceback, whichever of them it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

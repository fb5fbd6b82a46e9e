"""The lesson's table: all 27 ideas, and nothing named in it that is not there."""

import argparse
import re
from importlib import import_module
from pathlib import Path

import pytest

from fmnist import describe, report, scratch, show

ROOT = Path(__file__).parents[1]
README = (ROOT / "fmnist" / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| *(\d+) \|(.*)\|$", README, re.MULTILINE)
MODULES = {"show": show, "data": describe, "report": report}


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


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m fmnist ((?:show|data|report)\b[^`]*)", README))))
def test_the_commands_take_the_options_that_are_given(command: str) -> None:
    name, *options = command.split()
    parser = argparse.ArgumentParser()
    MODULES[name].add_arguments(parser)
    parser.parse_args([option for option in options if option != "writes"])

"""How every command begins and ends: bad input is one line and exit code 2, Ctrl-C is one line and no traceback.

Of the processes that torchrun starts, the first speaks for all.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NoReturn

from .errors import Interrupted, UserError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description and the examples as they are written, and each option's default where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, False, argparse.SUPPRESS) or not action.option_strings
        return action.help if told else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """One line for bad input, as for a UserError. The usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fmnist: {message}; see {self.prog} --help\n")

    def parse_known_args(  # type: ignore[override]
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Nothing stays unknown: a command names its own --help, and not the one that lists the commands."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def launched() -> bool:
    """Whether this is one of the processes of a launcher: torchrun, or what sets the same variables."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def launcher() -> str:
    """What starts such processes again, before the name of a module."""
    if not launched():
        return "python -m"
    size, here = (os.environ.get(name, os.environ["WORLD_SIZE"]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = f"--nnodes {int(size) // int(here)} " if size != here else ""
    return f"torchrun {nodes}--nproc-per-node {here} -m"


@contextmanager
def first_speaks() -> Iterator[None]:
    """Whatever ranks but the first print goes nowhere. A traceback passes."""
    if not launched() or os.environ["RANK"] == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def exit_code(act: Callable[[], None]) -> int:
    """Do it: 0, or 2 after a UserError, 130 after Ctrl-C, 1 where nobody reads on. argparse's SystemExit passes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Each epoch is seen when it is done, in a pipe too, and a name that the terminal cannot show is escaped.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        act()
    except UserError as error:
        print(f"fmnist: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"fmnist: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0

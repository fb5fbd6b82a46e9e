"""How every command begins and ends: bad input is one line and exit code 2, Ctrl-C is one line and no traceback."""

import argparse
import io
import os
import sys
from collections.abc import Callable
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

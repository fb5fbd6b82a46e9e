"""How every command begins and ends: bad input is one line and exit code 2, Ctrl-C is one line and no traceback."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from .errors import Interrupted, UserError


class Parser(argparse.ArgumentParser):
    """One line for bad input, as for a UserError. The usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fmnist: {message}; see {self.prog} --help\n")


def exit_code(act: Callable[[], None]) -> int:
    """Do it: 0, or 2 after a UserError, 130 after Ctrl-C, 1 where nobody reads on. argparse's SystemExit passes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # each epoch is seen when it is done, in a pipe too
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

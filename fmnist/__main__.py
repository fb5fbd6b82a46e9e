"""python -m fmnist COMMAND: the commands are modules, of which only the one that was asked for is imported.

Each has `add_arguments(parser)`, which says what it takes, and `run(arguments)`, which does it. It raises UserError for
what the user can mend.
"""

import argparse
import importlib
import io
import os
import sys
from typing import NoReturn

from .errors import Interrupted, UserError

# name: (module, what it does)
COMMANDS = {
    "train": ("train", "train a model and write runs/<name>/"),
    "evaluate": ("evaluate", "loss, perplexity, accuracy, calibration and confusion matrix of a checkpoint"),
    "predict": ("predict", "classes of images, with their probabilities"),
    "show": ("show", "images with their labels, as a picture or in the terminal"),
    "data": ("describe", "the data in figures: where, what, and how fast"),
    "report": ("report", "a run's folder as one page, report.html"),
}


class _Parser(argparse.ArgumentParser):
    """One line for bad input, as for a UserError. The usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fmnist: {message}; see {self.prog} --help\n")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """With the arguments of `command` only: the others stay unimported."""
    parser = _Parser(prog="python -m fmnist", description="Fashion-MNIST, classified through softxent's fused op.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        shown = argparse.ArgumentDefaultsHelpFormatter
        subparser = commands.add_parser(name, help=summary, description=summary, formatter_class=shown)
        if name == command:
            importlib.import_module(f".{module}", __package__).add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. Raises SystemExit where argparse ends the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # each epoch is seen when it is done, in a pipe too
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser(argv[0] if argv else None).parse_args(argv)
    module, _ = COMMANDS[arguments.command]
    try:
        importlib.import_module(f".{module}", __package__).run(arguments)
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


if __name__ == "__main__":
    sys.exit(main())

"""python -m fmnist COMMAND: the commands are modules, of which only the one that was asked for is imported.

Each has `add_arguments(parser)`, which says what it takes, and `run(arguments)`, which does it. It raises UserError for
what the user can mend.
"""

import argparse
import importlib
import sys

from .command import Parser, exit_code

# name: (module, what it does)
COMMANDS = {
    "train": ("train", "train a model and write runs/<name>/"),
    "evaluate": ("evaluate", "loss, perplexity, accuracy, calibration and confusion matrix of a checkpoint"),
    "predict": ("predict", "classes of images, with their probabilities"),
    "show": ("show", "images with their labels, as a picture or in the terminal"),
    "data": ("describe", "the data in figures: where, what, and how fast"),
    "report": ("report", "a run's folder as one page, report.html"),
}


def _parser(command: str | None) -> argparse.ArgumentParser:
    """With the arguments of `command` only: the others stay unimported."""
    parser = Parser(prog="python -m fmnist", description="Fashion-MNIST, classified through softxent's fused op.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        shown = argparse.ArgumentDefaultsHelpFormatter
        subparser = commands.add_parser(name, help=summary, description=summary, formatter_class=shown)
        if name == command:
            importlib.import_module(f".{module}", __package__).add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. Raises SystemExit where argparse ends the program."""
    given = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _run(given))


def _run(argv: list[str]) -> None:
    arguments = _parser(argv[0] if argv else None).parse_args(argv)
    module, _ = COMMANDS[arguments.command]
    importlib.import_module(f".{module}", __package__).run(arguments)


if __name__ == "__main__":
    sys.exit(main())

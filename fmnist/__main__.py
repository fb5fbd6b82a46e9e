"""python -m fmnist COMMAND: the commands are modules, of which only the one that was asked for is imported.

Each has `add_arguments(parser)`, which says what it takes, and `run(arguments)`, which does it. It raises UserError for
what the user can mend.
"""

import argparse
import importlib
import shlex
import sys
from typing import NamedTuple

from .command import HelpFormatter, Parser, exit_code, first_speaks, launched, launcher
from .errors import UserError


class Command(NamedTuple):
    module: str
    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "train": Command(
        "train",
        "Train a model and write its folder, runs/<name>/.",
        (
            "train --name first",
            "train --model mlp --validation 5000 --name mlp",
            "train --config runs/first --lr 0.2 --name second",
            "train --resume runs/first --epochs 20",
        ),
    ),
    "evaluate": Command(
        "evaluate",
        "Measure a checkpoint on the test images: loss, perplexity, accuracy, calibration and confusion matrix.",
        ("evaluate --checkpoint runs/first", "evaluate --checkpoint runs/first --output confusion.png"),
    ),
    "predict": Command(
        "predict",
        "Print the classes of images with their probabilities, the likeliest first.",
        ("predict --checkpoint runs/first", "predict --checkpoint runs/first --resize photo.jpg"),
    ),
    "show": Command(
        "show",
        "Show images with their labels, as a picture or in the terminal.",
        ("show --text", "show --split test --start 100 --count 40", "show --export shirt.png --start 7"),
    ),
    "data": Command(
        "describe",
        "Print the data in figures: where they are, what they are, and how fast they are read.",
        ("data",),
    ),
    "compare": Command(
        "compare",
        "Put several runs over each other, as a table and as a picture of their curves.",
        ("compare runs/first runs/second",),
    ),
    "report": Command("report", "Make a run's page, report.html, from its folder.", ("report runs/first",)),
}


def _parser(command: str | None) -> argparse.ArgumentParser:
    """With the arguments of `command` only: the others stay unimported."""
    parser = Parser(
        prog="python -m fmnist",
        description="Fashion-MNIST, classified through softxent's fused op.",
        epilog="Each command says more: python -m fmnist train --help",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="Print the versions and the commit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, summary, examples) in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="examples:\n" + "\n".join(f"  python -m fmnist {example}" for example in examples),
            formatter_class=HelpFormatter,
        )
        if name == command:
            importlib.import_module(f".{module}", __package__).add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. Raises SystemExit where argparse ends the program."""
    given = sys.argv[1:] if argv is None else argv
    with first_speaks():
        return exit_code(lambda: _run(given))


def _run(argv: list[str]) -> None:
    parser = _parser(argv[0] if argv else None)
    arguments = parser.parse_args(argv)
    if arguments.version:
        from .versions import line

        print(line())
    elif arguments.command is None:
        parser.print_help()
    elif launched() and arguments.command != "train":
        raise UserError(f"only train runs under torchrun: python -m fmnist {shlex.join(argv)}")
    else:
        arguments.command_line = f"{launcher()} fmnist {shlex.join(argv)}"
        importlib.import_module(f".{COMMANDS[arguments.command].module}", __package__).run(arguments)


if __name__ == "__main__":
    sys.exit(main())

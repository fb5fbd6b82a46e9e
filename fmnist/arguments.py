"""What several commands take: types of numbers, the device, the data, a checkpoint. For argparse."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import checkpoint, device
from .models import MODELS


def _number(kind: type, holds: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """A type of argument: a number of this kind for which `holds` is true; `what` says which those are."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"invalid value {text!r}: it must be {what}")
        return value

    return parse


whole = _number(int, lambda value: value >= 0, "a whole number of at least 0")
positive_int = _number(int, lambda value: value > 0, "a whole number above 0")
positive = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
at_least_0 = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
seed = _number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")  # of a torch.Generator


def run_or_checkpoint(text: str) -> Path:
    """A type of argument: a checkpoint's file, or the folder of the run that has it."""
    path = Path(text)
    return path / checkpoint.FILE if path.is_dir() else path


def add_device(parser: argparse._ActionsContainer, default: str = "auto") -> None:
    help = "Where to compute; auto is a CUDA GPU if there is one, else the CPU"
    parser.add_argument("--device", choices=device.CHOICES, default=default, help=help)


def add_data(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="The folder with the four IDX files, .gz or not, or 'sample' for 2,500 embedded images; if absent: "
        "$FMNIST_DATA, our cache, Debian's package, the net",
    )
    parser.add_argument("--require-full-data", action="store_true", help="Refuse the embedded sample")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    help = "The folder of a run, or its model.safetensors"
    parser.add_argument("--checkpoint", type=run_or_checkpoint, required=True, help=help)
    parser.add_argument("--model", choices=MODELS, help="Refuse a checkpoint of another model")

"""What several commands take: types of numbers, the device, the data, a checkpoint. For argparse."""

import argparse
from collections.abc import Callable
from pathlib import Path

from . import device
from .models import MODELS


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A type of argument: a finite number above 0."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it in its message
    return parse


def at_least_0(text: str) -> float:
    """A type of argument: a finite number, 0 or above."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def fraction(text: str) -> float:
    """A type of argument: a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def seed(text: str) -> int:
    """A type of argument: what a torch.Generator takes."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError
    return value


def add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    help = "where to compute; auto: a CUDA GPU if there is one"
    parser.add_argument("--device", choices=device.CHOICES, default=default, help=help)


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the four IDX files, .gz or not, or 'sample' for the embedded sample; if not given: "
        "$FMNIST_DATA, our cache, Debian's package, the net",
    )
    parser.add_argument("--require-full-data", action="store_true", help="refuse the embedded sample")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of a run")
    parser.add_argument("--model", choices=MODELS, help="refuse a checkpoint of another model")

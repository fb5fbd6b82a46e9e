"""Images with their labels in words: a grid as a PNG file, or blocks in the terminal with --text."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import data, files, plots
from .arguments import add_data, positive_int
from .data import LABELS
from .errors import UserError

BLOCKS = " ░▒▓█"
ASCII = " .:*#"  # where the terminal's encoding has no blocks
GAP = 2  # columns between images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    help = "From which images; train if absent, and test with --export"
    parser.add_argument("--split", choices=("train", "test"), help=help)
    parser.add_argument("--start", type=int, default=0, metavar="N", help="The first image, counted from 0")
    help = "How many images; if absent 24, with --text 4, with --export 1"
    parser.add_argument("--count", type=int, metavar="N", help=help)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--output", type=Path, default=Path("fashion-mnist.png"), metavar="FILE", help="The picture to write"
    )
    where.add_argument("--text", action="store_true", help="Draw in the terminal, and write no file")
    help = "Write one image as it is, 28 x 28 pixels, for `predict` to take; the name ends in .png"
    where.add_argument("--export", type=Path, metavar="FILE", help=help)
    help = "With --export, draw each pixel N x N times, for the eye and for `predict --resize`"
    parser.add_argument("--enlarge", type=positive_int, default=1, metavar="N", help=help)


def run(arguments: argparse.Namespace) -> None:
    """Show what was asked for. UserError if there are no such images, or the file cannot be written."""
    if arguments.enlarge > 1 and not arguments.export:
        raise UserError("--enlarge is for --export")
    dataset = data.load(arguments.data, arguments.require_full_data)
    split = arguments.split or ("test" if arguments.export else "train")
    images, labels = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }[split]
    start, count = arguments.start, arguments.count
    if count is None:
        count = 1 if arguments.export else 4 if arguments.text else 24
    if count < 1 or start < 0 or start + count > len(images):
        raise UserError(
            f"--start {start} --count {count}: the {split} images of {dataset.source} "
            f"are 0 to {len(images) - 1}, and at least one must be shown"
        )
    images, labels = images[start : start + count], labels[start : start + count]
    if arguments.export:
        if count > 1:
            raise UserError(f"--export writes one image, and --count is {count}")
        _export(images[0].repeat(arguments.enlarge, 0).repeat(arguments.enlarge, 1), arguments.export)
        print(f"{arguments.export}: {split} image {start} of {dataset.source}, {LABELS[labels[0]]}")
        return
    if arguments.text:
        print(text(images, [LABELS[label] for label in labels], shutil.get_terminal_size().columns, _shades()))
        return
    which = f"images {start} to {start + count - 1}" if count > 1 else f"image {start}"
    which = f"{split} {which}"
    title = f"Fashion-MNIST{'' if dataset.complete else ', a sample'}: {which}"
    plots.images(images, labels, title, arguments.output)
    print(f"{arguments.output}: {which} of {dataset.source}")


def _export(image: np.ndarray, path: Path) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("writing images needs Pillow: pip install pillow") from error
    if path.suffix != ".png":  # what loses nothing
        raise UserError(f"cannot write {path}: its name must end in .png")
    with files.replacing(path) as temporary:
        Image.fromarray(image).save(temporary)


def text(images: np.ndarray, names: Sequence[str], width: int = 80, shades: str = BLOCKS) -> str:
    """Images [n, 28, 28] uint8 as characters, as many beside each other as `width` columns hold, names below.

    A character stands for a pixel's column of two rows, as it is about twice as high as wide: 28 columns, 14 lines.
    """
    n_beside = max(1, (width + GAP) // (images.shape[2] + GAP))
    lines: list[str] = []
    for first in range(0, len(images), n_beside):
        group = slice(first, first + n_beside)
        drawn = [_characters(image, shades) for image in images[group]]
        drawn_names = [name.center(images.shape[2]) for name in names[group]]
        lines += [(" " * GAP).join(row).rstrip() for row in [*zip(*drawn, strict=True), drawn_names]]
        lines.append("")
    return "\n".join(lines[:-1])


def _characters(image: np.ndarray, shades: str) -> list[str]:
    levels = image.astype(float).reshape(-1, 2, image.shape[1]).mean(1) / 256 * len(shades)
    return ["".join(shades[int(level)] for level in row) for row in levels]


def _shades() -> str:
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII
    return BLOCKS

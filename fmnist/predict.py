"""python -m fmnist predict: the classes of images with their probabilities, the likeliest first."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softxent import softmax

from . import arguments as take
from . import checkpoint, data, device, images
from .data import LABELS
from .loop import Split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = (
        "Image files of 28 x 28 pixels, grey, light on black (pictures here are drawn the other way); if none are "
        "given, the first test images"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="*", type=Path, help=help)
    take.add_checkpoint(parser)
    help = (
        "Take a photograph, of any size, of one thing on a plain ground, which is taken for black: make it grey, "
        "invert it where the thing is darker than the ground, cut off the margins, and resize it to 28 x 28 pixels, as "
        "the data set's own images were made; and say what was done"
    )
    parser.add_argument("--resize", action="store_true", help=help)
    parser.add_argument("--top", metavar="K", type=take.positive_int, default=3, help="How many classes to print")
    help = "How many test images, where no files are given"
    parser.add_argument("--number", metavar="N", type=take.positive_int, default=8, help=help)
    take.add_device(parser)
    take.add_data(parser)


def run(arguments: argparse.Namespace) -> None:
    place, why = device.choose(arguments.device)
    print(f"device: {place} ({why})")
    _, model = checkpoint.load(arguments.checkpoint, expect=arguments.model)
    titles, pixels = _given(arguments.images, arguments.resize) if arguments.images else _of_the_test(arguments)
    for title, p in zip(titles, probabilities(model.to(place), pixels, place), strict=True):
        likeliest = p.sort(descending=True, stable=True).indices[: arguments.top].tolist()
        print(f"{title}: " + ", ".join(f"{LABELS[i]} {p[i]:.4f}" for i in likeliest))


@torch.no_grad()
def probabilities(model: torch.nn.Module, pixels: np.ndarray, place: torch.device) -> Tensor:
    """Of each class, [n, 10] float32 on the CPU, for images [n, 28, 28] uint8 and a model that is on `place`."""
    shown = torch.tensor(pixels, device=place)
    batch, _ = Split(shown, shown.new_zeros(len(shown))).batch(slice(None))
    return softmax(model(batch), dim=1).cpu()


def _given(paths: list[Path], resize: bool) -> tuple[list[str], np.ndarray]:
    if resize:
        fitted = [images.fit(path) for path in paths]
        return [f"{path} ({done})" for path, (_, done) in zip(paths, fitted, strict=True)], np.stack(
            [x for x, _ in fitted]
        )
    pixels = [images.read(path) for path in paths]
    note = " (its border is light: it looks inverted, the model knows light on black; --resize inverts it)"
    titles = [f"{path}{note if images.looks_inverted(x) else ''}" for path, x in zip(paths, pixels, strict=True)]
    return titles, np.stack(pixels)


def _of_the_test(arguments: argparse.Namespace) -> tuple[list[str], np.ndarray]:
    dataset = data.load(arguments.data, arguments.require_full_data)
    labels = dataset.test_labels[: arguments.number]
    return [f"test image {i}, {LABELS[y]}" for i, y in enumerate(labels)], dataset.test_images[: arguments.number]

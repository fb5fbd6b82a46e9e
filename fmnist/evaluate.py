"""python -m fmnist evaluate: what a checkpoint is worth on the test images, in figures and as a confusion matrix."""

import argparse
from pathlib import Path

import torch

from . import arguments as take
from . import checkpoint, data, device, metrics, plots
from .loop import logits_of, splits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    take.add_checkpoint(parser)
    help = "Draw the confusion matrix as a picture, too"
    parser.add_argument("--output", metavar="FILE", type=Path, help=help)
    take.add_device(parser)
    take.add_data(parser)


def run(arguments: argparse.Namespace) -> None:
    place, why = device.choose(arguments.device)
    print(f"device: {place} ({why})")
    name, model = checkpoint.load(arguments.checkpoint, expect=arguments.model)
    dataset = data.load(arguments.data, arguments.require_full_data)
    _, split = splits(dataset, place)
    found = metrics.measure(logits_of(model.to(place), split))
    print(
        f"{name}: test loss {found.loss:.4f} (perplexity {found.perplexity:.3f}), "
        f"test accuracy {found.accuracy:.4f}, calibration error {found.calibration_error:.4f} "
        f"on {found.n} images of {dataset.source}"
    )
    for label, accuracy, counts in zip(data.LABELS, found.class_accuracy, found.confusion, strict=True):
        print(f"  {label:<12} {accuracy:.4f} of {counts.sum()}{_mistake(label, counts)}")
    print("\nimages by true class (rows) and predicted class (columns, in the same order):")
    for label, counts in zip(data.LABELS, found.confusion.tolist(), strict=True):
        print(f"  {label:<12}" + "".join(f"{n:6}" for n in counts))
    if arguments.output:  # not beside the checkpoint: the picture there is of the run's own test images
        plots.confusion(found.confusion.numpy(), data.LABELS, arguments.output)
        print(f"confusion matrix: {arguments.output}")


def _mistake(label: str, counts: torch.Tensor) -> str:
    """What a class's images, `counts` [C] of them taken for each class, are taken for most often, if not for it."""
    others = counts.clone()
    others[data.LABELS.index(label)] = 0
    most = int(others.argmax())
    return f", {others[most]} taken for {data.LABELS[most]}" if others[most] else ""

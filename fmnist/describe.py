"""The data in figures: where it is, that it is what it should be, how the classes and pixels are spread, how fast."""

import argparse
import hashlib
import time

import numpy as np
import torch

from . import data, device, idx
from .arguments import add_data, add_device, positive_int
from .data import LABELS, FashionMNIST
from .loop import Split, splits

BATCH_SIZE = 256
SECONDS = 0.5  # of timing the batcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_data(parser)
    help = "How many images a batch has that is timed"
    parser.add_argument("--batch-size", type=positive_int, default=BATCH_SIZE, metavar="N", help=help)


def run(arguments: argparse.Namespace) -> None:
    """Print it. UserError where the data is not to be had, or the device cannot be."""
    place, why = device.choose(arguments.device)
    data.load(arguments.data, arguments.require_full_data)  # the first time may fetch it: not what is timed
    start = time.perf_counter()
    dataset = data.load(arguments.data, arguments.require_full_data)
    seconds = time.perf_counter() - start
    n_images = len(dataset.train_labels) + len(dataset.test_labels)

    print(f"source: {dataset.source}{'' if dataset.complete else ' (NOT THE FULL DATASET)'}")
    kind = "the published files" if dataset.complete else "the sample"
    print(f"SHA-256 of the decompressed files, checked when they were read; those of {kind}:")
    for name, digest in checksums(dataset).items():
        print(f"    {digest}  {name}")
    print(f"\n{'class':15}{'train':>8}{'test':>8}")
    for name, n_train, n_test in class_counts(dataset):
        print(f"{name:15}{n_train:8}{n_test:8}")
    print(f"{'all':15}{len(dataset.train_labels):8}{len(dataset.test_labels):8}")
    mean, deviation = pixel_moments(dataset.train_images)
    print(f"\ntraining pixels in [0, 1]: mean {mean:.5f}, standard deviation {deviation:.5f}")
    print(f"reader: {n_images / seconds:,.0f} images/s, read, decompressed and checked ({seconds:.2f} s for all)")
    split, _ = splits(dataset, place)
    rate = batcher_rate(split, arguments.batch_size)
    print(f"batcher: {rate:,.0f} images/s, shuffled, in batches of {arguments.batch_size}, on {place} ({why})")


def checksums(dataset: FashionMNIST) -> dict[str, str]:
    """SHA-256 of each IDX file, decompressed, from the arrays that were read: by the file's name."""
    arrays = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    return {
        name: hashlib.sha256(idx.write_bytes(array)).hexdigest()
        for name, array in zip(data.SHA256, arrays, strict=True)
    }


def class_counts(dataset: FashionMNIST) -> list[tuple[str, int, int]]:
    """Of each class: its name, its training images, its test images."""
    counts = (np.bincount(labels, minlength=len(LABELS)) for labels in (dataset.train_labels, dataset.test_labels))
    return [(name, int(train), int(test)) for name, train, test in zip(LABELS, *counts, strict=True)]


def pixel_moments(images: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all pixels [n, 28, 28] uint8, scaled to [0, 1], from a count of the levels."""
    counts = np.bincount(images.ravel(), minlength=256)
    levels = np.arange(256) / 255
    mean = float(counts @ levels / counts.sum())
    return mean, float(counts @ (levels - mean) ** 2 / counts.sum()) ** 0.5


def batcher_rate(split: Split, batch_size: int, seconds: float = SECONDS) -> float:
    """Images a second of shuffled minibatches, ready for the model on their device; whole epochs for `seconds`."""
    split.batch(slice(batch_size))  # the first is slow, and no other
    n = 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        order = torch.randperm(len(split.labels)).to(split.labels.device)
        for rows in order.split(batch_size):
            pixels, _ = split.batch(rows)
        pixels[0, 0].item()  # waits for the device
        n += len(split.labels)
    return n / passed

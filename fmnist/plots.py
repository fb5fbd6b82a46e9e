"""The run's pictures: loss and accuracy by epoch, and test images with what the model takes them for."""

from pathlib import Path
from typing import Any

import numpy as np

from .data import LABELS
from .errors import UserError


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(epochs: list[dict[str, Any]], title: str, path: Path) -> None:
    """Training loss, and training and test accuracy, from the records of metrics.jsonl."""
    pyplot = _pyplot()
    x = [record["epoch"] for record in epochs]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    left.plot(x, [record["train_loss"] for record in epochs], "o-", label="training")
    left.plot(x, [record["test_loss"] for record in epochs], "s--", label="test")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    right.plot(x, [record["train_accuracy"] for record in epochs], "o-", label="training")
    right.plot(x, [record["test_accuracy"] for record in epochs], "s--", label="test")
    right.set(xlabel="epoch", ylabel="accuracy")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def predictions(images: np.ndarray, labels: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """A grid of images [n, 28, 28], each with its true label over the predicted one, red where they differ."""
    pyplot = _pyplot()
    n_cols = 8
    n_rows = -(-len(images) // n_cols)
    figure, axes = pyplot.subplots(n_rows, n_cols, figsize=(1.5 * n_cols, 1.9 * n_rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label, guess in zip(axes.flat, images, labels, predicted, strict=False):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(f"{LABELS[label]}\n{LABELS[guess]}", fontsize=8, color="black" if label == guess else "crimson")
    figure.suptitle("Test images: the true label above, the predicted one below, red where wrong")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

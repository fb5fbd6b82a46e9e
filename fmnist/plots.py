"""Pictures: the curves of a run, predictions, confusion, the weights, images of the data."""

import textwrap
from collections.abc import Sequence
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


def curves(epochs: list[dict[str, Any]], title: str, path: Path, loss_unit: str = "cross-entropy (nats)") -> None:
    """Loss and accuracy, in training and on the test images, from the records of metrics.jsonl.

    Training is averaged over the epoch, while the model learns; the test comes after it. So the test may be the better.
    """
    pyplot = _pyplot()
    x = [record["epoch"] for record in epochs]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(textwrap.fill(title, 110))
    for axes, quantity, unit in ((left, "loss", loss_unit), (right, "accuracy", "accuracy (share of the images)")):
        axes.plot(x, [record[f"train_{quantity}"] for record in epochs], "o-", label="training, mean over the epoch")
        axes.plot(x, [record[f"test_{quantity}"] for record in epochs], "s--", label="test, after the epoch")
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)
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
    _save(figure, path)
    pyplot.close(figure)


def confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """A confusion matrix [C, C] of counts: a row for each true class, a column for each predicted one."""
    pyplot = _pyplot()
    n, n_right = matrix.sum(), matrix.trace()
    title = f"{n:,} test images by true and predicted class, {n_right / max(n, 1):.2%} right"
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axes = pyplot.subplots(figsize=(8, 7), layout="constrained")
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(matrix):
        if count:
            axes.text(
                j, i, f"{count}", ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.5 else "k"
            )
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(shown, label="share of the true class (number: images)")
    _save(figure, path)
    pyplot.close(figure)


def images(images: np.ndarray, labels: np.ndarray, title: str, path: Path) -> None:
    """A grid of images [n, 28, 28] uint8, each with its label in words. UserError if the file cannot be written."""
    pyplot = _pyplot()
    n_cols = min(8, len(images))
    n_rows = -(-len(images) // n_cols)
    figure, axes = pyplot.subplots(n_rows, n_cols, figsize=(max(1.3 * n_cols, 4), 1.5 * n_rows + 0.4), squeeze=False)
    figure.suptitle(title, fontsize=11)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label in zip(axes.flat, images, labels, strict=False):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(LABELS[label], fontsize=9)
    figure.tight_layout()
    _save(figure, path)
    pyplot.close(figure)


def templates(weight: np.ndarray, path: Path) -> None:
    """The weights [10, 784] of softmax regression as ten images: what each class looks for, and looks away from.

    Class j scores o_j = x w_j + b_j: a red pixel that is bright speaks for it, a blue one against it. One scale for
    all ten, symmetric, so that white is 0.
    """
    pyplot = _pyplot()
    side = int(weight.shape[1] ** 0.5)
    limit = float(abs(weight).max()) or 1.0
    figure, axes = pyplot.subplots(2, 5, figsize=(10, 4.6), layout="constrained")
    for axis, name, template in zip(axes.flat, LABELS, weight, strict=True):
        drawn = axis.imshow(template.reshape(side, side), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="weight (logit per full pixel)")
    figure.suptitle("What each class looks for (red) and looks away from (blue)")
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Any, path: Path) -> None:
    if not path.suffix:  # matplotlib would write to another name
        raise UserError(f"cannot write {path}: its name must end in .png, .svg or .pdf")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    except ValueError as error:  # a suffix that is no format
        raise UserError(f"cannot write {path}: {error}") from error

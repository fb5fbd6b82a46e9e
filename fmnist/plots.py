"""Pictures: the curves of a run, predictions, confusion, the weights, images of the data."""

import textwrap
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .data import LABELS
from .errors import CannotWrite, UserError


def missing() -> str:
    """What is not installed and how to get it, or nothing."""
    return "" if find_spec("matplotlib") else "the pictures need matplotlib: pip install matplotlib"


def _pyplot() -> Any:
    if why := missing():
        raise UserError(why)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(
    epochs: list[dict[str, Any]],
    title: str,
    path: Path,
    loss_unit: str = "cross-entropy (nats)",
    softened: bool = False,
) -> None:
    """Loss and accuracy, in training and on the images that were measured after each epoch, from metrics.jsonl.

    Training is averaged over the epoch, while the model learns; the other comes after it, and so may be the better.
    `softened`: training's loss was against smoothed or mixed targets, which is another quantity, on axes of its own.
    """
    pyplot = _pyplot()
    x = [record["epoch"] for record in epochs]
    measured = "validation" if "validation_loss" in epochs[-1] else "test"
    training = ("train", "o-", "training, mean over the epoch")
    after = (measured, "s--", f"{measured}, after the epoch")
    panels: list[tuple[str, str, tuple[tuple[str, str, str], ...]]] = [
        ("loss", loss_unit, (training, after)),
        ("accuracy", "accuracy (share of the images)", (training, after)),
    ]
    if softened:
        panels[:1] = [
            ("loss", f"{loss_unit}, against softened targets", (training,)),
            ("loss", f"{loss_unit}, against the labels", (after,)),
        ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    figure.suptitle(textwrap.fill(title, 55 * len(panels)))
    for axis, (quantity, unit, lines) in zip(axes, panels, strict=True):
        for split, style, label in lines:
            color = "C0" if split == "train" else "C1"
            axis.plot(x, [record[f"{split}_{quantity}"] for record in epochs], style, color=color, label=label)
        axis.set(xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)
    pyplot.close(figure)


def overlay(
    runs: dict[str, list[dict[str, Any]]], units: dict[str, str], path: Path, softened: Collection[str] = ()
) -> None:
    """The curves of several runs over each other: their epochs by name, and the unit of each one's loss by name.

    Dashed in training, solid on the images that were measured after each epoch. Losses of a kind share axes; the
    training loss of a run whose targets were `softened` is of no kind here, and left out.
    """
    pyplot = _pyplot()
    kinds = list(dict.fromkeys(units.values()))
    figure, axes = pyplot.subplots(1, len(kinds) + 1, figsize=(5 * len(kinds) + 5, 4.4), layout="constrained")
    for i, (name, epochs) in enumerate(runs.items()):
        x = [record["epoch"] for record in epochs]
        measured = "validation" if "validation_loss" in epochs[-1] else "test"
        for axis, quantity in ((axes[kinds.index(units[name])], "loss"), (axes[-1], "accuracy")):
            label = f"{name}, {measured}"
            axis.plot(x, [record[f"{measured}_{quantity}"] for record in epochs], ".-", color=f"C{i % 10}", label=label)
            if quantity == "accuracy" or name not in softened:
                axis.plot(x, [record[f"train_{quantity}"] for record in epochs], "--", color=f"C{i % 10}", alpha=0.5)
    for axis, unit in zip(axes, [*kinds, "accuracy (share of the images)"], strict=True):
        axis.set(xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("Dashed: in training, mean over the epoch")
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


def mistakes(images: np.ndarray, labels: np.ndarray, p: np.ndarray, path: Path, count: int = 24) -> None:
    """The wrong predictions that the model was surest of: images [n, 28, 28], labels [n], probabilities p [n, 10]."""
    pyplot = _pyplot()
    predicted, confidence = p.argmax(1), p.max(1)
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    n_cols, n_rows = 8, max(1, -(-len(surest) // 8))
    figure, axes = pyplot.subplots(n_rows, n_cols, figsize=(12, 2 * n_rows + 0.5), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, surest, strict=False):
        axis.imshow(images[i], cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(f"{LABELS[labels[i]]}\n{LABELS[predicted[i]]} {confidence[i]:.3f}", fontsize=8)
    figure.suptitle(
        f"Wrong, and sure of it: the {len(surest)} surest of {len(wrong):,} mistakes on {len(labels):,} test images.\n"
        "The true label above, the predicted one with its probability below"
    )
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
    size = (max(1.3 * n_cols, 4), 1.6 * n_rows + 0.8)
    figure, axes = pyplot.subplots(n_rows, n_cols, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label in zip(axes.flat, images, labels, strict=False):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(LABELS[label], fontsize=9)
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
        with files.replacing(path) as temporary:
            figure.savefig(temporary, dpi=120)
    except ValueError as error:  # a suffix that is no format
        raise CannotWrite(f"cannot write {path}: {error}") from error

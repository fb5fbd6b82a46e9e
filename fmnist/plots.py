"""Pictures: the curves of a run, predictions, confusion, the weights, images of the data."""

import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def _figure(path: Path, n_rows: int = 1, n_cols: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, [n_rows, n_cols], drawn into the file in the end. UserError where it cannot be."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(n_rows, n_cols, squeeze=False, **{"layout": "constrained", **options})
    try:
        yield figure, axes
        _save(figure, path)
    finally:
        pyplot.close(figure)


def _fill(axes: Any, images: np.ndarray, titles: Iterable[str], fontsize: int, colors: Sequence[str] = ()) -> None:
    """The images [n, 28, 28], dark on white, on the first n of the axes."""
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title, color in zip(axes.flat, images, titles, colors or ["black"] * len(images), strict=False):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(title, fontsize=fontsize, color=color)


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
    with _figure(path, 1, len(panels), figsize=(5 * len(panels), 4)) as (figure, axes):
        figure.suptitle(textwrap.fill(title, 55 * len(panels)))
        for axis, (quantity, unit, lines) in zip(axes[0], panels, strict=True):
            for split, style, label in lines:
                color = "C0" if split == "train" else "C1"
                axis.plot(x, [record[f"{split}_{quantity}"] for record in epochs], style, color=color, label=label)
            _by_epoch(axis, unit)


def _by_epoch(axis: Any, unit: str, **legend: Any) -> None:
    axis.set(xlabel="epoch", ylabel=unit)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(**legend)


def overlay(
    runs: dict[str, list[dict[str, Any]]], units: dict[str, str], path: Path, softened: Collection[str] = ()
) -> None:
    """The curves of several runs over each other: their epochs by name, and the unit of each one's loss by name.

    Dashed in training, solid on the images that were measured after each epoch. Losses of a kind share axes; the
    training loss of a run whose targets were `softened` is of no kind here, and left out.
    """
    kinds = list(dict.fromkeys(units.values()))
    with _figure(path, 1, len(kinds) + 1, figsize=(5 * len(kinds) + 5, 4.4)) as (figure, ((*losses, accuracy),)):
        for i, (name, epochs) in enumerate(runs.items()):
            x, color = [record["epoch"] for record in epochs], f"C{i % 10}"
            measured = "validation" if "validation_loss" in epochs[-1] else "test"
            for axis, quantity in ((losses[kinds.index(units[name])], "loss"), (accuracy, "accuracy")):
                y = [record[f"{measured}_{quantity}"] for record in epochs]
                axis.plot(x, y, ".-", color=color, label=f"{name}, {measured}")
                if quantity == "accuracy" or name not in softened:
                    axis.plot(x, [record[f"train_{quantity}"] for record in epochs], "--", color=color, alpha=0.5)
        for axis, unit in zip((*losses, accuracy), [*kinds, "accuracy (share of the images)"], strict=True):
            _by_epoch(axis, unit, fontsize=8)
        figure.suptitle("Dashed: in training, mean over the epoch")


def predictions(images: np.ndarray, labels: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """A grid of images [n, 28, 28], each with its true label over the predicted one, red where they differ."""
    n_rows = -(-len(images) // 8)
    titles = [f"{LABELS[label]}\n{LABELS[guess]}" for label, guess in zip(labels, predicted, strict=False)]
    colors = ["black" if label == guess else "crimson" for label, guess in zip(labels, predicted, strict=False)]
    with _figure(path, n_rows, 8, figsize=(12, 1.9 * n_rows), layout=None) as (figure, axes):
        _fill(axes, images, titles, 8, colors)
        figure.suptitle("Test images: the true label above, the predicted one below, red where wrong")
        figure.tight_layout()


def mistakes(images: np.ndarray, labels: np.ndarray, p: np.ndarray, path: Path, count: int = 24) -> None:
    """The wrong predictions that the model was surest of: images [n, 28, 28], labels [n], probabilities p [n, 10]."""
    predicted, confidence = p.argmax(1), p.max(1)
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    titles = [f"{LABELS[labels[i]]}\n{LABELS[predicted[i]]} {confidence[i]:.3f}" for i in surest]
    n_rows = max(1, -(-len(surest) // 8))
    with _figure(path, n_rows, 8, figsize=(12, 2 * n_rows + 0.5)) as (figure, axes):
        _fill(axes, images[surest], titles, 8)
        figure.suptitle(
            f"Wrong, and sure of it: the {len(surest)} surest of {len(wrong):,} mistakes on {len(labels):,} test "
            "images.\nThe true label above, the predicted one with its probability below"
        )


def confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """A confusion matrix [C, C] of counts: a row for each true class, a column for each predicted one."""
    n, n_right = matrix.sum(), matrix.trace()
    title = f"{n:,} test images by true and predicted class, {n_right / max(n, 1):.2%} right"
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    with _figure(path, figsize=(8, 7)) as (figure, ((axes,),)):
        shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                color = "white" if share[i, j] > 0.5 else "k"
                axes.text(j, i, f"{count}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted class", ylabel="true class", title=title)
        figure.colorbar(shown, label="share of the true class (number: images)")


def images(images: np.ndarray, labels: np.ndarray, title: str, path: Path) -> None:
    """A grid of images [n, 28, 28] uint8, each with its label in words. UserError if the file cannot be written."""
    n_cols = min(8, len(images))
    n_rows = -(-len(images) // n_cols)
    size = (max(1.3 * n_cols, 4), 1.6 * n_rows + 0.8)
    with _figure(path, n_rows, n_cols, figsize=size) as (figure, axes):
        figure.suptitle(title, fontsize=11)
        _fill(axes, images, [LABELS[label] for label in labels], 9)


def templates(weight: np.ndarray, path: Path) -> None:
    """The weights [10, 784] of softmax regression as ten images: what each class looks for, and looks away from.

    Class j scores o_j = x w_j + b_j: a red pixel that is bright speaks for it, a blue one against it. One scale for
    all ten, symmetric, so that white is 0.
    """
    side = int(weight.shape[1] ** 0.5)
    limit = float(abs(weight).max()) or 1.0
    with _figure(path, 2, 5, figsize=(10, 4.6)) as (figure, axes):
        for axis, name, template in zip(axes.flat, LABELS, weight, strict=True):
            drawn = axis.imshow(template.reshape(side, side), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_title(name, fontsize=10)
            axis.axis("off")
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="weight (logit per full pixel)")
        figure.suptitle("What each class looks for (red) and looks away from (blue)")


def _save(figure: Any, path: Path) -> None:
    if not path.suffix:  # matplotlib would write to another name
        raise UserError(f"cannot write {path}: its name must end in .png, .svg or .pdf")
    try:
        with files.replacing(path) as temporary:
            figure.savefig(temporary, dpi=120)
    except ValueError as error:  # a suffix that is no format
        raise CannotWrite(f"cannot write {path}: {error}") from error

"""Pictures whose colours say something."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmnist import plots
from fmnist.data import LABELS


def test_templates_are_red_where_a_pixel_speaks_for_the_class_and_blue_where_against(tmp_path: Path) -> None:
    from matplotlib import image

    weight = np.zeros((10, 784), np.float32)
    weight[0], weight[9] = 0.5, -0.5  # the first and the last image are of one colour each
    plots.templates(weight, tmp_path / "templates.png")
    pixels = image.imread(tmp_path / "templates.png")[..., :3]
    red = (pixels[..., 0] > 0.3) & (pixels[..., 1:].max(-1) < 0.15)
    blue = (pixels[..., 2] > 0.3) & (pixels[..., 0] < 0.1)
    least = 0.01 * red.size
    assert red.sum() > least and blue.sum() > least
    assert np.argwhere(red)[:, 0].mean() < np.argwhere(blue)[:, 0].mean()


def test_weights_of_zero_are_white(tmp_path: Path) -> None:
    from matplotlib import image

    plots.templates(np.zeros((10, 784), np.float32), tmp_path / "templates.png")
    pixels = image.imread(tmp_path / "templates.png")[:, : 2 * 1200 // 3, :3]  # left of the scale, which has colours
    assert (pixels.max(-1) - pixels.min(-1)).max() < 0.05


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from here on, which stay in memory."""
    kept: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    return kept


@pytest.mark.parametrize("count", [1, 7, 24, 64, 100])
def test_a_title_is_above_the_first_rows_labels(tmp_path: Path, count: int) -> None:
    """From above: a line of ink as high as one line of text, then nothing, then the labels."""
    from matplotlib import image

    plots.images(np.zeros((count, 28, 28), np.uint8), np.zeros(count, np.uint8), "A title, gy", tmp_path / "a.png")
    inked = image.imread(tmp_path / "a.png")[..., :3].min((1, 2)) < 0.9
    edges = np.flatnonzero(np.diff(inked.astype(int)))
    title, label = (edges[1] - edges[0], edges[3] - edges[2])
    assert edges[0] > 0 and 10 < title < 24 and 8 < label < 20 and edges[2] - edges[1] > 3


EPOCHS = [
    {"epoch": i, "train_loss": 1 / i, "train_accuracy": 0.5, "test_loss": 0.5 / i, "test_accuracy": 0.6} for i in (1, 2)
]


def test_losses_of_two_kinds_do_not_share_axes(figures: list[Any], tmp_path: Path) -> None:
    plots.curves(EPOCHS, "one kind", tmp_path / "a.png", "nats", False)
    plots.curves(EPOCHS, "two kinds", tmp_path / "b.png", "nats", True)
    one, two = ([(axis.get_ylabel(), len(axis.lines)) for axis in figure.axes] for figure in figures)
    accuracy = ("accuracy (share of the images)", 2)
    assert one == [("nats", 2), accuracy]
    assert two == [("nats, against softened targets", 1), ("nats, against the labels", 1), accuracy]


def test_runs_over_each_other_share_axes_where_their_losses_are_of_a_kind(figures: list[Any], tmp_path: Path) -> None:
    plots.overlay({"a": EPOCHS, "b": EPOCHS, "c": EPOCHS}, {"a": "x", "b": "x", "c": "y"}, tmp_path / "a.png")
    (figure,) = figures
    assert [(axis.get_ylabel(), len(axis.lines)) for axis in figure.axes[:2]] == [("x", 4), ("y", 2)]
    assert len(figure.axes[2].lines) == 6
    plots.overlay({"a": EPOCHS, "b": EPOCHS}, {"a": "x", "b": "x"}, tmp_path / "b.png", softened=["b"])
    assert [len(axis.lines) for axis in figures[1].axes] == [3, 4], "b's training loss was of another kind"


def test_the_mistakes_are_the_wrong_predictions_by_confidence(figures: list[Any], tmp_path: Path) -> None:
    p = np.full((4, 10), 0.01)
    p[0, 1], p[1, 2], p[2, 3], p[3, 4] = 0.9, 0.5, 0.95, 0.7
    labels = np.array([0, 0, 3, 0])  # the surest of all is right
    plots.mistakes(np.zeros((4, 28, 28), np.uint8), labels, p, tmp_path / "a.png")
    titles = [axis.get_title() for axis in figures[0].axes if axis.get_title()]
    assert titles == [f"{LABELS[0]}\n{LABELS[k]} {c:.3f}" for k, c in ((1, 0.9), (4, 0.7), (2, 0.5))]
    plots.mistakes(np.zeros((1, 28, 28), np.uint8), np.array([1]), p[:1], tmp_path / "none.png")
    assert "the 0 surest of 0 mistakes" in figures[1]._suptitle.get_text()

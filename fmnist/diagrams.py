"""The pictures of docs/lesson.md: python -m fmnist.diagrams [FOLDER] [--train]

Drawn from what the pages say, without data: the same bytes each time. `--train` draws the two that come from training,
too: 12 runs of softmax regression on Fashion-MNIST, some two minutes.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import data, files, loop, plots, scratch, state
from .command import Parser, exit_code
from .config import Config
from .losses import LOSSES

FOLDER = Path("docs/pictures")
FIXED = {"svg.hashsalt": "softxent", "svg.fonttype": "none", "font.size": 11}
SAFE, WRONG = "#0b6fb8", "#c4401c"


def regression(figure: Any) -> None:
    """A value that is estimated, and classes that are told apart."""
    left, right = figure.subplots(1, 2)
    random = np.random.default_rng(1)
    x = np.linspace(0, 1, 25)
    left.plot(x, 0.3 + 0.5 * x + random.normal(0, 0.06, 25), "o", color=SAFE)
    left.plot(x, 0.3 + 0.5 * x, color="black")
    left.set(title="regression: y is a number", xlabel="x", ylabel="y", xticks=[], yticks=[])
    for center, marker, color in (((0.3, 0.65), "o", SAFE), ((0.7, 0.35), "s", WRONG)):
        points = random.normal(center, 0.11, (25, 2))
        right.plot(*points.T, marker, color=color)
    right.plot([0.05, 0.95], [0.05, 0.95], color="black")
    right.set(title="classification: y is one of a few", xlabel="$x_1$", ylabel="$x_2$", xticks=[], yticks=[])


def codes(figure: Any) -> None:
    """Numbers on a line, and the corners that one-hot codes are."""
    left, right = figure.subplots(1, 2)
    names = ("dog", "cat", "chicken")
    left.plot([0.5, 3.5], [0, 0], color="black", linewidth=1)
    for k, name in enumerate(names, 1):
        left.plot(k, 0, "o", markersize=10, color=SAFE)
        left.text(k, 0.15, f"{name}\n{k}", ha="center")
    left.annotate("", (3, -0.2), (1, -0.2), arrowprops={"arrowstyle": "<->"})
    left.text(2, -0.36, "2: farther than the others", ha="center")
    left.set(title="numbers: an order that is none", ylim=(-0.6, 0.6))
    corners = {name: (math.cos(a), math.sin(a)) for name, a in zip(names, np.radians([210, 330, 90]), strict=True)}
    for i, (name, (x, y)) in enumerate(corners.items()):
        right.plot([0, x], [0, y], color="gray", linestyle=":")
        right.plot(x, y, "o", markersize=10, color=SAFE)
        code = ", ".join(str(int(i == j)) for j in range(3))
        right.text(1.15 * x, 1.15 * y + (0.05 if y > 0 else -0.2), f"{name} ({code})", ha="center")
        for other in names[:i]:
            right.plot(*zip(corners[name], corners[other], strict=True), color="black", linewidth=1)
            middle = np.add(corners[name], corners[other]) / 2
            right.text(*(1.25 * middle), r"$\sqrt{2}$", ha="center", va="center")
    right.plot(0, 0, "k.")
    right.text(0.12, -0.02, "0")
    right.set(title="one-hot: all equally far", xlim=(-1.8, 1.8), ylim=(-1.0, 1.35), aspect="equal")
    left.axis("off"), right.axis("off")


def network(figure: Any) -> None:
    """The one layer, with the first note's names of the weights and with the second's."""
    for axes, title, name in zip(
        figure.subplots(1, 2),
        (r"first note: $w_{ij}$ goes from $x_i$ to $o_j$", r"second note: $w_{ji}$ goes from $x_i$ to $o_j$"),
        (lambda i, j: f"$w_{{{i}{j}}}$", lambda i, j: f"$w_{{{j}{i}}}$"),
        strict=True,
    ):
        inputs = {i: (0.0, 4.0 - i) for i in range(1, 5)}
        outputs = {j: (2.6, 3.5 - j) for j in range(1, 4)}
        for i, start in inputs.items():
            for j, end in outputs.items():
                axes.plot(*zip(start, end, strict=True), color=WRONG if j == 2 else "silver", linewidth=1.2, zorder=1)
                if j == 2:
                    place = np.add(np.multiply(0.62, start), np.multiply(0.38, end))
                    axes.text(*place, name(i, j), color=WRONG, ha="center", backgroundcolor="white", zorder=2)
        for label, places in (("x", inputs), ("o", outputs)):
            for k, (x, y) in places.items():
                axes.add_patch(_circle(x, y))
                axes.text(x, y, f"${label}_{k}$", ha="center", va="center", zorder=4)
        axes.text(3.05, 1.5, "$+\\,b_2$", color=WRONG, va="center")
        axes.set(title=title, xlim=(-0.4, 3.6), ylim=(-0.4, 3.4), aspect="equal")
        axes.axis("off")


def _circle(x: float, y: float) -> Any:
    from matplotlib.patches import Circle

    return Circle((x, y), 0.26, facecolor="white", edgecolor="black", zorder=3)


def softmax(figure: Any) -> None:
    """hardmax and softmax of the same outputs."""
    outputs = torch.tensor([[0.5, 1.5, -0.75]])
    shown = (("outputs", outputs), ("hardmax", scratch.hardmax(outputs)), ("softmax", scratch.softmax(outputs)))
    for axes, (title, values) in zip(figure.subplots(1, 3), shown, strict=True):
        bars = axes.bar(("dog", "cat", "chicken"), values[0].tolist(), color=[SAFE, WRONG, "gray"])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=title, ylim=(-1.1, 1.9) if title == "outputs" else (0, 1.2))
        axes.spines[["top", "right"]].set_visible(False)


def information(figure: Any) -> None:
    """How surprising an outcome is, and how uncertain three lotteries are."""
    left, right = figure.subplots(1, 2)
    p = np.linspace(0.01, 1, 200)
    left.plot(p, -np.log(p), color=SAFE)
    for chance, prize in ((0.7, "no prize"), (0.2, "second prize"), (0.1, "first prize")):
        left.plot(chance, -math.log(chance), "o", color=WRONG)
        left.annotate(
            f"{prize}: {-math.log(chance):.2f}", (chance, -math.log(chance)), (8, 8), textcoords="offset points"
        )
    left.set(title="surprisal $-\\log p$ of an outcome", xlabel="its probability p", ylabel="nats", ylim=(0, 4.7))
    lotteries = {
        "certain\n(1, 0, 0)": [1.0],
        "the note's\n(.7, .2, .1)": [0.7, 0.2, 0.1],
        "even\n(⅓, ⅓, ⅓)": [1 / 3] * 3,
    }
    heights = [-sum(q * math.log(q) for q in chances) + 0.0 for chances in lotteries.values()]
    right.bar_label(right.bar(list(lotteries), heights, color=SAFE), fmt="%.4f", padding=2)
    right.set(title="entropy of a lottery", ylabel="nats", ylim=(0, 1.3))


def gradients(figure: Any) -> None:
    """By the right class's output, of two classes: what pulls a wrong answer back."""
    behind = np.linspace(-8, 8, 200)  # how far the right class's output is behind
    p = 1 / (1 + np.exp(behind))
    axes = figure.subplots()
    axes.plot(behind, 1 - p, color=SAFE, label="cross-entropy: $1 - p$")
    axes.plot(behind, 2 * p * (1 - p) ** 2, color=WRONG, label="squared error: $2 p (1 - p)^2$")
    axes.axvspan(3, 8, color="gray", alpha=0.12)
    axes.text(5.5, 0.5, "surely wrong", ha="center")
    axes.text(-5.5, 0.5, "surely right", ha="center")
    axes.set(
        xlabel="how far the right class's output is behind the other's", ylabel="pull on it (size of the gradient)"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def three_curves(figure: Any, dataset: data.FashionMNIST) -> None:
    """Ten epochs by hand, through PyTorch's loss, and through the fused op."""
    axes = figure.subplots()
    by_hand = [record["train_loss"] for record in scratch.curve(dataset, 10, 256, 0.1, seed=1)]
    axes.plot(range(1, 11), by_hand, "o", markersize=13, markerfacecolor="none", color="black", label="by hand")
    for loss, style in (("torch", "s-"), ("fused", "x--")):
        losses = [train_loss for train_loss, _ in trained(Config(loss=loss), dataset)]
        axes.plot(range(1, 11), losses, style, label={"torch": "F.cross_entropy", "fused": "softxent"}[loss])
    axes.set(xlabel="epoch", ylabel="training loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()


def lost_classes(figure: Any, dataset: data.FashionMNIST) -> None:
    """Thirty epochs at a rate that falls from 3 to 0, five seeds of each loss."""
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (loss, name) in zip(panels, (("fused", "cross-entropy"), ("mse", "squared error")), strict=True):
        for seed in range(1, 6):
            config = Config(loss=loss, lr=3.0, schedule="linear", epochs=30, seed=seed)
            accuracies = [accuracy for _, accuracy in trained(config, dataset)]
            axes.plot(range(1, 31), accuracies, label=f"seed {seed}")
        axes.set(title=f"{name}, rate 3 falling to 0", xlabel="epoch")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on the validation images")
    panels[0].legend(loc="lower right")


def trained(config: Config, dataset: data.FashionMNIST) -> list[tuple[float, float]]:
    """The training loss and the test accuracy after each epoch."""
    training, test = loop.splits(dataset)
    now = state.State.fresh(config, torch.device("cpu"))
    found = []
    for epoch in range(1, config.epochs + 1):
        train_loss, _ = loop.one_epoch(config, now.model, now.optimizer, training, now.shuffle, epoch)
        found.append((train_loss, loop.evaluate(now.model, test, LOSSES[config.loss])[1]))
    return found


DRAWN: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "regression": (regression, (8, 3.2)),
    "codes": (codes, (9, 3.4)),
    "network": (network, (9, 4)),
    "softmax": (softmax, (9, 3)),
    "information": (information, (9.5, 3.6)),
    "gradients": (gradients, (7, 3.6)),
}
TRAINED: dict[str, tuple[Callable[..., None], tuple[float, float]]] = {
    "three_curves": (three_curves, (6.5, 3.6)),
    "lost_classes": (lost_classes, (10, 3.8)),
}


def draw(path: Path, drawing: Callable[[Any], None], size: tuple[float, float]) -> None:
    """One picture as SVG, without a date. UserError where matplotlib is missing or the file cannot be written."""
    pyplot = plots._pyplot()
    with pyplot.rc_context(FIXED):
        figure = pyplot.figure(figsize=size, layout="constrained")
        drawing(figure)
        with files.replacing(path) as temporary:
            figure.savefig(temporary, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m fmnist.diagrams", description="Draw the pictures of the lesson.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="Where they go")
    parser.add_argument("--train", action="store_true", help="Draw those that come from training, too")
    parser.add_argument("--data", metavar="DIR", help="As of python -m fmnist train")
    return exit_code(lambda: run(parser.parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    for name, (drawing, size) in DRAWN.items():
        draw(arguments.folder / f"{name}.svg", drawing, size)
        print(arguments.folder / f"{name}.svg")
    if arguments.train:
        dataset = validation_for_test(data.load(arguments.data))
        torch.set_num_threads(1)
        for name, (trained_drawing, size) in TRAINED.items():
            draw(arguments.folder / f"{name}.svg", partial(trained_drawing, dataset=dataset), size)
            print(arguments.folder / f"{name}.svg")


def validation_for_test(dataset: data.FashionMNIST, share: int = 12) -> data.FashionMNIST:
    """The last twelfth of the training images in the place of the test images, which the lesson looks at once."""
    cut = len(dataset.train_labels) - len(dataset.train_labels) // share
    return dataset._replace(
        train_images=dataset.train_images[:cut],
        train_labels=dataset.train_labels[:cut],
        test_images=dataset.train_images[cut:],
        test_labels=dataset.train_labels[cut:],
    )


if __name__ == "__main__":
    sys.exit(main())

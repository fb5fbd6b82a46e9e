"""Classes as numbers: which code (编码) says what is known about them, and no more.

Regression (回归) estimates a continuous value, classification (分类) one of a few that may have no order. A class can
be written as a number either way, and the code decides what "near" means.

Red and blue have no order. One-hot codes (独热编码) are equally far from the origin and from each other:

>>> [one_hot(k, 3) for k in range(3)]
[[1, 0, 0], [0, 1, 0], [0, 0, 1]]
>>> {round(distance(one_hot(j, 3), one_hot(k, 3)), 4) for j in range(3) for k in range(j)}
{1.4142}
>>> {distance(one_hot(k, 3), [0, 0, 0]) for k in range(3)}
{1.0}
>>> {cosine(one_hot(j, 3), one_hot(k, 3)) for j in range(3) for k in range(j)}
{0.0}

Each element is a number like any other, and may be scaled as features are (归一化). To [-1, 1] all distances double:

>>> {round(distance([2 * x - 1 for x in one_hot(j, 3)], [2 * x - 1 for x in one_hot(k, 3)]), 4)
...  for j in range(3) for k in range(j)}
{2.8284}

To mean 0 and deviation 1 they stay equal only if the classes are equally frequent. Two of four are of class 0:

>>> first, second, third, _ = standardized([one_hot(k, 3) for k in (0, 1, 2, 0)])
>>> [round(distance(a, b), 3) for a, b in ((first, second), (first, third), (second, third))]
[3.055, 3.055, 3.266]

Sizes have an order. Ordinal codes (序数编码) keep it, XXL is farther from X than XL is, and one-hot codes lose it:

>>> size = ordinal(["X", "XL", "XXL"])
>>> size
{'X': 1, 'XL': 2, 'XXL': 3}
>>> abs(size["XXL"] - size["X"]) > abs(size["XL"] - size["X"])
True

What goes wrong with an ordinal code for classes without order: the best guess between classes 0 and 2 is class 1.

>>> sum([0, 2]) / 2
1.0

    python -m fmnist.codes [--data DIR]

does it to Fashion-MNIST: the same least squares (最小二乘) fitted to the class's number, and to its one-hot code. The
first must have Pullover between T-shirt and Dress; number the classes otherwise and it has other accuracy. The second
does not depend on the numbers.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from statistics import fmean, pstdev

import torch
from torch import Tensor

from . import data
from .command import Parser, exit_code

RENUMBERED = (0, 5, 1, 6, 2, 7, 3, 8, 4, 9)  # class k is written as the number RENUMBERED[k]: any other order would do
RIDGE = 1.0  # keeps the solution where pixels are dark in all images; in units of a squared pixel, of 1 at most


def one_hot(k: int, n_classes: int) -> list[int]:
    """Class k of n as a vector of which element k is 1, and the rest 0."""
    if not 0 <= k < n_classes:
        raise ValueError(f"class {k} is not one of {n_classes}")
    return [int(j == k) for j in range(n_classes)]


def ordinal(values_in_order: Sequence[str]) -> dict[str, int]:
    """Each value's place in the order, from 1."""
    return {value: i for i, value in enumerate(values_in_order, 1)}


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Euclidean distance (欧氏距离)."""
    return math.dist(a, b)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine similarity (余弦相似性): of the angle between a and b, neither of which is 0."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def standardized(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each column scaled to mean 0 and deviation 1 over the rows. No column may be constant."""
    columns = [[(x - fmean(column)) / pstdev(column) for x in column] for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The W [d + 1, q] of least |[x, 1] W - y|^2 + RIDGE |W|^2, for x [n, d] and y [n, q]."""
    x = _with_ones(x)
    W: Tensor = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return W


def accuracy_by_regression(training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], numbers: Tensor) -> float:
    """Regress on numbers[label], and take the class whose number is nearest. x [n, d], labels [n], numbers [q]."""
    (x, labels), (x_test, labels_test) = training, test
    W = least_squares(x, numbers[labels][:, None].to(x.dtype))
    nearest = (_with_ones(x_test) @ W - numbers).abs().argmin(1)
    return (nearest == labels_test).double().mean().item()


def accuracy_by_one_hot(training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], numbers: Tensor) -> float:
    """Regress on the one-hot code of numbers[label], and take the class with the greatest value."""
    (x, labels), (x_test, labels_test) = training, test
    W = least_squares(x, torch.eye(len(numbers), dtype=x.dtype)[numbers[labels]])
    return ((_with_ones(x_test) @ W).argmax(1) == numbers[labels_test]).double().mean().item()


def tensors(dataset: data.FashionMNIST) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pixels in [0, 1] as [n, 784] float64, and labels [n] int64: training, test."""
    pairs = ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels))
    training, test = ((torch.tensor(x).flatten(1).double() / 255, torch.tensor(y).long()) for x, y in pairs)
    return training, test


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m fmnist.codes", description="regression on two codes of the class")
    parser.add_argument("--data", metavar="DIR", help="as of python -m fmnist train")
    return exit_code(lambda: run(parser.parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    dataset = data.load(arguments.data)
    training, test = tensors(dataset)
    print(f"least squares on {len(training[1])} images of {dataset.source}; accuracy on {len(test[1])} test images")
    for title, numbers in (("classes as they are numbered", range(10)), ("numbered otherwise", RENUMBERED)):
        as_number = accuracy_by_regression(training, test, torch.tensor(numbers))
        as_one_hot = accuracy_by_one_hot(training, test, torch.tensor(numbers))
        print(f"{title:29} as a number {as_number:.4f}   as a one-hot code {as_one_hot:.4f}")


if __name__ == "__main__":
    sys.exit(main())

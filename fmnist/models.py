"""The models by name. Each maps images [n, 784] of floats in [0, 1] to logits [n, 10]."""

from collections.abc import Callable

from torch import nn

N_PIXELS = 28 * 28
N_CLASSES = 10


def softmax_regression() -> nn.Module:
    """One fully connected layer, o = x W + b: its softmax is the model's belief in each class.

    W ~ N(0, 0.01^2) and b = 0, as in "Dive into Deep Learning", section 3.6. A linear model: softmax keeps the order
    of the logits, so that the boundary between two classes is a plane.
    """
    layer = nn.Linear(N_PIXELS, N_CLASSES)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


MODELS: dict[str, Callable[[], nn.Module]] = {"softmax": softmax_regression}

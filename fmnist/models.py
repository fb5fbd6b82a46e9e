"""The models by name, a ladder of three. Each maps images [n, 784] of floats in [0, 1] to logits [n, 10].

None of them draws random numbers after its first weights: no dropout, so that a run's generators are those of its data.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIDE = 28
N_PIXELS = SIDE * SIDE
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


def mlp() -> nn.Module:
    """Two hidden layers of 256 units with ReLU: what is between two classes may bend."""
    return nn.Sequential(
        nn.Linear(N_PIXELS, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, N_CLASSES),
    )


def cnn() -> nn.Module:
    """Two convolutions and two fully connected layers, after LeNet-5 (LeCun et al., 1998), with ReLU and 3 x 3 kernels.

    The layers above have to learn a collar anew at every place; a convolution learns it once. The maximum is taken
    before ReLU, which changes nothing but the number of ReLUs. The channels lie last in memory, which on a CPU halves
    the time of a step.
    """
    layers = nn.Sequential(
        Image(),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, N_CLASSES),
    )
    layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return layers


class Image(nn.Module):
    """Pixels [n, 784] as images [n, 1, 28, 28]."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.view(-1, 1, SIDE, SIDE)


MODELS: dict[str, Callable[[], nn.Module]] = {"softmax": softmax_regression, "mlp": mlp, "cnn": cnn}

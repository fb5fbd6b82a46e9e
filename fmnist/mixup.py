"""Mixup: training on mixtures of two images, with the same mixture of their labels as the target.

    x~ = lambda x_i + (1 - lambda) x_j,    y~ = lambda y_i + (1 - lambda) y_j,    lambda ~ Beta(alpha, alpha)

Zhang, Cisse, Dauphin and Lopez-Paz (2018), "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412. One lambda a
batch, as there. The partner j is the image before i: the batches are shuffled, so that this is a random pairing, and
nothing more has to be drawn or sent to the device.
"""

import numpy as np
from torch import Tensor

from .losses import one_hot


def weights(alpha: float, n_batches: int, seed: int, epoch: int) -> list[float]:
    """Each batch's lambda of one epoch. A function of its arguments: a run that resumes needs no generator's state."""
    drawn: list[float] = np.random.default_rng((seed, epoch)).beta(alpha, alpha, n_batches).tolist()
    return drawn


def mix(images: Tensor, labels: Tensor, weight: float, n_classes: int) -> tuple[Tensor, Tensor]:
    """Images [n, ...] and labels [n] as mixed images, and targets [n, n_classes] in the images' dtype."""
    targets = one_hot(labels, n_classes, images.dtype)
    return images.roll(1, 0).lerp(images, weight), targets.roll(1, 0).lerp(targets, weight)

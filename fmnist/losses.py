"""The losses by name. Each takes logits [n, C], a target, a reduction and label smoothing, as PyTorch's does.

A target is class indices [n] or probabilities [n, C]; label smoothing mixes it with the uniform distribution. A
`normalizer` is what the mean divides by instead of n, where the rows are a part of a minibatch.

    fused   softxent's cross-entropy
    torch   torch.nn.functional.cross_entropy, the same function
    mse     half the squared distance between softmax(logits) and the target, which the books argue against: it tells
            (0.2, 0.2, 0.6) from (0, 0.4, 0.6) though both name the right class with 0.6, and where the model is
            surely wrong its gradient vanishes with softmax's, while that of the cross-entropy is p - y
    one-op  o = x W + b, softmax and cross-entropy as one operation, which never has all of the logits
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softxent


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | None = None,
) -> Tensor:
    """PyTorch's."""
    if normalizer is None:
        return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
    return F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing) / normalizer


def squared_error(
    logits: Tensor,
    target: Tensor,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | None = None,
) -> Tensor:
    """1/2 |softmax(logits) - target|^2 of each row, in [0, 1]; "mean" over the rows, or "sum".

    Args:
        logits: [n, C], floating point.
        target: class indices [n], int64, or probabilities [n, C].
    """
    n_classes = logits.shape[1]
    y = target if target.is_floating_point() else one_hot(target, n_classes, logits.dtype)
    y = (1 - label_smoothing) * y + label_smoothing / n_classes
    total = (softxent.softmax(logits, dim=1) - y).square().sum() / 2
    return total / (len(logits) if normalizer is None else normalizer) if reduction == "mean" else total


def one_hot(labels: Tensor, n_classes: int, dtype: torch.dtype) -> Tensor:
    """Labels [n] as [n, n_classes] of zeros and a one. Unlike F.one_hot, it reads no value from the device."""
    return (labels[:, None] == torch.arange(n_classes, device=labels.device)).to(dtype)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "fused": softxent.fused_softmax_xent,
    "torch": cross_entropy,
    "mse": squared_error,
    "one-op": softxent.fused_softmax_xent,  # where logits are there already
}
UNITS = dict.fromkeys(LOSSES, "cross-entropy (nats)") | {"mse": "half the squared error"}


def loss_and_prediction(
    name: str,
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    label_smoothing: float,
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of a minibatch by the loss of that name, and the likeliest class of each image [n]."""
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "normalizer": normalizer}
    if name != "one-op":
        logits = model(images)
        return LOSSES[name](logits, target, **options), logits.detach().argmax(1)
    layers = model if isinstance(model, nn.Sequential) else nn.Sequential(model)
    head = layers[-1]
    assert isinstance(head, nn.Linear)
    found = softxent.fused_linear_softmax_xent_with_stats(
        layers[:-1](images), head.weight, target, head.bias, stats="prediction", **options
    )
    assert found.prediction is not None
    return found.loss, found.prediction

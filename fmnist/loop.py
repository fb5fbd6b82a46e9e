"""The loop that every model and every loss shares: minibatches from memory, forward, loss, backward, a step of SGD.

The whole dataset is on the device. Nothing is read from the device until an epoch is over.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import softxent

from . import mixup
from .config import Config
from .data import FashionMNIST
from .losses import loss_and_prediction
from .models import N_CLASSES
from .ranks import ALONE, Ranks

MEASURED_AT_ONCE = 10_000  # images whose loss is summed by one call
FORWARD_AT_ONCE = 1000  # images whose hidden layers are in memory at once


@dataclass
class Split:
    """Images [n, 28, 28] and labels [n], uint8, on the device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: slice) -> "Split":
        return Split(self.images[rows], self.labels[rows])

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] as [n, 784] float32, and labels as int64."""
        return self.images[rows].flatten(1).float().div_(255), self.labels[rows].long()


def splits(dataset: FashionMNIST, place: torch.device | str = "cpu") -> tuple[Split, Split]:
    """Training and test, on the device."""
    images, labels, test_images, test_labels = (torch.tensor(x, device=place) for x in dataset[:4])
    return Split(images, labels), Split(test_images, test_labels)


def learning_rate(config: Config, step: int, n_steps: int) -> float:
    """Of step 0, 1, ..., n_steps - 1: the same for all, or falling linearly from `config.lr` to 0 after the last."""
    return config.lr if config.schedule == "constant" else config.lr * (1 - step / n_steps)


class Objective(nn.Module):
    """The model with its loss, as one module: what DistributedDataParallel has to wrap, whichever loss it is."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        super().__init__()
        self.config, self.model = config, model

    def forward(self, images: Tensor, target: Tensor, normalizer: float | None) -> tuple[Tensor, Tensor]:
        return loss_and_prediction(
            self.config.loss, self.model, images, target, self.config.label_smoothing, normalizer
        )


def one_epoch(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: Split,
    shuffle: torch.Generator,
    epoch: int,
    after_step: Callable[[Tensor], None] = lambda loss: None,
    ranks: Ranks = ALONE,
    objective: nn.Module | None = None,
) -> tuple[float, float]:
    """Train for epoch 1, 2, ...; the loss and the accuracy over it, each batch as it was met.

    `after_step` is given each batch's loss, a scalar on the device.
    With mixup the right class of an image is that of its larger part.
    Each of the ranks shuffles all images alike, and takes its part of each batch. `objective` is the Objective of
    `model`, wrapped for them.
    """
    objective = objective or Objective(config, model)
    n = len(training.labels)
    place = training.labels.device
    order = torch.randperm(n, generator=shuffle).to(place)
    starts = range(0, n, config.batch_size)
    mixed = mixup.weights(config.mixup, len(starts), config.seed, epoch) if config.mixup else None
    losses = torch.zeros(len(starts), device=place)
    right = torch.zeros(len(starts), device=place)
    for i, start in enumerate(starts):
        rows = order[start : start + config.batch_size]
        mine = ranks.part(len(rows))
        if mixed:  # with images of other parts, too
            images, target = (x[mine] for x in mixup.mix(*training.batch(rows), mixed[i], N_CLASSES))
            labels = target.argmax(1)
        else:
            images, labels = training.batch(rows[mine])
            target = labels
        divisor = ranks.divisor(len(rows))
        loss, prediction = objective(images, target, divisor)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, (epoch - 1) * len(starts) + i, config.epochs * len(starts))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses[i] = loss.detach() * (divisor or len(labels))
        right[i] = (prediction == labels).sum()
        after_step(loss.detach())
    loss_sum, n_right = ranks.sum([losses.cpu().double().sum().item(), right.cpu().double().sum().item()])
    return loss_sum / n, n_right / n


@torch.no_grad()
def logits_of(model: nn.Module, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [n, 10] and labels [n], some images at a time."""
    for start in range(0, len(split.labels), MEASURED_AT_ONCE):
        images, labels = split.batch(slice(start, start + MEASURED_AT_ONCE))
        yield torch.cat([model(part) for part in images.split(FORWARD_AT_ONCE)]), labels


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    loss_of: Callable[..., Tensor] = softxent.fused_softmax_xent,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """The mean of the loss, and accuracy: each of the ranks measures its part of the split."""
    n = len(split.labels)
    loss = right = torch.zeros((), device=split.labels.device)
    for logits, labels in logits_of(model, split.part(ranks.part(n))):
        loss = loss + loss_of(logits, labels, reduction="sum")
        right = right + (logits.argmax(1) == labels).sum()
    loss_sum, n_right = ranks.sum([loss.item(), right.item()])
    return loss_sum / n, n_right / n

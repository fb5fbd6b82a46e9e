"""How good a classifier is, from one pass over its logits: softxent's stats tell all of it but the confidence.

loss           the mean cross-entropy, in nats
perplexity     exp(loss): of how many equally likely classes such a loss would be
accuracy       how often the likeliest class is the right one
calibration    how far the confidence is from the accuracy: the expected calibration error, in 15 equal bins of
               confidence the distance between the two, weighed by the images in the bin (Naeini, Cooper and
               Hauskrecht, 2015; Guo et al., 2017, "On Calibration of Modern Neural Networks")
confusion      how many images of each class were taken for each class
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from softxent import fused_softmax_xent_with_stats

BINS = 15


@dataclass(frozen=True, eq=False)
class Metrics:
    n: int  # images
    loss: float
    accuracy: float
    calibration_error: float
    confusion: Tensor  # [C, C] int64 on the CPU: rows are true classes, columns predicted ones; without NaN logits

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def class_accuracy(self) -> Tensor:
        """[C] float64: the share of each class's images that were taken for it. NaN for a class without images."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)


@torch.no_grad()
def measure(batches: Iterable[tuple[Tensor, Tensor]]) -> Metrics:
    """Of logits [n, C] and labels [n], batch by batch. Sums stay on the device until the end."""
    n = 0
    loss: Tensor | float = 0.0
    bins: Tensor | float = 0.0  # [3, BINS]: images, right ones, and the sum of their confidences
    confusion: Tensor | int = 0  # [C * C]
    for logits, labels in batches:
        stats = ("lse", "prediction", "correct")
        found = fused_softmax_xent_with_stats(logits, labels, reduction="sum", stats=stats, loss_dtype=torch.float32)
        assert found.lse is not None and found.prediction is not None and found.correct is not None
        predicted = found.prediction.clamp(min=0)  # -1 where the logits are NaN
        confidence = (logits.gather(1, predicted[:, None])[:, 0].to(found.lse.dtype) - found.lse).exp()
        which = (confidence.nan_to_num(0) * BINS).long().clamp(0, BINS - 1)
        of_batch = torch.stack([torch.ones_like(confidence), found.correct.to(confidence.dtype), confidence])
        bins = bins + torch.zeros(3, BINS, device=logits.device, dtype=torch.float64).index_add_(
            1, which, of_batch.double()
        )
        n_classes = logits.shape[1]
        counts = torch.zeros(n_classes**2, device=logits.device, dtype=torch.int64)
        valid = (found.prediction >= 0).long()
        confusion = confusion + counts.index_add_(0, labels.long() * n_classes + predicted, valid)
        loss = loss + found.loss.double()
        n += len(labels)
    if n == 0:
        raise ValueError("no images to measure")
    assert isinstance(loss, Tensor) and isinstance(bins, Tensor) and isinstance(confusion, Tensor)
    _, right, confidence = bins.cpu()
    gaps = (right - confidence).abs().sum()
    matrix = confusion.cpu().view(n_classes, n_classes)
    return Metrics(n, loss.item() / n, right.sum().item() / n, gaps.item() / n, matrix)

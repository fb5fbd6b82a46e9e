"""The squared loss and mixup, against their definitions and the numbers of the notes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmnist import mixup
from fmnist.losses import LOSSES, one_hot, squared_error

LOGITS = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)) * 3
LABELS = torch.arange(7)


def test_the_squared_error_tells_apart_what_the_cross_entropy_does_not() -> None:
    """The notes' example: the right class has 0.6 either way."""
    logits = torch.tensor([[0.2, 0.2, 0.6], [1e-30, 0.4, 0.6]]).log()
    label = torch.tensor([2])
    squared = [squared_error(row[None], label).item() for row in logits]
    entropies = [LOSSES["fused"](row[None], label).item() for row in logits]
    np.testing.assert_allclose(squared, [0.12, 0.16], rtol=1e-6)
    np.testing.assert_allclose(entropies, [0.5108256] * 2, rtol=1e-6)


def test_the_squared_error_hardly_corrects_a_model_that_is_surely_wrong() -> None:
    """Its gradient is softmax's derivative times p - y; that of the cross-entropy is p - y."""
    logits = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)
    label = torch.tensor([1])
    squared, entropy = (
        torch.autograd.grad(loss(logits, label), logits)[0].abs().max().item()
        for loss in (squared_error, LOSSES["fused"])
    )
    assert squared < 1e-7 and entropy > 0.999


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_squared_error_is_its_definition_for_either_kind_of_target(smoothing: float) -> None:
    p = F.softmax(LOGITS.double(), 1)
    y = F.one_hot(LABELS, 10).double() * (1 - smoothing) + smoothing / 10
    expected = (p - y).square().sum(1) / 2
    for target in (LABELS, F.one_hot(LABELS, 10).float()):
        for reduction, value in (("mean", expected.mean()), ("sum", expected.sum())):
            found = squared_error(LOGITS, target, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=0)


def test_one_hot_is_torchs() -> None:
    assert torch.equal(one_hot(LABELS, 10, torch.float32), F.one_hot(LABELS, 10).float())


def test_mixup_is_the_mixture_of_an_image_and_the_one_before_and_of_their_labels() -> None:
    images = torch.rand(7, 784)
    mixed, targets = mixup.mix(images, LABELS, 0.3, 10)
    for i in range(7):
        torch.testing.assert_close(mixed[i], 0.3 * images[i] + 0.7 * images[i - 1])
        assert targets[i].nonzero()[:, 0].tolist() == sorted([i, (i - 1) % 7])
        torch.testing.assert_close(targets[i][[i, (i - 1) % 7]], torch.tensor([0.3, 0.7]))
    alone, target = mixup.mix(images[:1], LABELS[:1], 0.3, 10)
    torch.testing.assert_close(alone, images[:1])
    torch.testing.assert_close(target, F.one_hot(LABELS[:1], 10).float())


def test_mixups_weights_are_beta_distributed_and_a_function_of_seed_and_epoch() -> None:
    drawn = np.array(mixup.weights(0.2, 20_000, seed=1, epoch=1))
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(drawn.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.005
    assert mixup.weights(0.2, 9, 1, 1) == drawn[:9].tolist() != mixup.weights(0.2, 9, 1, 2)
    assert mixup.weights(0.2, 9, 1, 2) != mixup.weights(0.2, 9, 2, 1)

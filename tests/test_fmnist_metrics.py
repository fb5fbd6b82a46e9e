"""The measures of a classifier, against what their definitions say, image by image."""

import math

import pytest
import torch
import torch.nn.functional as F

from fmnist.metrics import BINS, measure


def test_measures_are_those_of_their_definitions(path: str, device: torch.device) -> None:
    logits = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)) * 2
    labels = torch.where(torch.arange(500) % 3 == 0, torch.arange(500) % 10, logits.argmax(1))
    batches = [(z.to(device), y.to(device)) for z, y in zip(logits.split(120), labels.split(120), strict=True)]
    found = measure(batches)

    p = torch.softmax(logits.double(), 1)
    confidence, predicted = p.max(1)
    right = (predicted == labels).double()
    error = 0.0
    for i in range(BINS):
        inside = (confidence * BINS).long() == i
        if inside.any():
            error += inside.sum().item() / 500 * abs(right[inside].mean() - confidence[inside].mean()).item()
    assert found.n == 500
    assert found.accuracy == right.mean().item()
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, labels).item())
    torch.testing.assert_close(found.perplexity, math.exp(found.loss))
    torch.testing.assert_close(found.calibration_error, error, rtol=1e-5, atol=1e-7)
    for i in range(10):
        of_class = predicted[labels == i]
        assert found.confusion[i].tolist() == [int((of_class == j).sum()) for j in range(10)]
        assert found.class_accuracy[i].item() == (of_class == i).double().mean().item()


def test_a_sure_and_right_classifier_is_calibrated_and_a_sure_and_wrong_one_is_not() -> None:
    labels = torch.arange(10)
    logits = F.one_hot(labels).float() * 100
    assert measure([(logits, labels)]).calibration_error < 1e-6
    assert measure([(logits, labels.roll(1))]).calibration_error > 1 - 1e-6
    uniform = measure([(torch.zeros(10, 10), labels)])
    torch.testing.assert_close(uniform.perplexity, 10.0, rtol=1e-5, atol=0)
    assert uniform.accuracy == 0.1 and uniform.calibration_error < 1e-6


def test_a_class_without_images_has_no_accuracy_and_a_nan_is_taken_for_no_class() -> None:
    logits = F.one_hot(torch.tensor([0, 1, 1]), 3).float()
    logits[2] = math.nan
    found = measure([(logits, torch.tensor([0, 1, 1]))])
    assert found.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert found.class_accuracy[:2].tolist() == [1, 1] and math.isnan(found.class_accuracy[2])
    assert found.accuracy == 2 / 3


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(ValueError, match="no images"):
        measure([])


def test_the_perplexity_of_a_diverged_classifier_is_infinite() -> None:
    logits = torch.tensor([[0.0, 800.0]])
    assert measure([(logits, torch.tensor([0]))]).perplexity == math.inf

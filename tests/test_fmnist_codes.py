"""Codes of a class: what a regression makes of each."""

import doctest

import pytest
import torch

import fmnist.data
from fmnist import codes


def test_the_examples_run_as_they_are_written() -> None:
    found = doctest.testmod(codes)
    assert found.failed == 0 and found.attempted >= 5


def test_least_squares_leaves_no_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 5, generator=generator, dtype=torch.float64)
    y = torch.rand(40, 2, generator=generator, dtype=torch.float64)
    W = codes.least_squares(x, y).requires_grad_()
    ones = torch.ones(40, 1, dtype=torch.float64)
    loss = (torch.cat([x, ones], 1) @ W - y).square().sum() + codes.RIDGE * W.square().sum()
    (slope,) = torch.autograd.grad(loss, W)
    assert slope.abs().max() < 1e-12


def test_one_hot_does_not_mind_the_numbering_and_a_number_does() -> None:
    training, test = codes.tensors(fmnist.data.load("sample"))
    given, renumbered = torch.arange(10), torch.tensor(codes.RENUMBERED)
    one_hot = codes.accuracy_by_one_hot(training, test, given)
    assert codes.accuracy_by_one_hot(training, test, renumbered) == pytest.approx(one_hot, abs=0.003)  # ties of floats
    as_number = [codes.accuracy_by_regression(training, test, numbers) for numbers in (given, renumbered)]
    assert abs(as_number[0] - as_number[1]) > 0.02
    assert one_hot > max(as_number) + 0.3


def test_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert codes.main(["--data", "sample"]) == 0
    out = capsys.readouterr().out
    assert "as they are numbered" in out and out.count("as a one-hot code 0.8") == 2
    assert codes.main(["--data", "/nonexistent"]) == 2
    assert capsys.readouterr().err.startswith("fmnist: ")


def test_a_class_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="class 3"):
        codes.one_hot(3, 3)

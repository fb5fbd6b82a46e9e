"""The data in figures, each against what it should be or against another way of counting."""

import numpy as np
import pytest
import torch

import fmnist.data
from fmnist import describe
from fmnist.errors import UserError
from fmnist.train import Split
from fmnist_command import run


def test_checksums_are_of_what_was_read() -> None:
    dataset = fmnist.data.load("sample")
    assert describe.checksums(dataset) == fmnist.data.SAMPLE_SHA256
    other = dataset.train_images.copy()
    other[0, 0, 0] ^= 1
    changed = describe.checksums(dataset._replace(train_images=other))
    assert [name for name, sha in changed.items() if sha != fmnist.data.SAMPLE_SHA256[name]] == [
        "train-images-idx3-ubyte"
    ]


def test_every_image_is_counted_in_its_class() -> None:
    dataset = fmnist.data.load("sample")
    for k, (name, n_train, n_test) in enumerate(describe.class_counts(dataset)):
        assert name == fmnist.data.LABELS[k]
        assert n_train == (dataset.train_labels == k).sum() and n_test == (dataset.test_labels == k).sum()


def test_moments_are_numpys() -> None:
    images = fmnist.data.load("sample").train_images
    mean, deviation = describe.pixel_moments(images)
    assert mean == pytest.approx((images / 255).mean(), rel=1e-12)
    assert deviation == pytest.approx((images / 255).std(), rel=1e-12)


def test_the_rate_counts_whole_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks a second at every reading: 100 images an epoch, and an epoch a second."""
    split = Split(torch.zeros(100, 28, 28, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8))
    ticks = iter(np.arange(100.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert describe.batcher_rate(split, 32, seconds=3) == pytest.approx(100 * 2 / 3)


def test_the_command_prints_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    run(describe, "--batch-size", "64")
    out = capsys.readouterr().out
    for text in (
        "source: the embedded sample (NOT THE FULL DATASET)",
        fmnist.data.SAMPLE_SHA256["t10k-labels-idx1-ubyte"],
        "Ankle boot",
        "mean 0.2",
        "reader: ",
        "in batches of 64, on cpu (asked for)",
    ):
        assert text in out
    assert [line.split()[1:] for line in out.splitlines() if line.startswith("all ")] == [["2000", "500"]]


def test_what_cannot_be_described_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(describe, "--batch-size", "0")
    assert "argument --batch-size: invalid value '0'" in capsys.readouterr().err
    with pytest.raises(UserError, match="/nonexistent does not exist"):
        run(describe, data="/nonexistent")

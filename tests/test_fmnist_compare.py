"""Runs over each other: in what they differ, how they ended, and what is no run."""

from pathlib import Path

import pytest

from fmnist.__main__ import main
from fmnist_runs import run, without_pictures
from softxent import dispatch


def test_the_table_has_what_differs_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    without_pictures(monkeypatch)
    first = run(tmp_path, name="first", lr=0.1)
    second = run(tmp_path, name="second", lr=0.2, loss="mse", validation=100, epochs=3)
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("first", "second")]
    assert main(["compare", *folders, "--output", str(tmp_path / "c.png")]) == 0
    same, head, one, two, *_ = capsys.readouterr().out.splitlines()
    assert same == "the same: model softmax, seed 1"
    assert head.split() == [
        *("run", "loss", "epochs", "lr", "validation"),
        *("epochs", "train", "loss", "validation", "accuracy", "test", "accuracy", "seconds"),
    ]
    end = first[-1]
    assert one.split()[:-1] == [
        *("first", "fused", "2", "0.1", "0", "2"),
        f"{first[-2]['train_loss']:.4f}",
        f"{end['test_accuracy']:.4f}",
    ]
    assert two.split()[:-1] == [
        *("second", "mse", "3", "0.2", "100", "3"),
        f"{second[-2]['train_loss']:.4f}",
        f"{second[-2]['validation_accuracy']:.4f}",
        f"{second[-1]['test_accuracy']:.4f}",
    ]
    assert (tmp_path / "c.png").stat().st_size > 10_000

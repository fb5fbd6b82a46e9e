"""Short runs on the embedded sample, and their records, for the tests of what is around them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fmnist import plots, train


def run(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Two epochs, unless told otherwise, in folder/run."""
    defaults: dict[str, Any] = {"data": "sample", "epochs": 2, "runs": str(folder), "name": "run"}
    train.train(train.Config(**defaults | options))
    return records(folder / str((defaults | options)["name"]))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    varying = {"seconds", "images_per_second", "runs", "name", "loss", "date", "command"}
    return [{key: value for key, value in record.items() if key not in varying} for record in records]


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a short run, and one test looks at them."""
    for name in ("curves", "predictions", "mistakes", "confusion", "templates"):
        monkeypatch.setattr(plots, name, lambda *_: None)

"""What a run is asked to do: every setting, each with a default, and the recipes of the larger models."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from .errors import UserError
from .losses import LOSSES
from .models import MODELS

FILE = "config.json"
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class Config:
    """The recipe of "Dive into Deep Learning", section 3.6, unless told otherwise. UserError for what cannot be."""

    model: str = "softmax"
    loss: str = "fused"
    label_smoothing: float = 0.0  # in [0, 1]
    mixup: float = 0.0  # alpha of the Beta distribution; 0: none
    schedule: str = "constant"
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.1  # of the first step
    momentum: float = 0.0  # in [0, 1)
    seed: int = 1
    validation: int = 0  # the last so many training images are kept out of training, and measured after each epoch
    threads: int = 1  # of the CPU; 0: as many as torch takes
    device: str = "auto"
    data: str | None = None
    require_full_data: bool = False
    runs: str = "runs"
    name: str | None = None  # of the folder in `runs`; None: made from the model, the loss, and the time
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("model", MODELS), ("loss", LOSSES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} {getattr(self, name)!r}: it is one of {', '.join(choices)}")
        if self.epochs < 1 or self.batch_size < 1:
            raise UserError(f"epochs and batch size are at least 1, not {self.epochs} and {self.batch_size}")
        if self.validation < 0 or self.threads < 0:
            raise UserError(f"validation and threads are at least 0, not {self.validation} and {self.threads}")
        if self.name and (PurePath(self.name).is_absolute() or ".." in PurePath(self.name).parts):
            raise UserError(f"--name {self.name} is not a folder within {self.runs}; --runs DIR chooses another place")
        for name, holds, range_ in (
            ("lr", 0 < self.lr < float("inf"), "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("label smoothing", 0 <= self.label_smoothing <= 1, "in [0, 1]"),
            ("mixup", 0 <= self.mixup < float("inf"), "at least 0"),
        ):
            if not holds:
                raise UserError(f"{name} is a number {range_}, not {getattr(self, name.replace(' ', '_'))}")

    @property
    def softened(self) -> bool:
        """Whether the targets of training are not the labels: its loss is then another quantity than the test's."""
        return self.label_smoothing > 0 or self.mixup > 0

    def summary(self) -> str:
        """What tells a run from others, in a line: of the options only those that are used."""
        falling = " falling to 0" if self.schedule == "linear" else ""
        parts = [f"{self.model}, {self.loss} loss, lr {self.lr}{falling}, batch {self.batch_size}"]
        for name in ("momentum", "label_smoothing", "mixup", "validation"):
            if getattr(self, name):
                parts.append(f"{name.replace('_', ' ')} {getattr(self, name)}")
        return ", ".join([*parts, f"seed {self.seed}"])


# Where a model's recipe is not that of `Config`: a rate that falls to 0 makes the end of training independent of which
# images came last, and momentum spares half the epochs. One layer is too little work for two threads: they wait for
# each other longer than they compute where something else runs too.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "softmax": MappingProxyType({}),
        "mlp": MappingProxyType({"epochs": 15, "lr": 0.1, "momentum": 0.9, "schedule": "linear", "threads": 0}),
        "cnn": MappingProxyType(
            {"epochs": 10, "batch_size": 128, "lr": 0.05, "momentum": 0.9, "schedule": "linear", "threads": 0}
        ),
    }
)


def of_model(**given: Any) -> Config:
    """The settings that were given, the rest from the model's recipe, the rest from `Config`."""
    return Config(**{**RECIPES.get(given.get("model", Config.model), {}), **given})


def read(path: Path) -> dict[str, Any]:
    """The settings in a run's config.json, or in the folder that has it. UserError if there are none, or others."""
    path = path / FILE if path.is_dir() else path
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        Config(**settings)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds no settings of this version: {error}") from error
    found: dict[str, Any] = settings
    return found

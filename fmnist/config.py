"""What a run is asked to do: every setting, each with a default, and the recipes of the larger models."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .errors import UserError
from .losses import LOSSES
from .models import MODELS

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
    device: str = "auto"
    data: str | None = None
    require_full_data: bool = False
    runs: str = "runs"
    name: str | None = None  # of the folder in `runs`; None: made from the model, the loss, and the time

    def __post_init__(self) -> None:
        for name, choices in (("model", MODELS), ("loss", LOSSES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} {getattr(self, name)!r}: it is one of {', '.join(choices)}")
        if self.epochs < 1 or self.batch_size < 1:
            raise UserError(f"epochs and batch size are at least 1, not {self.epochs} and {self.batch_size}")
        for name, holds, range_ in (
            ("lr", 0 < self.lr < float("inf"), "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("label smoothing", 0 <= self.label_smoothing <= 1, "in [0, 1]"),
            ("mixup", 0 <= self.mixup < float("inf"), "at least 0"),
        ):
            if not holds:
                raise UserError(f"{name} is a number {range_}, not {getattr(self, name.replace(' ', '_'))}")


# Where a model's recipe is not that of `Config`: a rate that falls to 0 makes the end of training independent of which
# images came last, and momentum spares half the epochs.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "softmax": MappingProxyType({}),
        "mlp": MappingProxyType({"epochs": 15, "lr": 0.1, "momentum": 0.9, "schedule": "linear"}),
        "cnn": MappingProxyType({"epochs": 10, "batch_size": 128, "lr": 0.05, "momentum": 0.9, "schedule": "linear"}),
    }
)


def of_model(**given: Any) -> Config:
    """The settings that were given, the rest from the model's recipe, the rest from `Config`."""
    return Config(**{**RECIPES.get(given.get("model", Config.model), {}), **given})

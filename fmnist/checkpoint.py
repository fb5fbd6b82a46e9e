"""A trained model in a file, model.safetensors: its weights, and in the metadata its name and how it was trained."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from . import files
from .errors import UserError
from .models import MODELS

FORMAT = "softxent.fmnist/2"
FILE = "model.safetensors"


def save(path: Path, model_name: str, model: nn.Module, config: dict[str, Any]) -> None:
    """Write the checkpoint; `path` is never seen half written."""
    metadata = {"format": FORMAT, "model": model_name, "config": json.dumps(config)}
    files.write_tensors(path, model.state_dict(), metadata)


def load(path: Path, expect: str | None = None) -> tuple[str, nn.Module]:
    """The model's name and the model, on the CPU. UserError if the file holds none, or not the one named `expect`."""
    tensors, metadata = files.read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program (its format is not {FORMAT!r})")
    name = metadata.get("model", "")
    if name not in MODELS or (expect is not None and name != expect):
        raise UserError(f"{path} is a checkpoint of the model {name!r}, not of {expect or ' or '.join(MODELS)!r}")
    model = MODELS[name]()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path}: its weights do not fit the model {name!r}: {why}") from error
    damaged = [name for name, x in tensors.items() if not x.isfinite().all()]
    if damaged:
        raise UserError(
            f"{path}: values of {', '.join(damaged)} are no numbers: the file is damaged, or the training diverged"
        )
    return name, model

"""A trained model in a file: its name, its weights, and how it was trained."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .models import MODELS

FORMAT = "softxent.fmnist/1"


def save(path: Path, model_name: str, model: nn.Module, config: dict[str, Any]) -> None:
    """Write the checkpoint; `path` is never seen half written."""
    temporary = path.with_suffix(".partial")
    torch.save({"format": FORMAT, "model": model_name, "state": model.state_dict(), "config": config}, temporary)
    os.replace(temporary, path)


def load(path: Path, expect: str | None = None) -> tuple[str, nn.Module]:
    """The model's name and the model, on the CPU. UserError if the file holds none, or not the one named `expect`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"the checkpoint {path} does not exist") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a checkpoint, or not a whole one ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program (its format is not {FORMAT!r})")
    name = content.get("model")
    if name not in MODELS or (expect is not None and name != expect):
        raise UserError(f"{path} is a checkpoint of the model {name!r}, not of {expect or ' or '.join(MODELS)!r}")
    model = MODELS[name]()
    try:
        model.load_state_dict(content["state"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: its weights do not fit the model {name!r}: {error}") from error
    return name, model

"""What the next epoch depends on, in a file, resume.safetensors: with it a run goes on as if nothing had happened.

The weights, what the optimizer remembers of each, the generator that shuffles, and the number of epochs done. The rest
is a function of these and of the settings: the rate of a step, the mixtures of an epoch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files
from .config import Config
from .errors import UserError
from .models import MODELS

FORMAT = "softxent.fmnist.state/1"
FILE = "resume.safetensors"


@dataclass
class State:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    shuffle: torch.Generator  # on the CPU
    epoch: int  # epochs done

    @classmethod
    def fresh(cls, config: Config, place: torch.device) -> "State":
        """Before the first epoch. Seeds torch's own generator, which draws the first weights."""
        torch.manual_seed(config.seed)
        model = MODELS[config.model]().to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
        return cls(model, optimizer, torch.Generator().manual_seed(config.seed), 0)

    def save(self, path: Path) -> None:
        """One file, so that no crash leaves the parts of two epochs."""
        files.write_tensors(path, self.tensors(), {"format": FORMAT, "epoch": json.dumps(self.epoch)})

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the number of epochs, by name."""
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        for i, remembered in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": x for name, x in remembered.items() if isinstance(x, Tensor)}
        return tensors | {"shuffle": self.shuffle.get_state()}

    @classmethod
    def load(cls, path: Path, config: Config, place: torch.device) -> "State":
        """As it was saved, on `place`. UserError if the file is not the state of such a run."""
        tensors, metadata = files.read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not the state of a run (its format is not {FORMAT!r})")
        try:
            return cls.of(tensors, int(metadata["epoch"]), config, place)
        except (IndexError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is not the state of a run of the model {config.model!r}") from error

    @classmethod
    def of(cls, tensors: dict[str, Tensor], epoch: int, config: Config, place: torch.device) -> "State":
        state = cls.fresh(config, place)
        state.model.load_state_dict(_below("model.", tensors))
        state._remember(_below("optimizer.", tensors))
        state.shuffle.set_state(tensors["shuffle"])
        state.epoch = epoch
        return state

    def _remember(self, tensors: dict[str, Tensor]) -> None:
        """The optimizer's tensors, named "<number of the parameter>.<name>", each laid out in memory as its parameter.

        Another layout has the same values, but another loop adds to them, and rounds otherwise.
        """
        parameters = list(self.model.parameters())
        remembered: dict[int, dict[str, Any]] = {}
        for name, x in tensors.items():
            number, name = name.split(".", 1)
            like = parameters[int(number)]
            remembered.setdefault(int(number), {})[name] = (
                torch.empty_like(like, requires_grad=False).copy_(x) if x.dim() else x
            )
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": remembered, "param_groups": groups})


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

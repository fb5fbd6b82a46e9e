"""The curves of a run for TensorBoard, by PyTorch's own writer: `tensorboard --logdir runs` shows all runs together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CannotWrite, UserError


def require() -> Any:
    """The writer's class; UserError if TensorBoard is not installed, for a long run to ask before it begins."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter


@contextmanager
def writer(folder: Path, wanted: bool, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes an epoch's record. What was written of epochs after `done` no longer counts."""
    if not wanted:
        yield lambda epoch: None
        return
    try:
        board = require()(folder, purge_step=done + 1)
    except OSError as error:
        raise CannotWrite(f"cannot write {folder}: {error.strerror}") from error

    def add(epoch: dict[str, Any]) -> None:
        for name, value in epoch.items():
            split, _, quantity = name.rpartition("_")  # "train_loss" goes to loss/train: one picture a quantity
            if quantity in ("loss", "accuracy"):
                board.add_scalar(f"{quantity}/{split}", value, epoch["epoch"])
        board.add_scalar("lr", epoch["lr"], epoch["epoch"])
        board.flush()

    try:
        yield add
    finally:
        board.close()

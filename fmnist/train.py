"""Training: minibatch SGD on the cross-entropy, the whole dataset in memory, and a record of the run in a folder.

runs/<name>/  config.json        what was asked for
              metrics.jsonl      a record of the start, one an epoch, one of the end
              model.pt           the weights (checkpoint.py)
              curves.png         loss and accuracy by epoch
              predictions.png    test images with true and predicted labels
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softxent

from . import checkpoint, data, device, plots
from .errors import UserError
from .models import MODELS

LOSSES: dict[str, Callable[..., Tensor]] = {"fused": softxent.fused_softmax_xent, "torch": F.cross_entropy}


@dataclass(frozen=True)
class Config:
    """The recipe of "Dive into Deep Learning", section 3.6, unless told otherwise."""

    model: str = "softmax"
    loss: str = "fused"
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.1
    seed: int = 1
    device: str = "auto"
    data: str | None = None
    require_full_data: bool = False
    runs: str = "runs"
    name: str | None = None  # of the folder in `runs`; None: made from the model, the loss, and the time


@dataclass
class Split:
    """Images [n, 28, 28] and labels [n], uint8, on the device."""

    images: Tensor
    labels: Tensor

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] as [n, 784] float32, and labels as int64."""
        return self.images[rows].flatten(1).float().div_(255), self.labels[rows].long()


def train(config: Config) -> dict[str, Any]:
    """Train as `config` says and write the run's folder; returns the last record of metrics.jsonl."""
    place, why = device.choose(config.device)
    print(f"device: {place} ({why})")
    dataset = data.load(config.data, config.require_full_data)
    print(f"data: {len(dataset.train_images)} + {len(dataset.test_images)} images from {dataset.source}")
    if not dataset.complete:
        print(SAMPLE_WARNING)
    training = Split(torch.tensor(dataset.train_images, device=place), torch.tensor(dataset.train_labels, device=place))
    test = Split(torch.tensor(dataset.test_images, device=place), torch.tensor(dataset.test_labels, device=place))

    folder = _new_folder(config)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    epochs: list[dict[str, Any]] = []
    with open(folder / "metrics.jsonl", "w") as metrics:

        def record(event: str, **values: Any) -> dict[str, Any]:
            entry = {"event": event, **values}
            metrics.write(json.dumps(entry) + "\n")
            metrics.flush()
            return entry

        start = asdict(config) | _environment(place, why, dataset)
        record("start", **start)
        for epoch in _train_epochs(config, training, test, place, folder):
            epochs.append(record("epoch", **epoch))
        end = record(
            "end", test_accuracy=epochs[-1]["test_accuracy"], seconds=sum(epoch["seconds"] for epoch in epochs)
        )
    title = f"{config.model}, {config.loss} loss, lr {config.lr}, batch {config.batch_size}, seed {config.seed}"
    _draw(folder, epochs, title + ("" if dataset.complete else " (EMBEDDED SAMPLE)"), dataset)
    print(f"test accuracy {end['test_accuracy']:.4f}; {folder}/")
    return end


SAMPLE_WARNING = (
    "data: TRAINING ON THE EMBEDDED SAMPLE, NOT ON THE FULL DATASET: "
    "THE ACCURACY IS NOT COMPARABLE WITH ANY PUBLISHED ONE. --require-full-data REFUSES THE SAMPLE"
)


def _train_epochs(
    config: Config, training: Split, test: Split, place: torch.device, folder: Path
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(config.seed)
    model = MODELS[config.model]().to(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    shuffle = torch.Generator().manual_seed(config.seed)
    for epoch in range(1, config.epochs + 1):
        began = time.perf_counter()
        train_loss, train_accuracy = _one_epoch(config, model, optimizer, training, shuffle, f"epoch {epoch}")
        seconds = time.perf_counter() - began
        test_loss, test_accuracy = evaluate(model, test, LOSSES[config.loss])
        result = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "seconds": seconds,
            "images_per_second": len(training.labels) / seconds,
        }
        print(
            f"epoch {epoch:3d}  train loss {train_loss:.4f}  train accuracy {train_accuracy:.4f}  "
            f"test accuracy {test_accuracy:.4f}  {result['images_per_second']:,.0f} images/s"
        )
        if not math.isfinite(train_loss):
            raise UserError(f"the loss is {train_loss} in epoch {epoch}: try a smaller --lr than {config.lr}")
        checkpoint.save(folder / "model.pt", config.model, model, asdict(config) | {"epoch": epoch})
        yield result


def _one_epoch(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: Split,
    shuffle: torch.Generator,
    title: str,
) -> tuple[float, float]:
    """Loss and accuracy over the epoch, each batch as it was met. They are read from the device once, at the end."""
    loss_of = LOSSES[config.loss]
    n = len(training.labels)
    place = training.labels.device
    order = torch.randperm(n, generator=shuffle).to(place)
    starts = range(0, n, config.batch_size)
    losses = torch.zeros(len(starts), device=place)
    right = torch.zeros(len(starts), device=place)
    for i, start in enumerate(_with_bar(starts, title)):
        images, labels = training.batch(order[start : start + config.batch_size])
        logits = model(images)
        loss = loss_of(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses[i] = loss.detach() * len(labels)
        right[i] = (logits.detach().argmax(1) == labels).sum()
    return losses.cpu().double().sum().item() / n, right.cpu().double().sum().item() / n


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, loss_of: Callable[..., Tensor] = softxent.fused_softmax_xent
) -> tuple[float, float]:
    """Mean cross-entropy in nats, and accuracy."""
    n = len(split.labels)
    loss = right = torch.zeros((), device=split.labels.device)
    for start in range(0, n, 10_000):
        images, labels = split.batch(slice(start, start + 10_000))
        logits = model(images)
        loss = loss + loss_of(logits, labels, reduction="sum")
        right = right + (logits.argmax(1) == labels).sum()
    return loss.item() / n, right.item() / n


def _with_bar(batches: range, title: str) -> Any:
    """A progress bar on a terminal, if tqdm is installed. It shows what was submitted, and waits for nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc=title, unit="batch", leave=False, disable=None)


def _new_folder(config: Config) -> Path:
    name = config.name or f"{config.model}-{config.loss}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(config.runs) / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"the run folder {folder} exists: give another --name, or delete it") from error
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from error
    return folder


def _environment(place: torch.device, why: str, dataset: data.FashionMNIST) -> dict[str, Any]:
    environment: dict[str, Any] = {
        "device_used": str(place),
        "device_reason": why,
        "torch": torch.__version__,
        "softxent": softxent.__version__,
        "data_source": dataset.source,
        "n_train": len(dataset.train_labels),
        "n_test": len(dataset.test_labels),
        "full_data": dataset.complete,
    }
    return environment if dataset.complete else environment | {"warning": SAMPLE_WARNING}


def _draw(folder: Path, epochs: list[dict[str, Any]], title: str, dataset: data.FashionMNIST) -> None:
    _, model = checkpoint.load(folder / "model.pt")
    images, labels = dataset.test_images[:32], dataset.test_labels[:32]
    with torch.no_grad():
        guesses = model(Split(torch.tensor(images), torch.tensor(labels)).batch(slice(None))[0]).argmax(1)
    try:
        plots.curves(epochs, title, folder / "curves.png")
        plots.predictions(images, labels, guesses.numpy(), folder / "predictions.png")
    except UserError as error:
        print(f"no pictures: {error}")

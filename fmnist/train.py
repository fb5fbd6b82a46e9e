"""python -m fmnist train: minibatch SGD, and a record of the run in a folder.

runs/<name>/  config.json            what was asked for
              metrics.jsonl          a record of the start, one an epoch, one of the end
              model.safetensors      the weights after the last epoch (checkpoint.py)
              resume.safetensors     until the end: what --resume needs (state.py)
              curves.png             loss and accuracy by epoch
              predictions.png        test images with true and predicted labels
              confusion.png          test images by true and predicted label
              templates.png          of softmax regression: the weights of each class, as an image
              report.html            all of it as one page (report.py)
"""

import argparse
import json
import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import arguments as take
from . import checkpoint, data, device, files, metrics, plots, records, report, state
from .config import RECIPES, SCHEDULES, Config, of_model
from .errors import Interrupted, UserError
from .loop import Split, evaluate, logits_of, one_epoch
from .losses import LOSSES, UNITS
from .models import MODELS
from .records import Records
from .state import State
from .versions import versions

__all__ = ["LOSSES", "Config", "Split", "add_arguments", "evaluate", "logits_of", "resume", "run", "train"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS  # absent unless given: --resume and the recipes have to know
    parser.add_argument("--model", choices=MODELS, help=_default("model"))
    parser.add_argument("--loss", choices=LOSSES, help=f"softxent's, torch's, or squared error; {_default('loss')}")
    help = "mix the targets with the uniform distribution; "
    parser.add_argument("--label-smoothing", metavar="EPS", type=take.fraction, help=help + _default("label_smoothing"))
    help = "train on mixtures of two images, weighed by Beta(ALPHA, ALPHA); 0: none; "
    parser.add_argument("--mixup", metavar="ALPHA", type=take.at_least_0, help=help + _default("mixup"))
    help = "of the rate: the same for all steps, or falling to 0; "
    parser.add_argument("--schedule", choices=SCHEDULES, help=help + _default("schedule"))
    parser.add_argument("--epochs", type=take.positive_int, help=_default("epochs"))
    parser.add_argument("--batch-size", type=take.positive_int, help=_default("batch_size"))
    parser.add_argument("--lr", type=take.positive, help=f"learning rate of SGD; {_default('lr')}")
    parser.add_argument("--momentum", type=take.fraction, help=f"of SGD, below 1; {_default('momentum')}")
    parser.add_argument("--seed", type=take.seed, help=f"of the weights and the images' order; {_default('seed')}")
    parser.add_argument("--runs", metavar="DIR", help=f"where the run's folder goes; {_default('runs')}")
    parser.add_argument("--name", help="of the run's folder; made from model, loss and time if not given")
    help = "continue an interrupted run, to the bit and with its own settings (--device and --data may be given again)"
    parser.add_argument("--resume", metavar="RUN_FOLDER", type=Path, help=help)
    take.add_device(parser, default=argparse.SUPPRESS)
    take.add_data(parser)


def _default(name: str) -> str:
    recipes = [f"{model} {recipe[name]}" for model, recipe in RECIPES.items() if name in recipe]
    return "default: " + ", ".join([str(getattr(Config(), name)), *recipes])


def run(arguments: argparse.Namespace) -> None:
    given = {field.name: getattr(arguments, field.name) for field in fields(Config) if field.name in arguments}
    if "resume" in arguments:
        resume(arguments.resume, given)
    else:
        train(of_model(**given))


def train(config: Config) -> dict[str, Any]:
    """Train as `config` says and write the run's folder; returns the last record of metrics.jsonl.

    Raises UserError for what cannot be had or written, and Interrupted on Ctrl-C once there is something to resume.
    """
    files.require_safetensors()
    setting = _prepare(config)
    folder = _new_folder(config)
    files.write_text(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    written = Records(folder / records.FILE)
    written.add("start", **asdict(config) | setting.environment())
    beginning = State.fresh(config, setting.place)
    beginning.save(folder / state.FILE)
    return _run_to_the_end(config, setting, folder, written, beginning)


def resume(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Continue the run in `folder` after its last whole epoch; returns as `train`.

    `given` are settings by name, which must be the run's; but a device and data may be said again, as they may be
    elsewhere now. Raises UserError if a setting is another, if the run is finished, if `folder` holds none, and if the
    device or the data are not what the run began with; Interrupted as `train`.
    """
    begun, written = _begun(folder)
    config = replace(begun, **{name: value for name, value in given.items() if name in ("device", "data")})
    for name, value in given.items():
        if value != getattr(config, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{folder} was begun with {option} {getattr(config, name)}, not {value}: leave {option} out"
            )
    setting = _prepare(config)
    now = setting.environment()
    for name, option in (("device_used", "--device"), ("n_train", "--data"), ("full_data", "--data")):
        was, is_ = written[0].get(name), now[name]
        if was != is_:
            raise UserError(f"{folder} was begun with {name} {was}, and would go on with {is_}: give another {option}")
    saved = State.load(folder / state.FILE, config, setting.place)
    written.forget_after(saved.epoch)
    written.add("resume", epoch=saved.epoch, **now)
    return _run_to_the_end(config, setting, folder, written, saved)


def _begun(folder: Path) -> tuple[Config, Records]:
    """The settings and the records of a run that is not finished."""
    if not (folder / "config.json").is_file():
        raise UserError(f"nothing to resume: {folder} is not the folder of a run")
    written = records.read(folder / records.FILE)
    if written.finished():
        raise UserError(f"nothing to resume: the run in {folder} is finished, with {len(written.epochs())} epochs")
    if not written or not (folder / state.FILE).is_file():
        raise UserError(f"nothing to resume: {folder} was interrupted before its run began; delete it")
    try:
        return Config(**json.loads((folder / "config.json").read_text())), written
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} holds no settings of this version: {error}") from error


@dataclass
class Setting:
    """Where a run computes, and on what."""

    place: torch.device
    why: str  # that place
    dataset: data.FashionMNIST
    training: Split
    test: Split

    def environment(self) -> dict[str, Any]:
        environment: dict[str, Any] = {
            "device_used": str(self.place),
            "device_reason": self.why,
            **versions(),
            "data_source": self.dataset.source,
            "n_train": len(self.dataset.train_labels),
            "n_test": len(self.dataset.test_labels),
            "full_data": self.dataset.complete,
        }
        return environment if self.dataset.complete else environment | {"warning": SAMPLE_WARNING}


SAMPLE_WARNING = (
    "data: TRAINING ON THE EMBEDDED SAMPLE, NOT ON THE FULL DATASET: "
    "THE ACCURACY IS NOT COMPARABLE WITH ANY PUBLISHED ONE. --require-full-data REFUSES THE SAMPLE"
)


def _prepare(config: Config) -> Setting:
    place, why = device.choose(config.device)
    print(f"device: {place} ({why})")
    dataset = data.load(config.data, config.require_full_data)
    print(f"data: {len(dataset.train_images)} + {len(dataset.test_images)} images from {dataset.source}")
    if not dataset.complete:
        print(SAMPLE_WARNING)
    training = Split(torch.tensor(dataset.train_images, device=place), torch.tensor(dataset.train_labels, device=place))
    test = Split(torch.tensor(dataset.test_images, device=place), torch.tensor(dataset.test_labels, device=place))
    return Setting(place, why, dataset, training, test)


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


def _run_to_the_end(config: Config, setting: Setting, folder: Path, written: Records, now: State) -> dict[str, Any]:
    try:
        while now.epoch < config.epochs:
            epoch = _next_epoch(config, setting, now)
            written.add("epoch", **epoch)
            checkpoint.save(folder / checkpoint.FILE, config.model, now.model, asdict(config) | {"epoch": now.epoch})
            now.save(folder / state.FILE)  # the last of the three: a resumed run repeats what it does not know of
        _draw(config, setting, folder, written, now)
        epochs = written.epochs()
        end = written.add(
            "end", test_accuracy=epochs[-1]["test_accuracy"], seconds=sum(epoch["seconds"] for epoch in epochs)
        )
    except KeyboardInterrupt as error:
        how = f"python -m fmnist train --resume {shlex.quote(str(folder))}"
        raise Interrupted(f"interrupted; this goes on after the last whole epoch: {how}") from error
    (folder / state.FILE).unlink()
    report.write(folder)
    print(f"test accuracy {end['test_accuracy']:.4f}; {folder}/")
    return end


def _next_epoch(config: Config, setting: Setting, now: State) -> dict[str, Any]:
    """Advance the state by an epoch; its record. UserError if the loss is no longer a number."""
    epoch = now.epoch + 1
    began = time.perf_counter()
    # cuDNN's fastest convolutions sum in an order that depends on the moment
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        train_loss, train_accuracy = one_epoch(config, now.model, now.optimizer, setting.training, now.shuffle, epoch)
    seconds = time.perf_counter() - began
    test_loss, test_accuracy = evaluate(now.model, setting.test, LOSSES[config.loss])
    now.epoch = epoch
    speed = len(setting.training.labels) / seconds
    print(
        f"epoch {epoch:3d}  train loss {train_loss:.4f}  train accuracy {train_accuracy:.4f}  "
        f"test accuracy {test_accuracy:.4f}  {speed:,.0f} images/s"
    )
    if not math.isfinite(train_loss):
        raise UserError(f"the loss is {train_loss} in epoch {epoch}: try a smaller --lr than {config.lr}")
    return {
        "epoch": epoch,
        "lr": now.optimizer.param_groups[0]["lr"],
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "seconds": seconds,
        "images_per_second": speed,
    }


def _draw(config: Config, setting: Setting, folder: Path, written: Records, now: State) -> None:
    title = _title(config) + ("" if setting.dataset.complete else " (EMBEDDED SAMPLE)")
    _, model = checkpoint.load(folder / checkpoint.FILE)
    images, labels = setting.dataset.test_images[:32], setting.dataset.test_labels[:32]
    with torch.no_grad():
        guesses = model(Split(torch.tensor(images), torch.tensor(labels)).batch(slice(None))[0]).argmax(1)
    try:
        plots.curves(written.epochs(), title, folder / "curves.png", UNITS[config.loss])
        plots.predictions(images, labels, guesses.numpy(), folder / "predictions.png")
        confusion = metrics.measure(logits_of(now.model, setting.test)).confusion
        plots.confusion(confusion.numpy(), data.LABELS, folder / "confusion.png")
        if isinstance(model, nn.Linear):
            plots.templates(model.weight.detach().numpy(), folder / "templates.png")
    except UserError as error:
        print(f"no pictures: {error}")


def _title(config: Config) -> str:
    """What tells a run from others, in a line: of the options only those that are used."""
    falling = " falling to 0" if config.schedule == "linear" else ""
    parts = [f"{config.model}, {config.loss} loss, lr {config.lr}{falling}, batch {config.batch_size}"]
    for name in ("momentum", "label_smoothing", "mixup"):
        if getattr(config, name):
            parts.append(f"{name.replace('_', ' ')} {getattr(config, name)}")
    return ", ".join([*parts, f"seed {config.seed}"])

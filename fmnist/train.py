"""python -m fmnist train: minibatch SGD, and a record of the run in a folder.

runs/<name>/  config.json            what was asked for
              metrics.jsonl          a record of the start, one an epoch, one of the end
              metrics.csv            the epochs of it, for a spreadsheet
              model.safetensors      the weights after the last epoch (checkpoint.py)
              resume.safetensors     what --resume needs (state.py)
              curves.png             loss and accuracy by epoch
              predictions.png        test images with true and predicted labels
              mistakes.png           the test images that the model is surest about, and wrong
              confusion.png          test images by true and predicted label
              templates.png          of softmax regression: the weights of each class, as an image
              report.html            all of it as one page (report.py)
"""

import argparse
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments as take
from . import board, checkpoint, config, data, device, files, metrics, plots, records, report, state
from .command import launched, launcher
from .config import RECIPES, SCHEDULES, Config, of_model
from .errors import CannotWrite, Interrupted, UserError
from .loop import Objective, Split, evaluate, logits_of, one_epoch, splits
from .losses import LOSSES, UNITS
from .models import MODELS
from .progress import Progress
from .ranks import ALONE, Ranks, check_device, joined
from .records import Records
from .state import State
from .versions import circumstances, versions

__all__ = ["LOSSES", "Config", "Split", "add_arguments", "evaluate", "logits_of", "resume", "run", "train"]

DIVERGED = -math.log(torch.finfo(torch.float32).tiny)  # 87 nats: the labels' probabilities are 0 in float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS  # absent unless given: --resume and the recipes have to know
    model = parser.add_argument_group("the model and its loss")
    help = "The model: softmax regression, two hidden layers, or convolutions"
    model.add_argument("--model", choices=MODELS, help=help + _default("model"))
    help = "The loss: cross-entropy by softxent or by PyTorch, or the squared error of the probabilities"
    model.add_argument("--loss", choices=LOSSES, help=help + _default("loss"))
    help = "Mix the labels with the uniform distribution, by the share EPS"
    model.add_argument("--label-smoothing", metavar="EPS", type=take.fraction, help=help + _default("label_smoothing"))
    help = "Train on mixtures of two images, weighed by Beta(ALPHA, ALPHA); 0 mixes nothing"
    model.add_argument("--mixup", metavar="ALPHA", type=take.at_least_0, help=help + _default("mixup"))
    sgd = parser.add_argument_group("stochastic gradient descent")
    sgd.add_argument("--epochs", type=take.positive_int, help="How often each image is seen" + _default("epochs"))
    help = "Images a step, of all processes together"
    sgd.add_argument("--batch-size", type=take.positive_int, help=help + _default("batch_size"))
    sgd.add_argument("--lr", type=take.positive, help="The learning rate of the first step" + _default("lr"))
    help = "Whether the learning rate stays, or falls linearly to 0 after the last step"
    sgd.add_argument("--schedule", choices=SCHEDULES, help=help + _default("schedule"))
    help = "How much of the last step the next one repeats, below 1"
    sgd.add_argument("--momentum", type=take.fraction, help=help + _default("momentum"))
    help = "Chooses the first weights and the order of the images"
    sgd.add_argument("--seed", type=take.seed, help=help + _default("seed"))
    help = (
        "Keep the last N training images out of training, and measure after each epoch on them; the test images are "
        "then looked at once, in the end. With 0 the test images are measured after each epoch, as the books do"
    )
    sgd.add_argument("--validation", metavar="N", type=take.whole, help=help + _default("validation"))
    place = parser.add_argument_group("where")
    place.add_argument("--runs", metavar="DIR", help="The folder that gets the run's folder" + _default("runs"))
    place.add_argument(
        "--name", help="The name of the run's folder; made from the model, the loss and the time if absent"
    )
    help = "How many threads of the CPU compute; 0 lets PyTorch choose"
    place.add_argument("--threads", metavar="N", type=take.whole, help=help + _default("threads"))
    place.add_argument(
        "--tensorboard", action="store_true", help="Write the curves for TensorBoard into the run's folder"
    )
    take.add_device(place, default=argparse.SUPPRESS)
    take.add_data(place)
    earlier = parser.add_argument_group("an earlier run")
    help = "Take the settings of FILE, a run's config.json or its folder, except for those that are given here"
    earlier.add_argument("--config", metavar="FILE", type=Path, help=help)
    help = (
        "Go on with an interrupted run, to the bit and with its own settings; --epochs N prolongs a run, a finished "
        "one too, and --device, --data and --threads may be said again"
    )
    earlier.add_argument("--resume", metavar="RUN_FOLDER", type=Path, help=help)


def _default(name: str) -> str:
    recipes = [f"{model} {recipe[name]}" for model, recipe in RECIPES.items() if name in recipe]
    return f" (default: {', '.join([str(getattr(Config(), name)), *recipes])})"


def run(arguments: argparse.Namespace) -> None:
    with joined() as ranks:
        if ranks.rank == 0:
            _lead(arguments, ranks)
        else:
            _follow(ranks)


def _lead(arguments: argparse.Namespace, ranks: Ranks) -> None:
    given = {field.name: getattr(arguments, field.name) for field in fields(Config) if field.name in arguments}
    command = getattr(arguments, "command_line", None)
    if "resume" in arguments:
        if "config" in arguments:
            raise UserError("--resume has the settings of its run: leave --config out")
        resume(arguments.resume, given, command, ranks)
    elif "config" in arguments:
        train(Config(**{**config.read(arguments.config), "name": None, **given}), command, ranks)
    else:
        train(of_model(**given), command, ranks)


def _follow(ranks: Ranks) -> None:
    """What every rank but the first does: its part of each batch. It is told which run, and writes nothing."""
    config, tensors, epoch = ranks.told()
    with _threads(config.threads):
        setting = _prepare(config)
        ranks.agree(**setting.facts())
        ranks.advise(ranks.told())
        _all_epochs(config, setting, ranks, State.of(tensors, epoch, config, setting.place))


def _tell(ranks: Ranks, config: Config, setting: "Setting", now: State) -> None:
    """Those that follow, what they follow."""
    ranks.told((config, {name: x.cpu() for name, x in now.tensors().items()}, now.epoch))
    ranks.agree(**setting.facts())


def train(config: Config, command: str | None = None, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Train as `config` says and write the run's folder; returns the last record of metrics.jsonl.

    `command` is the line that asked for it, for the record. Raises UserError for what cannot be had or written, and
    Interrupted on Ctrl-C once there is something to resume.
    """
    _require(config)
    if config.name and os.path.exists(folder := Path(config.runs) / config.name):  # said before the data are read
        raise _taken(folder)
    with _threads(config.threads):
        setting = _prepare(config)
        beginning = State.fresh(config, setting.place)
        _tell(ranks, config, setting, beginning)
        folder = _new_folder(config)
        try:
            _write_config(folder, config)
            written = Records(folder / records.FILE)
            written.add("start", **asdict(config) | setting.environment(command))
            beginning.save(folder / state.FILE)
        except BaseException:  # Ctrl-C too: there is nothing to go on with, and the name is free again
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return _run_to_the_end(config, setting, ranks, folder, written, beginning)


def resume(folder: Path, given: Mapping[str, Any], command: str | None = None, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Continue the run in `folder` after its last whole epoch; returns as `train`.

    `given` are settings by name, which must be the run's. But device, data and threads may be said again, as they may
    be others now, and more epochs prolong it. Raises UserError if a setting is another, if there is nothing left to do,
    if `folder` holds no run, and if the device or the data are not what the run began with; Interrupted as `train`.
    """
    begun, written = _begun(folder)
    free = ("device", "data", "threads", "epochs")
    config = replace(begun, **{name: value for name, value in given.items() if name in free})
    for name, value in given.items():
        if value != getattr(config, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{folder} was begun with {option} {getattr(config, name)}, not {value}: leave {option} out"
            )
    _check_epochs(folder, written, begun, config)
    _require(config)
    with _threads(config.threads):
        setting = _prepare(config)
        now = setting.environment(command)
        for name, option in (("device_used", "--device"), ("n_train", "--data"), ("full_data", "--data")):
            was, is_ = written[0].get(name), now[name]
            if was != is_:
                raise UserError(
                    f"{folder} was begun with {name} {was}, and would go on with {is_}: give another {option}"
                )
        saved = State.load(folder / state.FILE, config, setting.place)
        if saved.epoch > config.epochs:
            raise UserError(f"{folder} has trained for {saved.epoch} epochs already: --epochs {config.epochs} is less")
        _tell(ranks, config, setting, saved)
        written.forget_after(saved.epoch)
        if config.epochs != begun.epochs:
            _write_config(folder, replace(begun, epochs=config.epochs))
        written.add("resume", epoch=saved.epoch, epochs=config.epochs, **now)
        return _run_to_the_end(config, setting, ranks, folder, written, saved)


def _begun(folder: Path) -> tuple[Config, Records]:
    """The settings and the records of a run."""
    if not (folder / config.FILE).is_file():
        raise UserError(f"nothing to resume: {folder} is not the folder of a run")
    written = records.read(folder / records.FILE)
    if not written or not (folder / state.FILE).is_file():
        raise UserError(f"nothing to resume: {folder} was interrupted before its run began; delete it")
    return Config(**config.read(folder)), written


def _check_epochs(folder: Path, written: Records, begun: Config, config: Config) -> None:
    """UserError unless there are epochs left to do, and what they make is the run of so many epochs."""
    done = len(written.epochs())
    if written.finished() and config.epochs <= done:
        raise UserError(
            f"nothing to resume: the run in {folder} is finished, with {done} epochs; --epochs N with a greater N "
            "prolongs it"
        )
    if config.epochs != begun.epochs and begun.schedule != "constant":
        raise UserError(
            f"{folder} has a rate that falls to 0 in {begun.epochs} epochs: a run of {config.epochs} is another one "
            f"from its first step. Train anew: --config {shlex.quote(str(folder))} --epochs {config.epochs}"
        )


def _require(config: Config) -> None:
    """UserError for libraries that the run will need and that are not there."""
    files.require_safetensors()
    if config.tensorboard:
        board.require()


def _write_config(folder: Path, settings: Config) -> None:
    files.write_text(folder / config.FILE, json.dumps(asdict(settings), indent=2) + "\n")


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """With so many threads of the CPU, or as many as there are where n is 0; afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Setting:
    """Where a run computes, and on what."""

    place: torch.device
    why: str  # that place
    dataset: data.FashionMNIST
    training: Split
    validation: Split | None
    test: Split

    def facts(self) -> dict[str, Any]:
        """What has to be the same for every rank."""
        data = {"n_train": len(self.training), "n_test": len(self.test), "full_data": self.dataset.complete}
        return {"device": self.place.type, **data}

    def environment(self, command: str | None) -> dict[str, Any]:
        environment: dict[str, Any] = {
            "command": command,
            **circumstances(),
            **({"ranks": int(os.environ["WORLD_SIZE"])} if launched() else {}),
            "device_used": str(self.place),
            "device_reason": self.why,
            **versions(),
            "data_source": self.dataset.source,
            "n_train": len(self.training),
            "n_validation": len(self.validation) if self.validation else 0,
            "n_test": len(self.test),
            "full_data": self.dataset.complete,
        }
        return environment if self.dataset.complete else environment | {"warning": SAMPLE_WARNING}


SAMPLE_WARNING = (
    "data: TRAINING ON THE EMBEDDED SAMPLE, NOT ON THE FULL DATASET: "
    "THE ACCURACY IS NOT COMPARABLE WITH ANY PUBLISHED ONE. --require-full-data REFUSES THE SAMPLE"
)


def _prepare(config: Config) -> Setting:
    place, why = device.choose(config.device)
    check_device(place)
    n_threads = torch.get_num_threads()
    print(f"device: {place} ({why}), {n_threads} thread{'s' if n_threads > 1 else ''}")
    dataset = data.load(config.data, config.require_full_data)
    training, test = splits(dataset, place)
    if config.validation >= len(training):
        raise UserError(f"--validation {config.validation} leaves none of {len(training)} images to train on")
    # The last images of the file, whatever the seed: runs with other seeds and rates are measured on the same.
    cut = len(training) - config.validation
    validation = training.part(slice(cut, None)) if config.validation else None
    training = training.part(slice(cut))
    split = f"{len(training)} + {config.validation} for validation" if validation else str(len(training))
    print(f"data: {split} + {len(test)} images from {dataset.source}")
    if not dataset.complete:
        print(SAMPLE_WARNING)
    return Setting(place, why, dataset, training, validation, test)


def _new_folder(config: Config) -> Path:
    """runs/<name>, made. Without a name two runs that begin in one second get two names."""
    made_up = f"{config.model}-{config.loss}-{datetime.now():%Y%m%d-%H%M%S}"
    names = [config.name] if config.name else (f"{made_up}-{i}" if i > 1 else made_up for i in count(1))
    for name in names:
        folder = Path(config.runs) / name
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            pass
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from error
    raise _taken(folder)


def _taken(folder: Path) -> UserError:
    return UserError(f"the run folder {folder} exists: give another --name, or delete it")


def _run_to_the_end(
    config: Config, setting: Setting, ranks: Ranks, folder: Path, written: Records, now: State
) -> dict[str, Any]:
    quoted = shlex.quote(str(folder))
    goes_on = f"this goes on after the last whole epoch: {launcher()} fmnist train --resume {quoted}"
    ranks.advise(ranks.told(f"; {goes_on}"))
    try:
        with board.writer(folder, config.tensorboard, now.epoch) as add_to_board:

            def keep(epoch: dict[str, Any]) -> None:
                written.add("epoch", **epoch)
                written.write_csv()
                add_to_board(epoch)
                settings = asdict(config) | {"epoch": now.epoch}
                checkpoint.save(folder / checkpoint.FILE, config.model, now.model, settings)
                now.save(folder / state.FILE)  # the last of these: a resumed run repeats what it does not know of

            _all_epochs(config, setting, ranks, now, keep)
        end = _finish(config, setting, folder, written, now)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {goes_on}") from error
    except CannotWrite as error:
        raise UserError(f"{error}. Once it can be written, {goes_on}") from error
    try:
        report.write(folder)
    except CannotWrite as error:
        raise UserError(f"{error}. The run is whole; this makes its page: python -m fmnist report {quoted}") from error
    print(f"test accuracy {end['test_accuracy']:.4f}; {folder}/")
    return end


def _all_epochs(
    config: Config,
    setting: Setting,
    ranks: Ranks,
    now: State,
    keep: Callable[[dict[str, Any]], None] = lambda epoch: None,
) -> None:
    """The epochs that are left; `keep` is given the record of each when the state is that after it."""
    steps = -(-len(setting.training) // config.batch_size)
    objective = ranks.with_mean_gradients(Objective(config, now.model))
    with Progress(config.epochs * steps, now.epoch * steps) as progress:
        while now.epoch < config.epochs:
            keep(_next_epoch(config, setting, ranks, now, objective, progress))


def _next_epoch(
    config: Config, setting: Setting, ranks: Ranks, now: State, objective: nn.Module, progress: Progress
) -> dict[str, Any]:
    """Advance the state by an epoch; its record. UserError if the loss is no longer a number, or useless."""
    epoch = now.epoch + 1
    progress.epoch(epoch, config.epochs)
    began = time.perf_counter()
    # cuDNN's fastest convolutions sum in an order that depends on the moment
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        train_loss, train_accuracy = one_epoch(
            config,
            now.model,
            now.optimizer,
            setting.training,
            now.shuffle,
            epoch,
            after_step=progress.step,
            ranks=ranks,
            objective=objective,
        )
    seconds = time.perf_counter() - began
    name, split = ("validation", setting.validation) if setting.validation else ("test", setting.test)
    loss, accuracy = evaluate(now.model, split, LOSSES[config.loss], ranks)
    now.epoch = epoch
    lr = now.optimizer.param_groups[0]["lr"]
    progress.line(
        f"epoch {epoch:3d}/{config.epochs}  train loss {train_loss:.4f} accuracy {train_accuracy:.4f}  "
        f"{name} loss {loss:.4f} accuracy {accuracy:.4f}  lr {lr:.4g}  {seconds:.1f} s"
    )
    if not train_loss < DIVERGED:
        raise UserError(
            f"the loss is {train_loss:.4g} in epoch {epoch}, training has diverged: try a smaller --lr than {config.lr}"
        )
    return {
        "epoch": epoch,
        "lr": lr,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        f"{name}_loss": loss,
        f"{name}_accuracy": accuracy,
        "seconds": seconds,
        "images_per_second": len(setting.training) / seconds,
    }


def _finish(config: Config, setting: Setting, folder: Path, written: Records, now: State) -> dict[str, Any]:
    """Measure on the test images, draw, and record the end."""
    logits = torch.cat([logits for logits, _ in logits_of(now.model, setting.test)])
    found = metrics.measure([(logits, setting.test.labels.long())])
    test_loss, test_accuracy = evaluate(now.model, setting.test, LOSSES[config.loss])
    if missing := plots.missing():
        print(f"no pictures: {missing}")
    else:
        _draw(config, setting, folder, written, now.model, logits.cpu(), found)
    return written.add(
        "end",
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        test_cross_entropy=found.loss,
        calibration_error=found.calibration_error,
        class_accuracy=dict(zip(data.LABELS, found.class_accuracy.tolist(), strict=True)),
        seconds=sum(epoch["seconds"] for epoch in written.epochs()),
    )


def _draw(
    config: Config,
    setting: Setting,
    folder: Path,
    written: Records,
    model: nn.Module,
    logits: Tensor,  # [n, 10], of the test images
    found: metrics.Metrics,
) -> None:
    title = config.summary() + ("" if setting.dataset.complete else " (EMBEDDED SAMPLE)")
    images, labels = setting.dataset.test_images, setting.dataset.test_labels
    plots.curves(written.epochs(), title, folder / "curves.png", UNITS[config.loss], config.softened)
    plots.predictions(images[:32], labels[:32], logits[:32].argmax(1).numpy(), folder / "predictions.png")
    plots.mistakes(images, labels, logits.double().softmax(1).numpy(), folder / "mistakes.png")
    plots.confusion(found.confusion.numpy(), data.LABELS, folder / "confusion.png")
    if isinstance(model, nn.Linear):
        plots.templates(model.weight.detach().cpu().numpy(), folder / "templates.png")

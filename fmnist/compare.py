"""python -m fmnist compare: several runs over each other, as a table and as curves."""

import argparse
import json
from pathlib import Path
from typing import Any

from . import config, plots, records
from .config import Config
from .errors import UserError
from .losses import UNITS
from .records import Records

WHERE = ("runs", "name", "data", "device", "require_full_data", "tensorboard")  # what does not tell what was trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="The folders of two runs or more")
    help = "The picture of the curves to write"
    parser.add_argument("--output", type=Path, default=Path("compare.png"), metavar="FILE", help=help)


def run(arguments: argparse.Namespace) -> None:
    """Print the table and draw the curves. UserError if a folder is that of no run, or has no epoch yet."""
    if len(arguments.folders) < 2:
        raise UserError("compare takes two runs or more")
    settings = [config.read(folder) for folder in arguments.folders]
    events = [records.read(folder / records.FILE) for folder in arguments.folders]
    for folder, events_of_run in zip(arguments.folders, events, strict=True):
        if not events_of_run.epochs():
            raise UserError(f"{folder} has no epoch yet")
    names = _names(arguments.folders)
    print(table(names, settings, events))
    epochs = {name: of_run.epochs() for name, of_run in zip(names, events, strict=True)}
    units = {name: UNITS[given["loss"]] for name, given in zip(names, settings, strict=True)}
    softened = [name for name, given in zip(names, settings, strict=True) if Config(**given).softened]
    plots.overlay(epochs, units, arguments.output, softened)
    print(f"\ncurves: {arguments.output}")


def table(names: list[str], settings: list[dict[str, Any]], events: list[Records]) -> str:
    """A line a run: in what it differs from the others, and how it ended."""
    keys = [key for key in dict.fromkeys(key for given in settings for key in given) if key not in WHERE]
    varying = [key for key in keys if len({json.dumps(given.get(key)) for given in settings}) > 1]
    rows = [["run", *(key.replace("_", " ") for key in varying), *FIGURES]]
    for name, given, of_run in zip(names, settings, events, strict=True):
        rows.append([name, *(str(given.get(key, "")) for key in varying), *_figures(of_run)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    same = [
        f"{key.replace('_', ' ')} {settings[0][key]}" for key in ("model", "loss", "lr", "seed") if key not in varying
    ]
    return "\n".join([f"the same: {', '.join(same)}", *lines] if same else lines)


FIGURES = ("epochs", "train loss", "validation accuracy", "test accuracy", "seconds")


def _figures(of_run: Records) -> list[str]:
    """Under the headings FIGURES, in the end or so far; nothing where there is none."""
    epochs = of_run.epochs()
    last = epochs[-1] | (of_run[-1] if of_run.finished() else {})
    numbers = [last.get("train_loss"), last.get("validation_accuracy"), last.get("test_accuracy")]
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return [str(len(epochs)), *("" if x is None else f"{x:.4f}" for x in numbers), f"{seconds:.1f}"]


def _names(folders: list[Path]) -> list[str]:
    """The folders' names, and the whole paths where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]

"""A run as one page, report.html: what was asked for, what came out, the pictures, and what it ran on.

The page needs nothing but itself: pictures are inlined as data URIs, and its Content-Security-Policy forbids the
browser to fetch anything. It is made from the files of the run's folder alone, so it can be made again at any time.
How it looks is in report.html, beside this file, which Jinja fills in.
"""

import argparse
import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import files, records
from .errors import UserError

Record = dict[str, Any]

CAPTIONS = {  # in the order in which they appear; other pictures of the folder follow under their file names
    "curves.png": "Loss and accuracy by epoch: in training while the model learns, on other images after it",
    "predictions.png": "Test images: the true label above, the predicted one below",
    "mistakes.png": "The mistakes that the model is surest of: the true label above, the predicted one below",
    "confusion.png": "Confusion matrix: true classes and what they were taken for, in images",
    "templates.png": "The weights of each class as an image: red pixels speak for the class, blue ones against it",
}
COLUMNS = {  # of the table of epochs: the key in metrics.jsonl, the heading, the format
    "epoch": ("epoch", "d"),
    "lr": ("learning rate", ".4g"),
    "train_loss": ("training loss", ".4f"),
    "train_accuracy": ("training accuracy", ".4f"),
    "validation_loss": ("validation loss", ".4f"),
    "validation_accuracy": ("validation accuracy", ".4f"),
    "test_loss": ("test loss", ".4f"),
    "test_accuracy": ("test accuracy", ".4f"),
    "seconds": ("seconds", ".2f"),
    "images_per_second": ("images/s", ",.0f"),
}


UNFINISHED = "This run has not come to its end."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="The run's folder, runs/<name>")


def run(arguments: argparse.Namespace) -> None:
    print(write(arguments.folder))


def write(folder: Path) -> Path:
    """Write report.html into the run's folder and return its path. UserError if that is none or cannot be written."""
    try:
        config: Record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a run: {error.strerror}: {error.filename}") from error
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from error
    path = folder / "report.html"
    files.write_text(path, page(folder.resolve().name, config, records.read(folder / records.FILE), pictures(folder)))
    return path


def pictures(folder: Path) -> list[tuple[str, bytes]]:
    """The folder's PNG files as (caption, bytes)."""
    order = list(CAPTIONS)
    paths = sorted(
        folder.glob("*.png"), key=lambda path: (path.name not in order, [*order, path.name].index(path.name))
    )
    return [(CAPTIONS.get(path.name, path.stem), path.read_bytes()) for path in paths]


def page(name: str, config: Record, events: Iterable[Record], pictures: Iterable[tuple[str, bytes]]) -> str:
    """The whole page. What stands in the records is text to it, whatever characters it has."""
    import jinja2  # torch brings it

    of_kind = {kind: [event for event in events if event["event"] == kind] for kind in ("start", "epoch", "end")}
    start: Record = next(iter(of_kind["start"]), {})
    end: Record = next(reversed(of_kind["end"]), {})
    epochs = of_kind["epoch"]
    later = [event for event in events if event["event"] not in ("start", "epoch")]
    told = [
        *((event["event"].capitalize(), _without(event, "event", "class_accuracy")) for event in later),
        ("What was asked for", config),
        ("What it ran on", _without(start, "event", "warning", *config)),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": _text, "number": _number}
    return environment.get_template("report.html").render(
        name=name,
        subtitle=_subtitle(config, start),
        warnings=[*([start["warning"]] if start.get("warning") else []), *([] if end else [UNFINISHED])],
        figures=_figures(epochs[-1] | end) if epochs else {},
        pictures=[(caption, base64.b64encode(png).decode()) for caption, png in pictures],
        classes=end.get("class_accuracy"),
        columns={key: column for key, column in COLUMNS.items() if any(key in epoch for epoch in epochs)},
        epochs=epochs,
        records=[(title, record) for title, record in told if record],
    )


def _without(record: Record, *keys: str) -> Record:
    return {key: value for key, value in record.items() if key not in keys}


def _subtitle(config: Record, start: Record) -> str:
    """What was trained, and when."""
    told = [str(config["model"])] if "model" in config else []
    told += [f"{config['loss']} loss"] if "loss" in config else []
    told += [f"{key.replace('_', ' ')} {_text(config[key])}" for key in ("lr", "batch_size", "seed") if key in config]
    told += [str(start["date"]).replace("T", " ")] if "date" in start else []
    return ", ".join(told)


def _figures(last: Record) -> dict[str, str]:
    """The figures in the end, large."""
    shown = ("epoch", "train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
    columns = {key: COLUMNS[key] for key in shown} | {"calibration_error": ("calibration error", ".4f")}
    return {heading: _number(last[key], form) for key, (heading, form) in columns.items() if key in last}


def _number(value: Any, form: str) -> str:
    try:
        return format(value, form)
    except (TypeError, ValueError):
        return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)

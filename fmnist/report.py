"""A run as one page, report.html: what was asked for, what came out, the pictures, and what it ran on.

The page needs nothing but itself: pictures are inlined as data URIs, and its Content-Security-Policy forbids the
browser to fetch anything. It is made from the files of the run's folder alone, so it can be made again at any time.
"""

import argparse
import base64
import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from . import files
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="The run's folder, runs/<name>")


def run(arguments: argparse.Namespace) -> None:
    print(write(arguments.folder))


def write(folder: Path) -> Path:
    """Write report.html into the run's folder and return its path. UserError if that is none or cannot be written."""
    config, records = _read(folder)
    path = folder / "report.html"
    files.write_text(path, page(folder.resolve().name, config, records, pictures(folder)))
    return path


def _read(folder: Path) -> tuple[Record, list[Record]]:
    """config.json, and the records of metrics.jsonl that are whole: the last may be cut off where a run was killed."""
    try:
        config: Record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a run: {error.strerror}: {error.filename}") from error
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from error
    records: list[Record] = []
    for i, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if i < len(lines):
                raise UserError(f"{folder / 'metrics.jsonl'}, line {i}, is not JSON: {error}") from error
    return config, records


def pictures(folder: Path) -> list[tuple[str, bytes]]:
    """The folder's PNG files as (caption, bytes)."""
    paths = sorted(folder.glob("*.png"), key=lambda path: (_place(path.name), path.name))
    return [(CAPTIONS.get(path.name, path.stem), path.read_bytes()) for path in paths]


def _place(name: str) -> int:
    return list(CAPTIONS).index(name) if name in CAPTIONS else len(CAPTIONS)


def page(name: str, config: Record, records: list[Record], pictures: Iterable[tuple[str, bytes]]) -> str:
    """The whole page. What stands in the records is text to it, whatever characters it has."""
    start: Record = next((record for record in records if record.get("event") == "start"), {})
    epochs = [record for record in records if record.get("event") == "epoch"]
    environment = {key: value for key, value in start.items() if key not in config and key not in ("event", "warning")}
    end = next((record for record in reversed(records) if record.get("event") == "end"), {})
    later = [record for record in records if record.get("event") not in ("start", "epoch")]
    parts = [
        f"<h1>{escape(name)}</h1>",
        _subtitle(config, start),
        _warning(start.get("warning"), finished=any(record.get("event") == "end" for record in records)),
        _headline(epochs, end),
        *(_figure(caption, png) for caption, png in pictures),
        "<h2>Test accuracy of each class</h2>" + _classes(end["class_accuracy"]) if "class_accuracy" in end else "",
        "<h2>Epochs</h2>" + _epochs(epochs) if epochs else "",
        *(f"<h2>{escape(str(record.get('event')).capitalize())}</h2>" + _definitions(record) for record in later),
        "<h2>What was asked for</h2>" + _definitions(config),
        "<h2>What it ran on</h2>" + _definitions(environment) if environment else "",
    ]
    before, between, after = re.split(r"\{title\}|\{body\}", TEMPLATE)
    return before + escape(name) + between + "\n".join(part for part in parts if part) + after


def _warning(warning: str | None, finished: bool) -> str:
    texts = [warning] if warning else []
    if not finished:
        texts.append("This run has not come to its end.")
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in texts)


def _subtitle(config: Record, start: Record) -> str:
    """What was trained, and when."""
    told = [str(config["model"])] if "model" in config else []
    told += [f"{config['loss']} loss"] if "loss" in config else []
    told += [f"{key.replace('_', ' ')} {_text(config[key])}" for key in ("lr", "batch_size", "seed") if key in config]
    if "date" in start:
        told.append(str(start["date"]).replace("T", " "))
    return f'<p class="subtitle">{escape(", ".join(told))}</p>' if told else ""


def _headline(epochs: list[Record], end: Record) -> str:
    """The figures in the end, large."""
    if not epochs:
        return "<p>No epoch was finished.</p>"
    shown = ("epoch", "train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
    last = epochs[-1] | end
    figures = [
        (escape(heading), _number(last[key], form))
        for key, (heading, form) in COLUMNS.items()
        if key in shown and key in last
    ]
    if "calibration_error" in end:
        figures.append(("calibration error", _number(end["calibration_error"], ".4f")))
    return '<dl class="figures">' + "".join(f"<div><dt>{h}</dt><dd>{v}</dd></div>" for h, v in figures) + "</dl>"


def _figure(caption: str, png: bytes) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _classes(accuracy: Record) -> str:
    head = '<thead><tr><th scope="col">class</th><th scope="col">accuracy</th></tr></thead>'
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_number(share, ".4f")}</td></tr>'
        for name, share in accuracy.items()
    )
    return _wide(f'<table class="pairs">{head}<tbody>\n{rows}\n</tbody></table>')


def _epochs(epochs: list[Record]) -> str:
    columns = {key: column for key, column in COLUMNS.items() if any(key in epoch for epoch in epochs)}
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading, _ in columns.values())
    rows = (
        "".join(f"<td>{_number(epoch.get(key), form)}</td>" for key, (_, form) in columns.items()) for epoch in epochs
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return _wide(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>")


def _definitions(record: Record) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(key.replace("_", " "))}</th><td>{escape(_text(value))}</td></tr>'
        for key, value in record.items()
        if key not in ("event", "class_accuracy")
    )
    return _wide(f'<table class="pairs"><tbody>\n{rows}\n</tbody></table>')


def _wide(table: str) -> str:
    """On a narrow screen the table scrolls, with the keyboard too, and not the page."""
    return f'<div class="wide" tabindex="0">{table}</div>'


def _number(value: Any, form: str) -> str:
    try:
        return format(value, form)
    except (TypeError, ValueError):
        return escape(_text(value))


def _text(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root { --page: #fdfdfc; --text: #1c1c1a; --faint: #63635e; --line: #dededa; --warning: #8a3b00; --card: #ffffff }
@media (prefers-color-scheme: dark) {
  :root { --page: #161618; --text: #e8e8e4; --faint: #a3a39d; --line: #36363a; --warning: #ffb37a; --card: #ffffff }
}
* { box-sizing: border-box }
body { max-width: 56rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--text);
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere }
.subtitle { margin: 0 0 1.5rem; color: var(--faint) }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.15rem }
.warning { padding: .6rem 0 .6rem .9rem; border-left: 4px solid var(--warning); color: var(--warning) }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.75rem; margin: 0 0 2rem }
.figures dt { color: var(--faint); font-size: .875rem }
.figures dd { margin: 0; font-size: 1.6rem; font-variant-numeric: tabular-nums }
figure { margin: 2rem 0 }
img { display: block; max-width: 100%; height: auto; padding: .5rem; border-radius: 6px; background: var(--card) }
figcaption { margin-top: .5rem; color: var(--faint); font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
thead th { color: var(--faint); font-weight: 600 }
.pairs { width: 100% }
.pairs th { width: 13rem; color: var(--faint); font-weight: 400; text-align: left; white-space: nowrap }
.pairs td { text-align: left; overflow-wrap: anywhere }
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

"""metrics.jsonl: one JSON object a line, each an event: "start", "epoch", "end", and "resume" where a run went on.

metrics.csv has the epochs alone, for a spreadsheet: a line each, under the names that they have in metrics.jsonl.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from . import files
from .errors import CannotWrite, UserError

FILE = "metrics.jsonl"
CSV_FILE = "metrics.csv"


class Records(list[dict[str, Any]]):
    """The events so far, each on disk before `add` returns."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def add(self, event: str, **values: Any) -> dict[str, Any]:
        entry = {"event": event, **values}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from error
        self.append(entry)
        return entry

    def epochs(self) -> list[dict[str, Any]]:
        return [entry for entry in self if entry["event"] == "epoch"]

    def finished(self) -> bool:
        return bool(self) and self[-1]["event"] == "end"

    def forget_after(self, epoch: int) -> None:
        """Drop the epochs above `epoch`, on disk too: recorded, but interrupted before their state was saved."""
        self[:] = [entry for entry in self if entry["event"] != "epoch" or entry["epoch"] <= epoch]
        files.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self))

    def write_csv(self) -> None:
        epochs = [{name: value for name, value in epoch.items() if name != "event"} for epoch in self.epochs()]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for epoch in epochs for name in epoch)))
        writer.writeheader()
        writer.writerows(epochs)
        files.write_text(self.path.with_name(CSV_FILE), text.getvalue())


def read(path: Path) -> Records:
    """The records of a run, but for a last line that was cut off. UserError if there are none, or one is no record."""
    records = Records(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no records of a run: {error}") from error
    for i, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} holds no records of a run: line {i} is not JSON: {error}") from error
        if not isinstance(record, dict) or "event" not in record:
            raise UserError(f"{path} holds no records of a run: line {i} is no event")
        records.append(record)
    return records

"""metrics.jsonl: one JSON object a line, each an event: "start", "epoch", "end", and "resume" where a run went on."""

import json
from pathlib import Path
from typing import Any

from . import files
from .errors import UserError

FILE = "metrics.jsonl"


class Records(list[dict[str, Any]]):
    """The events so far, each on disk before `add` returns."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def add(self, event: str, **values: Any) -> dict[str, Any]:
        entry = {"event": event, **values}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.append(entry)
        return entry

    def epochs(self) -> list[dict[str, Any]]:
        return [entry for entry in self if entry["event"] == "epoch"]

    def finished(self) -> bool:
        return any(entry["event"] == "end" for entry in self)

    def forget_after(self, epoch: int) -> None:
        """Drop the epochs above `epoch`, on disk too: recorded, but interrupted before their state was saved."""
        self[:] = [entry for entry in self if entry["event"] != "epoch" or entry["epoch"] <= epoch]
        files.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self))


def read(path: Path) -> Records:
    """The records of a run, but for a last line that was cut off. UserError if there are none."""
    records = Records(path)
    try:
        lines = path.read_text().split("\n")
        records.extend(json.loads(line) for line in lines[:-1])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no records of a run: {error}") from error
    return records

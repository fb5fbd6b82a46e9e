"""How far a run is: one bar for all of it on a terminal, with the loss and the time left, and a line an epoch.

tqdm draws the bar where it is installed and stderr is a terminal; otherwise nothing is drawn, and nothing is read.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

SECONDS = 0.5  # between two readings of the loss: each waits for the device


def bar(**options: Any) -> Any:
    """tqdm's bar, gone when it is closed, or what takes its methods and does nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(leave=False, disable=None, **options)


class _NoBar:
    disable = True

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Progress:
    """For steps `done` to `total` of a run. A context manager: the bar is gone in the end."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.read_at = 0.0
        self.bar = bar(total=total, initial=done, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def epoch(self, epoch: int, n_epochs: int) -> None:
        self.bar.set_description(f"epoch {epoch}/{n_epochs}")

    def step(self, loss: Tensor) -> None:
        """One more is done, and this was its loss, a scalar on the device."""
        if self.bar.disable:
            return
        if time.monotonic() - self.read_at > SECONDS:
            self.bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
            self.read_at = time.monotonic()
        self.bar.update()

    def line(self, text: str) -> None:
        """Print a line to stdout, above the bar."""
        self.bar.clear()
        print(text)
        sys.stdout.flush()
        self.bar.refresh()

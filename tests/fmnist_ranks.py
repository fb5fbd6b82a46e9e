"""fmnist as torchrun runs it, in several processes that the test plays torchrun for: it holds their store.

They are forked from one process that has imported everything, which takes moments where torchrun takes seconds.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

ROOT = Path(__file__).parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
TIMEOUT = 60.0  # seconds
LATE = ["torch._dynamo", "safetensors.torch"]  # what a run imports late: the first optimizer does, in seconds


def nothing(rank: int) -> None:
    """To be done in each process first."""


class Group:
    """Processes 0, 1, ... of one command; what each has written to stdout and stderr."""

    def __init__(self, folder: Path, size: int, arguments: str, first: Callable[[int], None] = nothing) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        work = ((rank, size, self.store.port, folder, arguments.split(), first) for rank in range(size))
        self.processes = [FORKSERVER.Process(target=_rank, args=args) for args in work]
        for process in self.processes:
            process.start()

    def out(self, rank: int) -> str:
        return self._text(f"{rank}.out")

    def err(self) -> list[str]:
        """The lines of all, each behind the number of its process, without those of torch's own logs."""
        texts = [(rank, self._text(f"{rank}.err")) for rank in range(len(self.processes))]
        return [f"{rank} {line}" for rank, text in texts for line in text.splitlines() if not _of_torch(line)]

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def until(self, text: str) -> None:
        """Wait for rank 0 to have printed that."""
        end = time.monotonic() + TIMEOUT
        while text not in self.out(0):
            assert time.monotonic() < end and self.processes[0].exitcode is None, self.err()
            time.sleep(0.01)

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, ranks: Any = None) -> list[int]:
        """The exit codes, of those ranks or of all, once they have ended."""
        chosen = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        end = time.monotonic() + TIMEOUT
        for process in chosen:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in chosen]
        assert None not in codes, f"{codes}: one hangs; {self.err()}"
        return [int(code) for code in codes if code is not None]


@contextmanager
def group(*args: Any) -> Iterator[Group]:
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "TRITON_INTERPRET")}
    os.environ.update(PYTHONPATH=f"{ROOT}/kernels:{ROOT}:{ROOT}/tests", OMP_NUM_THREADS="1")
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        FORKSERVER.set_forkserver_preload(["fmnist.train", "fmnist_ranks", *LATE])
        started = Group(*args)
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.join()


def run(*args: Any) -> tuple[list[int], Group]:
    """To the end: the exit codes."""
    with group(*args) as started:
        return started.wait(), started


def _rank(rank: int, size: int, port: int, folder: Path, arguments: list[str], first: Callable[[int], None]) -> None:
    for number, name in ((1, f"{rank}.out"), (2, f"{rank}.err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    from fmnist.__main__ import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's server ignores it
    first(rank)
    sys.exit(main(arguments))


def _of_torch(line: str) -> bool:
    return line.startswith(("[rank", "[W", "Exception raised from", "frame #", "<omitting")) or not line

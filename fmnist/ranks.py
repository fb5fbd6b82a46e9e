"""A run in several processes: torchrun --nproc-per-node 2 -m fmnist train

Data parallel: every rank has the whole model and takes its part of each minibatch. DistributedDataParallel replaces
the gradients of the ranks by their mean, so that all take the same step. Of a minibatch of n images and W ranks

    mean over the ranks of  (W / n) * sum of the losses of a rank's part  =  mean of the losses of the minibatch

whatever the sizes of the parts: each image weighs the same, as in one process.

Rank 0 reads, writes and prints, as one process does (train.py). The others are told what to do, and write nothing.

A rank that ends leaves word why. Each also counts up a number in torchrun's store and watches that of the next rank: if
it stands still for SILENT seconds, that rank is gone. gloo alone waits half an hour, and does not say for whom.
"""

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .command import launched
from .errors import Interrupted, Lost, UserError

BEAT = 0.5  # seconds between two signs of life
SILENT = 20.0  # seconds without one: that rank is gone
GRACE = 10.0  # seconds to come back from a collective that waits for it


class Ranks:
    """This process as one of `size`; by itself, rank 0 of 1."""

    def __init__(self, rank: int = 0, size: int = 1, watch: "Watch | None" = None) -> None:
        self.rank, self.size, self.watch = rank, size, watch

    def part(self, n: int) -> slice:
        """This rank's of n rows. The parts are all rows, each once, and their sizes differ by 1 at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def divisor(self, n: int) -> float | None:
        """Of the sum of the losses of this rank's part of n rows: n / W. None for one process, which takes the mean."""
        return n / self.size if self.watch else None

    def with_mean_gradients(self, module: nn.Module) -> nn.Module:
        """The module, after whose backward pass every rank has the mean of the ranks' gradients."""
        return nn.parallel.DistributedDataParallel(module) if self.watch else module

    def sum(self, values: Sequence[float]) -> list[float]:
        """Of each value over all ranks, in float64."""
        if not self.watch:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return list(total.tolist())

    def told(self, what: Any = None) -> Any:
        """What rank 0 says, on every rank."""
        said = [what]
        if self.watch:
            dist.broadcast_object_list(said, device=torch.device("cpu"))
        return said[0]

    def agree(self, **facts: Any) -> None:
        """UserError on every rank where one has other facts than rank 0."""
        found: list[dict[str, Any]] = [facts] * self.size
        if self.watch:
            dist.all_gather_object(found, facts)
        for rank, other in enumerate(found):
            for name, value in other.items():
                if value != found[0][name]:
                    raise UserError(f"rank {rank} has {name} {value}, and rank 0 {found[0][name]}")

    def advise(self, advice: str) -> None:
        """What is to be said behind the reason where another rank ends this one."""
        if self.watch:
            self.watch.advice = advice

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Whatever fails here because another rank is gone is a Lost that says so."""
        try:
            yield
        except RuntimeError as error:
            if self.watch and (lost := self.watch.why()):
                raise lost from error
            raise


ALONE = Ranks()


def check_device(place: torch.device) -> None:
    """UserError where the ranks of torchrun cannot have a device each."""
    if launched() and place.type == "mps":
        raise UserError("--device mps is for one process: torch.distributed has no backend for Apple's GPU")
    if launched() and place.type == "cuda" and _local_rank() >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise UserError(f"more ranks than GPUs on {socket.gethostname()}: --nproc-per-node {n}, or --device cpu")


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, all of them there; without torchrun, ALONE. They leave together."""
    if not launched():
        yield ALONE
        return
    if not dist.is_available():
        raise UserError(f"torch {torch.__version__} was built without torch.distributed: one process is all it can do")
    if torch.cuda.is_available() and _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    try:
        dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
        watch = Watch(dist.get_rank(), dist.get_world_size())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the ranks do not find each other: {error}") from error
    ranks = Ranks(watch.rank, watch.size, watch)
    before = signal.signal(signal.SIGTERM, watch.on_sigterm)  # torchrun's, where another rank has ended
    watch.start()
    try:
        with ranks.explained():
            yield ranks
            ranks.sum([0.0])
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already, and has to say why
        if not isinstance(error, Lost):
            watch.leave_word(error)
        elif error.speaker == ranks.rank != 0:
            print(f"fmnist: {error}", file=sys.__stderr__)
        raise
    finally:
        watch.stopped.set()
    ranks.sum([0.0])  # nobody watches any longer: now a rank may go
    dist.destroy_process_group()
    signal.signal(signal.SIGTERM, before)


class Watch(threading.Thread):
    """Signs of life and last words, in torchrun's store, through a connection of its own."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(daemon=True)
        self.rank, self.size = rank, size
        self.stopped = threading.Event()
        self.lost: Lost | None = None
        self.advice = ""
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False)  # type: ignore[attr-defined]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.store = dist.PrefixStore(f"fmnist/{attempt}", store)  # type: ignore[attr-defined]
        self.store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")

    def run(self) -> None:
        following, beats, moved = (self.rank + 1) % self.size, 0, time.monotonic()
        try:
            while not self.stopped.wait(BEAT) and not self._word():
                self.store.add(f"beats/{self.rank}", 1)
                before, beats = beats, self.store.add(f"beats/{following}", 0)
                if beats != before:
                    moved = time.monotonic()
                elif time.monotonic() - moved > SILENT:
                    self._is_gone(following, f"no sign of life for {SILENT:g} s")
        except RuntimeError:
            self._alone()
        if self.stopped.is_set():
            return
        _thread.interrupt_main(signal.SIGTERM)
        if not self.stopped.wait(GRACE):  # the main thread waits for the rank that is gone, where no signal reaches it
            if self.lost and self.lost.speaker == self.rank:
                print(f"fmnist: {self.lost}", file=sys.__stderr__, flush=True)
            os._exit(1)

    def why(self) -> Lost | None:
        """Asked when something failed here: which rank has ended, or been silent for some beats. None: none has."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one reason is enough
        try:
            before = [self.store.add(f"beats/{rank}", 0) for rank in range(self.size)]
            until = time.monotonic() + 6 * BEAT
            while not self._word() and time.monotonic() < until:
                time.sleep(BEAT / 5)
            if not self.lost:
                for rank in range(self.size):
                    if rank != self.rank and self.store.add(f"beats/{rank}", 0) == before[rank]:
                        self._is_gone(rank, "it gives no sign of life")
        except RuntimeError:
            self._alone()
        return self.lost

    def leave_word(self, error: BaseException) -> None:
        """Why this rank ends, for the others. What they know already stays."""
        if isinstance(error, (KeyboardInterrupt, Interrupted)):
            why = "was interrupted"
        else:
            why = "has ended: " + (str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        try:
            self.store.compare_set("word", "", f"0 rank {self.rank} {why}")
        except RuntimeError:  # torchrun is gone
            pass

    def on_sigterm(self, *_: object) -> None:
        if sys.exc_info()[0] is None:  # else it ends already, for the first reason
            raise self.why() or KeyboardInterrupt

    def _is_gone(self, rank: int, sign: str) -> None:
        """Rank 0 says so for all, or if it is the one, rank 1."""
        who = self.store.get(f"who/{rank}").decode()
        self.store.compare_set("word", "", f"{int(rank == 0)} rank {rank} is gone ({who}): {sign}")
        self._word()

    def _alone(self) -> None:
        self.lost = self.lost or Lost("torchrun is gone: its store does not answer" + self.advice, self.rank)

    def _word(self) -> bool:
        """Whether a rank has left word, which is then in `lost`."""
        if self.store.check(["word"]):
            speaker, text = self.store.get("word").decode().split(" ", 1)
            self.lost = Lost(text + self.advice, int(speaker))
        return self.lost is not None

"""Work done by several processes that form a gloo group, and what they return.

A process that raises ends the others, and its traceback is the test's; so does one that hangs, after `timeout`.
"""

import datetime
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softxent import dispatch

WAIT = datetime.timedelta(seconds=60)  # of a collective for a rank that does not come


def run(world: int, work: Callable[..., Any], *args: Any, timeout: float = 240, interpret: bool = False) -> list[Any]:
    """work(rank, *args) of each rank. interpret: with the kernels, in Triton's interpreter."""
    context = mp.get_context("forkserver")  # torch is imported once, not by every process
    context.set_forkserver_preload(["torch", "torch.distributed.tensor"])
    with tempfile.TemporaryDirectory() as folder:
        of = world, folder, interpret, work, args
        ranks = [context.Process(target=_rank, args=(rank, *of)) for rank in range(world)]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), timeout)
            return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def run_once(*args: Any, **kwargs: Any) -> Callable[[], list[Any]]:
    """`run`, when it is first asked for; what it raises is raised by everyone who asks."""
    done: list[Any] = []

    def found() -> list[Any]:
        if not done:
            try:
                done.append(run(*args, **kwargs))
            except AssertionError as error:
                done.append(error)
        if isinstance(done[0], AssertionError):
            raise done[0]
        return done[0]  # type: ignore[no-any-return]

    return found


def _wait(ranks: list[Any], folder: Path, timeout: float) -> None:
    until = time.monotonic() + timeout
    while any(process.exitcode is None for process in ranks):
        if any(process.exitcode for process in ranks) or time.monotonic() > until:
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in ranks]
    if any(codes) or None in codes:
        time.sleep(0.5)  # for who fails because another did
        told = [path.read_text() for path in sorted(folder.glob("*.error"))]
        raise AssertionError("\n".join([f"exit codes of the ranks: {codes}; None was killed", *told]))


def _rank(rank: int, world: int, folder: str, interpret: bool, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        dispatch.INTERPRET = interpret
        if interpret:
            os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
            import interpreter

            interpreter.install()
        torch.set_num_threads(1)
        at = Path(folder, "store").as_uri()
        dist.init_process_group("gloo", init_method=at, rank=rank, world_size=world, timeout=WAIT)
        found = work(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
        torch.save(found, Path(folder, f"{rank}.pt"))
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise


class Collectives(TorchDispatchMode):
    """What goes over the wire meanwhile: (operation, bytes that this rank contributes) of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            given = args[1] if func.namespace == "c10d" and "gather" in func.__name__ else args[0]
            leaves = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
            self.seen.append((func.__name__.split(".")[0].strip("_"), sum(x.numel() * x.itemsize for x in leaves)))
        return func(*args, **(kwargs or {}))

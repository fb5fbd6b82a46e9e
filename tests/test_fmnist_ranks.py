"""fmnist in several processes: the run of one, however many there are; and its end, whoever ends it."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fmnist.data
import fmnist_ranks
from fmnist import checkpoint, files, plots, ranks, state
from fmnist.__main__ import main
from fmnist.errors import UserError
from fmnist_ranks import ROOT, group
from fmnist_runs import records, without_pictures
from softxent import dispatch

GOES_ON = "; this goes on after the last whole epoch: torchrun --nproc-per-node 2 -m fmnist train --resume {}"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    monkeypatch.setattr(dispatch, "INTERPRET", False)


def no_pictures(rank: int) -> None:
    for name in ("curves", "predictions", "mistakes", "confusion", "templates"):
        setattr(plots, name, lambda *_: None)


def impatient(rank: int) -> None:
    no_pictures(rank)
    ranks.BEAT, ranks.SILENT, ranks.GRACE = 0.2, 2.0, 1.0


def options(runs: Path, more: str = "") -> str:
    return f"train --data sample --epochs 3 --runs {runs} --name run {more}"


def epochs(folder: Path) -> np.ndarray:
    """Losses and accuracies of each."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.endswith(("_loss", "_accuracy"))]
    return np.array([[float(row[name]) for name in names] for row in rows])


def assert_same_run(found: Path, expected: Path) -> None:
    """Losses and accuracies of each epoch, and the weights, but for the rounding of sums in another order."""
    np.testing.assert_allclose(epochs(found), epochs(expected), rtol=2e-5)
    theirs = load_file(expected / checkpoint.FILE)
    for name, x in load_file(found / checkpoint.FILE).items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-4, atol=1e-6)


def test_the_parts_are_all_rows_each_once() -> None:
    for n in range(30):
        for size in range(1, 8):
            parts = [list(range(n))[ranks.Ranks(rank, size).part(n)] for rank in range(size)]
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (1, "--epochs 1"),
        (2, ""),
        (3, "--batch-size 333"),  # the last of 2000 images are two: one rank has none of them
        (
            3,
            "--loss one-op --model mlp --mixup 0.2 --label-smoothing 0.1 --validation 1500 --batch-size 83",
        ),
        (2, "--loss torch --model mlp --mixup 0.2 --schedule linear --validation 1499 --batch-size 250"),
        (3, "--loss mse --validation 101 --batch-size 271 --threads 0"),
        (3, "--loss torch --model cnn --validation 1700 --batch-size 149 --epochs 2"),
    ],
)
def test_the_curve_is_that_of_one_process(tmp_path: Path, size: int, given: str) -> None:
    assert main(options(tmp_path / "alone", given).split()) == 0
    codes, done = fmnist_ranks.run(tmp_path / "logs", size, options(tmp_path / "ranks", given), no_pictures)
    assert codes == [0] * size, done.err()
    assert_same_run(tmp_path / "ranks" / "run", tmp_path / "alone" / "run")
    start, *middle, end = records(tmp_path / "ranks" / "run")
    assert end["event"] == "end" and [event["epoch"] for event in middle] == list(range(1, len(middle) + 1))
    assert start["ranks"] == size and start["command"].startswith(f"torchrun --nproc-per-node {size} -m fmnist train")
    assert "epoch   1/" in done.out(0) and not any(done.out(rank) for rank in range(1, size)) and not done.err()


def test_a_run_is_resumed_by_another_number_of_ranks(tmp_path: Path) -> None:
    """Interrupted with three, gone on with two, prolonged by one."""
    given = "--batch-size 300 --momentum 0.5"
    assert main(options(tmp_path / "alone", f"{given} --epochs 6").split()) == 0
    folder = tmp_path / "ranks" / "run"
    with group(tmp_path / "3", 3, options(tmp_path / "ranks", given), interrupted_in_the_third_epoch) as started:
        assert started.wait() == [130] * 3
        hint = GOES_ON.format(folder).replace("node 2", "node 3")
        assert started.err() == [f"0 fmnist: interrupted{hint}"]
    codes, done = fmnist_ranks.run(tmp_path / "2", 2, f"train --resume {folder}", no_pictures)
    assert codes == [0, 0], done.err()
    assert main(["train", "--resume", str(folder), "--epochs", "6"]) == 0
    assert_same_run(folder, tmp_path / "alone" / "run")
    assert [event.get("ranks") for event in records(folder) if event["event"] in ("start", "resume")] == [3, 2, None]


def interrupted_in_the_third_epoch(rank: int) -> None:
    """Each rank by itself, in the middle of it."""
    steps = 0
    step = torch.optim.SGD.step

    def counted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 17:  # 7 an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    torch.optim.SGD.step = counted  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    ("number", "whom", "survivors", "line"),
    [
        (signal.SIGINT, [0, 1], [], "0 fmnist: interrupted{hint}"),
        (signal.SIGINT, [1], [0], "0 fmnist: rank 1 was interrupted{hint}"),
        (signal.SIGINT, [0], [1], "0 fmnist: interrupted{hint}"),
        (signal.SIGTERM, [0, 1], [], "0 fmnist: interrupted{hint}"),
        (
            signal.SIGKILL,
            [1],
            [0],
            "0 fmnist: rank 1 is gone (process {pid} on {host}): it gives no sign of life{hint}",
        ),
        (
            signal.SIGKILL,
            [0],
            [1],
            "1 fmnist: rank 0 is gone (process {pid} on {host}): it gives no sign of life{hint}",
        ),
        (signal.SIGSTOP, [1], [0], "0 fmnist: rank 1 is gone (process {pid} on {host}): no sign of life for 2 s{hint}"),
        (signal.SIGSTOP, [0], [1], "1 fmnist: rank 0 is gone (process {pid} on {host}): no sign of life for 2 s{hint}"),
    ],
)
def test_whoever_ends_the_others_end_with_one_line_and_the_files_are_whole(
    tmp_path: Path, number: signal.Signals, whom: list[int], survivors: list[int], line: str
) -> None:
    folder = tmp_path / "runs" / "run"
    with group(tmp_path / "logs", 2, options(tmp_path / "runs", "--epochs 1000000"), impatient) as started:
        started.until("epoch   3")
        began = time.monotonic()
        for rank in whom:
            started.signal(rank, number)
        assert all(started.wait(survivors if number == signal.SIGSTOP else None))
        assert time.monotonic() - began < 30
        names = {"pid": started.processes[whom[0]].pid, "host": socket.gethostname(), "hint": GOES_ON.format(folder)}
        said = started.err()
        if number == signal.SIGTERM:  # rank 0 looks first whether another rank has ended, which by now it may have
            said = [one.replace("rank 1 was interrupted", "interrupted") for one in said]
        assert said == [line.format(**names)]
    written = int(files.read_tensors(folder / state.FILE)[1]["epoch"])
    assert written >= 2 and len(epochs(folder)) in (written, written + 1)
    assert checkpoint.load(folder / checkpoint.FILE)[0] == "softmax"
    assert whom == [0] or not list(folder.glob("*partial*")), "rank 0 may be killed while it writes; nobody else"
    assert main(["train", "--resume", str(folder), "--epochs", str(written + 2)]) == 0
    assert len(epochs(folder)) == written + 2


def test_without_torchrun_the_ranks_end_too(tmp_path: Path) -> None:
    """Killed, it leaves them to themselves."""
    with group(tmp_path / "logs", 2, options(tmp_path / "runs", "--epochs 1000000"), impatient) as started:
        started.until("epoch   2")
        started.store = None
        assert started.wait() == [2, 2]
        gone = "fmnist: torchrun is gone: its store does not answer" + GOES_ON.format(tmp_path / "runs" / "run")
        assert started.err() == [f"0 {gone}", f"1 {gone}"]


def without_data(rank: int) -> None:
    if rank:
        os.environ["FMNIST_DATA"] = "/nonexistent"


def with_fewer_images(rank: int) -> None:
    if rank == 1:
        whole = fmnist.data.load("sample")
        few = whole._replace(train_images=whole.train_images[:50], train_labels=whole.train_labels[:50])
        fmnist.data.load = lambda *_: few  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("arguments", "first", "line"),
    [
        ("train --epochs 0", no_pictures, "argument --epochs: invalid value '0'"),
        ("evaluate --checkpoint runs", no_pictures, "only train runs under torchrun: python -m fmnist evaluate --ch"),
        ("train --data sample --name run --runs {runs}", no_pictures, "exists: give another --name, or delete it"),
        ("train --resume {runs}", no_pictures, "is not the folder of a run"),
        ("train --data sample --runs {runs} --lr 1e30", no_pictures, "training has diverged: try a smaller --lr"),
        ("train --runs {runs}", without_data, "rank 1 has ended: the data directory /nonexistent does not exist"),
        ("train --data sample --runs {runs}", with_fewer_images, "rank 1 has n_train 50, and rank 0 2000"),
        ("train --data sample --device mps", no_pictures, "--device mps"),
    ],
)
def test_bad_input_is_one_line_of_one_rank_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, first: Any, line: str
) -> None:
    runs = tmp_path / "runs"
    (runs / "run").mkdir(parents=True)
    monkeypatch.setenv("FMNIST_DATA", "sample")
    codes, done = fmnist_ranks.run(tmp_path / "logs", 2, arguments.format(runs=runs), first)
    assert codes == [2, 2]
    (error,) = done.err()
    assert error.startswith("0 fmnist: ") and line in error


def test_more_ranks_than_gpus_and_apples_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"more ranks than GPUs on .*: --nproc-per-node 1, or --device cpu"):
        ranks.check_device(torch.device("cuda"))
    with pytest.raises(UserError, match="Apple"):
        ranks.check_device(torch.device("mps"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    ranks.check_device(torch.device("cuda"))
    ranks.check_device(torch.device("cpu"))


def test_torchrun_itself_and_ctrl_c(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": "kernels:.", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fmnist"]
    with subprocess.Popen(
        [*command, *options(tmp_path, "--epochs 1000000").split()],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        try:
            assert process.stdout is not None
            while not process.stdout.readline().startswith("epoch   2"):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    said = [line for line in error.splitlines() if line.startswith("fmnist: ")]
    assert said == ["fmnist: interrupted" + GOES_ON.format(tmp_path / "run")], error
    assert len(epochs(tmp_path / "run")) >= 1 and not list((tmp_path / "run").glob("*partial*"))

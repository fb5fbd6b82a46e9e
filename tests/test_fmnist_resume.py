"""An interrupted run: that it goes on to the bit, and what cannot be resumed."""

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fmnist.data
from fmnist import checkpoint, config, device, files, loop, losses, models, plots, state, train
from fmnist.__main__ import main
from fmnist_runs import records, run, without_pictures, without_times
from softxent import dispatch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    monkeypatch.setattr(dispatch, "INTERPRET", False)


def interrupt_in(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of an epoch: some of its steps are done."""
    one_epoch = loop.one_epoch

    def interrupted(*arguments: Any, **options: Any) -> tuple[float, float]:
        if arguments[-1] == epoch:
            step = torch.optim.SGD.step
            monkeypatch.setattr(torch.optim.SGD, "step", _after(2, step, monkeypatch))
        return one_epoch(*arguments, **options)

    monkeypatch.setattr(train, "one_epoch", interrupted)


def _after(n: int, step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    left = n

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left == 0:
            monkeypatch.setattr(torch.optim.SGD, "step", step)
            raise KeyboardInterrupt
        left -= 1
        return step(*arguments, **options)

    return counted


def start(folder: Path, options: str = "") -> int:
    return main(["train", *f"--data sample --epochs 4 --runs {folder} --name run {options}".split()])


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        "",
        "--model cnn --loss torch --batch-size 500 --momentum 0.9",
        "--model mlp --loss mse --mixup 0.3 --label-smoothing 0.1 --momentum 0.9 --schedule linear",
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, epoch: int
) -> None:
    assert start(tmp_path / "whole", options) == 0
    with monkeypatch.context() as patch:
        interrupt_in(epoch, patch)
        assert start(tmp_path / "cut", options) == 130
    folder = tmp_path / "cut" / "run"
    how = f"fmnist: interrupted; this goes on after the last whole epoch: python -m fmnist train --resume {folder}\n"
    assert capsys.readouterr().err == how
    torch.rand(3)  # the process that resumes has drawn other numbers
    assert main(["train", "--resume", str(folder)]) == 0

    expected, found = records(tmp_path / "whole" / "run"), records(folder)
    assert [event["event"] for event in found].count("resume") == 1
    resumed = next(event for event in found if event["event"] == "resume")
    assert resumed["epoch"] == epoch - 1
    found.remove(resumed)
    assert without_times(found) == without_times(expected)
    weights = [load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not list(folder.glob("*partial*"))


@pytest.mark.parametrize("model", models.MODELS)
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_two_options_train_and_resume_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, loss: str
) -> None:
    """Two steps an epoch, of few images. The records of the epochs are those of the uninterrupted run."""
    whole = fmnist.data.load("sample")
    few = whole._replace(**{name: getattr(whole, name)[:100] for name in whole._fields[:4]})
    monkeypatch.setattr(fmnist.data, "load", lambda *_: few)
    fast_options = f"--model {model} --loss {loss} --epochs 2 --batch-size 50"
    for smoothing, mixup in product((0, 0.1), (0, 0.2)):
        schedule = config.SCHEDULES[(smoothing > 0) != (mixup > 0)]
        options = f"{fast_options} --label-smoothing {smoothing} --mixup {mixup} --schedule {schedule}"
        place = tmp_path / f"{smoothing}-{mixup}-{schedule}"
        assert start(place / "whole", options) == 0
        with monkeypatch.context() as patch:
            patch.setattr(train, "one_epoch", _second_interrupted)
            assert start(place / "cut", options) == 130
        assert main(["train", "--resume", str(place / "cut" / "run")]) == 0
        expected, found = (
            without_times([event for event in records(place / name / "run") if event["event"] == "epoch"])
            for name in ("whole", "cut")
        )
        assert found == expected and math.isfinite(found[-1]["test_loss"]), options


def _second_interrupted(*arguments: Any, **options: Any) -> tuple[float, float]:
    if arguments[-1] == 2:
        raise KeyboardInterrupt
    return loop.one_epoch(*arguments, **options)


def test_a_run_may_be_interrupted_twice_and_between_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded and with a checkpoint, but without its state: the epoch is done again, and recorded once."""
    expected = run(tmp_path / "whole", epochs=4)
    save = state.State.save

    def interrupted(self: state.State, path: Path) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(state.State, "save", interrupted)
        assert start(tmp_path) == 130
        assert [event.get("epoch") for event in records(tmp_path / "run")] == [None, 1, 2]
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write('{"event": "epo')  # the power failed
        assert main(["train", "--resume", str(tmp_path / "run")]) == 130
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    found = [event for event in records(tmp_path / "run") if event["event"] != "resume"]
    assert without_times(found) == without_times(expected)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        interrupt_in(2, patch)
        assert start(tmp_path) == 130
    return tmp_path / "run"


def test_settings_may_be_repeated_but_not_changed(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, message in (
        ("--lr 0.5", "was begun with --lr 0.1, not 0.5: leave --lr out"),
        ("--model mlp", "was begun with --model softmax, not mlp"),
        ("--batch-size 1", "was begun with --batch-size 256, not 1"),
        ("--name other", "was begun with --name run, not other"),
        ("--require-full-data", "was begun with --require-full-data False, not True"),
    ):
        capsys.readouterr()
        assert main(["train", "--resume", str(cut), *option.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["train", "--resume", str(cut), "--lr", "0.1", "--epochs", "4"]) == 0


def test_a_run_that_is_prolonged_is_the_longer_run_to_the_bit(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished one, and one that was interrupted."""
    assert start(tmp_path / "whole", "--epochs 6") == 0
    assert start(tmp_path / "finished") == 0
    assert main(["train", "--resume", str(tmp_path / "finished" / "run"), "--epochs", "5"]) == 0
    expected = [event for event in records(tmp_path / "whole" / "run") if event["event"] == "epoch"]
    weights = load_file(tmp_path / "whole" / "run" / "model.safetensors")
    for folder in (cut, tmp_path / "finished" / "run"):
        assert main(["train", "--resume", str(folder), "--epochs", "6"]) == 0
        found = [event for event in records(folder) if event["event"] == "epoch"]
        assert without_times(found) == without_times(expected)
        assert all(torch.equal(weights[key], x) for key, x in load_file(folder / "model.safetensors").items())
        assert config.read(folder)["epochs"] == 6
    events = [event["event"] for event in records(folder)]
    assert events.count("end") == 3 and events.count("resume") == 2 and events[-1] == "end"
    assert "not come to its end" not in (folder / "report.html").read_text()
    capsys.readouterr()
    for given, message in (
        ("", "is finished, with 6 epochs; --epochs N with a greater N prolongs it"),
        ("--epochs 6", "is finished, with 6 epochs"),
        ("--epochs 3", "is finished, with 6 epochs"),
    ):
        assert main(["train", "--resume", str(folder), *given.split()]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_prolonged_says_what_to_do_instead(cut: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "--resume", str(cut), "--epochs", "1"]) == 0, "the one that is done: it is measured and drawn"
    assert start(tmp_path / "falling", "--schedule linear") == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "falling" / "run"), "--epochs", "8"]) == 2
    error = capsys.readouterr().err
    assert "a rate that falls to 0 in 4 epochs" in error and "--config" in error and error.count("\n") == 1


def test_ctrl_c_before_there_is_anything_to_resume_leaves_the_name_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    for owner, name in ((state.State, "save"), (train, "_write_config")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, ctrl_c)
            assert start(tmp_path) == 130
        assert capsys.readouterr().err == "fmnist: interrupted\n"
        assert not (tmp_path / "run").exists()
    assert start(tmp_path) == 0


@pytest.mark.parametrize("when", ["in an epoch", "at the pictures", "at the page"])
def test_a_full_disk_is_one_line_that_says_what_goes_on_and_nothing_half_written_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    suffix = {"in an epoch": ".safetensors", "at the pictures": ".png", "at the page": ".html"}[when]
    monkeypatch.setattr(plots, "curves", lambda epochs, title, path, *_: files.write_text(path, "a picture"))
    replace = os.replace
    calls = 0

    def full(source: Path, target: Path) -> None:
        nonlocal calls
        if target.suffix == suffix:
            calls += 1
            if suffix != ".safetensors" or calls > 3:  # the first state, and the first epoch's two files
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert start(tmp_path) == 2
    error = capsys.readouterr().err
    folder = tmp_path / "run"
    assert "No space left on device" in error and error.count("\n") == 1
    assert not list(folder.glob("*partial*"))
    how = error.strip().rsplit(": python -m fmnist ", 1)[1]
    assert how == (f"report {folder}" if when == "at the page" else f"train --resume {folder}")
    assert main(how.split()) == 0
    assert (folder / "report.html").exists() and (folder / "curves.png").exists()


def test_device_and_data_may_be_said_again_but_must_be_the_same(
    cut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that began on the CPU, on a machine that has got a GPU, and whose data have been moved."""
    monkeypatch.setattr(device, "choose", lambda name: (torch.device("cpu" if name == "cpu" else "meta"), name))
    for options, message in (
        ("", "was begun with device_used cpu, and would go on with meta: give another --device"),
        ("--device cpu --data /nonexistent", "/nonexistent does not exist"),
    ):
        capsys.readouterr()
        assert main(["train", "--resume", str(cut), *options.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["train", "--resume", str(cut), "--device", "cpu", "--data", "sample"]) == 0


def test_what_cannot_be_resumed_is_one_line(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(name: str, file: str, content: bytes | None) -> Path:
        folder = shutil.copytree(cut, tmp_path / name)
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        return folder

    whole = (cut / state.FILE).read_bytes()
    settings = (cut / "config.json").read_bytes()
    other_data = (cut / "metrics.jsonl").read_bytes().replace(b'"n_train": 2000', b'"n_train": 60000')
    foreign = (cut / checkpoint.FILE).read_bytes()
    for folder, message in (
        (tmp_path / "nowhere", "nothing to resume: "),
        (tmp_path, "is not the folder of a run"),
        (damaged("a", state.FILE, None), "was interrupted before its run began; delete it"),
        (damaged("b", state.FILE, whole[:-9]), "resume.safetensors is not a checkpoint, or not a whole one"),
        (damaged("c", state.FILE, foreign), "is not the state of a run"),
        (damaged("d", "metrics.jsonl", b"?\n"), "holds no records of a run"),
        (damaged("e", "metrics.jsonl", other_data), "was begun with n_train 60000, and would go on with 2000"),
        (damaged("f", "config.json", b'{"depth": 3}'), "holds no settings of this version"),
        (
            damaged("g", "config.json", settings.replace(b"softmax", b"mlp")),
            "not the state of a run of the model 'mlp'",
        ),
    ):
        capsys.readouterr()
        assert main(["train", "--resume", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fmnist: ") and message in error and error.count("\n") == 1
    assert main(["train", "--resume", str(cut)]) == 0
    assert main(["train", "--resume", str(cut)]) == 2
    assert "is finished, with 4 epochs" in capsys.readouterr().err


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    """The signal itself, to a run that would take all day."""
    command = [sys.executable, "-m", "fmnist", "train", "--data", "sample", "--runs", str(tmp_path), "--name", "run"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": "kernels:.", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "--epochs", "1000000"],
        cwd=ROOT,
        env=env,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        try:
            assert process.stdout is not None
            while not process.stdout.readline().startswith("epoch   2"):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert error.splitlines()[-1].endswith(f"python -m fmnist train --resume {tmp_path / 'run'}")
    assert "Traceback" not in out + error
    tensors, metadata = files.read_tensors(tmp_path / "run" / state.FILE)
    assert int(metadata["epoch"]) >= 1 and "shuffle" in tensors
    assert checkpoint.load(tmp_path / "run" / checkpoint.FILE)[0] == "softmax"

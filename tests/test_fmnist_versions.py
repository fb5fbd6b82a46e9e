"""What a record says of the versions: what is installed, and the commit of this checkout and of no other."""

import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fmnist.versions
import softxent
from fmnist.versions import commit, versions
from fmnist_runs import run, without_pictures


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    result = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_a_run_records_what_it_ran_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    monkeypatch.setattr(fmnist.versions, "commit", lambda: "c0ffee")
    start = run(tmp_path, epochs=1)[0]
    assert start["torch"] == torch.__version__ and start["softxent"] == softxent.__version__
    assert start["numpy"] == metadata.version("numpy") and start["matplotlib"] == metadata.version("matplotlib")
    assert start["python"].count(".") == 2 and start["commit"] == "c0ffee"
    assert ("triton" in start) == (find_spec("triton") is not None)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(name in page for name in ("c0ffee", metadata.version("numpy"), metadata.version("matplotlib")))


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmnist.versions, "LIBRARIES", ("no-such-library",))
    monkeypatch.setattr(fmnist.versions, "commit", lambda: None)
    assert versions().keys() == {"python", "torch", "softxent"}


def test_the_commit_is_that_of_the_checkout_and_says_if_files_differ_from_it(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "copy").mkdir(parents=True)
    git(root, "init", "-q")
    assert commit(root) is None, "before the first commit"
    (root / "a").write_text("1")
    git(root, "add", "a")
    git(root, "commit", "-q", "-m", "first")
    git(root, "tag", "-a", "v1", "-m", "a tag, which is no commit")
    head = git(root, "rev-parse", "HEAD")
    assert commit(root) == head
    (root / "a").write_text("2")
    assert commit(root) == head + "-dirty"
    assert commit(root / "copy") is None, "another's checkout"
    assert commit(tmp_path) is None


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None

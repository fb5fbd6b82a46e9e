"""Fashion-MNIST's four files from the net: a mirror of the upstream archives, or Debian's package of them.

A file appears under its name only when it is whole and its checksum is right: everything is written to a temporary name
beside it first and then renamed.
"""

import http.client
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from . import progress
from .errors import UserError
from .files import whole

MIRRORS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
CONNECT_SECONDS = 5
FILE_SECONDS = 300  # for the whole of a file, of which the largest has 26 MB: a server that drips is left
MINE = f"{os.getpid()}."  # what this process has not yet downloaded whole
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_DIR = Path("usr/share/datasets/fashion-mnist")

Verify = Callable[[Path], None]  # raises UserError for a file that is not what its name promises


def from_mirrors(names: list[str], folder: Path, verify: Verify, mirrors: tuple[str, ...] = MIRRORS) -> str:
    """Download the named files into `folder` from the first mirror that serves all of them; return the mirror.

    Each mirror is tried once. Raises UserError with every mirror's reason if none serves.
    """
    reasons = []
    for mirror in mirrors:
        try:
            for name in names:
                if not (folder / name).exists():
                    _download(mirror + name, folder / name, verify)
            return mirror
        except (OSError, http.client.HTTPException, UserError) as error:  # URLError and time-outs are OSErrors
            reasons.append(f"{mirror}: {error}")
    raise UserError("; ".join(reasons))


def _download(url: str, path: Path, verify: Verify) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
        size = response.headers.get("Content-Length", "")
        total = int(size) if size.isdecimal() else None  # for the bar only: the checksum says whether it is whole
        until = time.monotonic() + FILE_SECONDS
        bar = progress.bar(desc=path.name, total=total, unit="B", unit_scale=True)
        with closing(bar), whole(path, MINE) as temporary, open(temporary, "wb") as file:
            while block := response.read1(1 << 16):  # what has come: `read` would wait for all 64 KiB
                file.write(block)
                bar.update(len(block))
                if time.monotonic() > until:
                    raise UserError(f"{path.name} was not there after {FILE_SECONDS} seconds")
            file.flush()
            verify(temporary)


def from_debian(names: list[str], folder: Path, verify: Verify) -> str:
    """The named files out of Debian's package, into `folder`; returns where from.

    Works on Debian and Ubuntu behind a package mirror, as any user: apt's lists, cache and state are kept in a
    temporary folder, and nothing is installed. Raises UserError where there is no apt, or it has no such package.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError("no apt-get here")
    with tempfile.TemporaryDirectory(prefix="softxent-apt-") as temporary:
        work = Path(temporary)
        for part in ("state/lists/partial", "cache/archives/partial"):
            (work / part).mkdir(parents=True)
        options = [
            f"-oDir::State={work}/state",
            f"-oDir::State::Lists={work}/state/lists",
            "-oDir::State::status=/var/lib/dpkg/status",
            f"-oDir::Cache={work}/cache",
            "-oAPT::Sandbox::User=root",
            f"-oAcquire::http::Timeout={CONNECT_SECONDS}",
            f"-oAcquire::https::Timeout={CONNECT_SECONDS}",
            "-oAcquire::Retries=0",
        ]
        _run(["apt-get", "-qq", *options, "update"], work)
        _run(["apt-get", "-qq", *options, "download", DEBIAN_PACKAGE], work)
        packages = list(work.glob("*.deb"))
        if not packages:
            raise UserError(f"apt-get downloaded no {DEBIAN_PACKAGE}")
        _run(["dpkg-deb", "-x", str(packages[0]), str(work / "unpacked")], work)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            with whole(folder / name, MINE) as path:
                shutil.copyfile(work / "unpacked" / DEBIAN_DIR / name, path)
                verify(path)
    return f"Debian's package {packages[0].name}"


def _run(command: list[str], cwd: Path) -> None:
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} {command[-1]}: no end after {error.timeout:.0f} seconds") from error
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
        raise UserError(f"{command[0]} {command[-1]}: {lines[-1]}")

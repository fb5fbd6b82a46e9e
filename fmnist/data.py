"""Fashion-MNIST in memory: 60,000 training and 10,000 test images, 28 x 28 grey levels, ten classes.

Looked for in this order:

    1. `--data DIR` or $FMNIST_DATA                 must hold the four files, as .gz or not
    2. $XDG_CACHE_HOME/softxent/fashion-mnist       what 4 and 5 left there
    3. /usr/share/datasets/fashion-mnist            Debian's package dataset-fashion-mnist
    4. three mirrors of the upstream archives
    5. Debian's package, downloaded and unpacked without installing it
    6. the sample that comes with this package: real images, but few

The checksums are of the decompressed bytes: Debian's archives were compressed again and hold the same data.

Xiao, Rasul and Vollgraf (2017), "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms",
arXiv:1708.07747. MIT licence.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import fetch, idx
from .errors import UserError

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# SHA-256 of the decompressed IDX files.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SAMPLE_SHA256 = {
    "train-images-idx3-ubyte": "71a9f8cec24060d6752b3e4940ce6d6fd729334afa47b735dd553481aa83b53e",
    "train-labels-idx1-ubyte": "8983259dfbc9f185f92698916f7daf361704b43ba7d19568cc7bcdeefdc1bece",
    "t10k-images-idx3-ubyte": "c9bd0ed7148856eb2287d902861921296d6c36d95a5113341a35554343e84123",
    "t10k-labels-idx1-ubyte": "9f5f7b9143df7bffff73a8bf7d8a53545dbf787f86e5e195c64401d2c6f8f372",
}

SAMPLE_DIR = Path(__file__).parent / "sample"
DEBIAN_DIR = Path("/") / fetch.DEBIAN_DIR
HOW_TO_SUPPLY = """Three ways to supply it:
  1. On Debian or Ubuntu: apt-get install dataset-fashion-mnist
  2. Download the four .gz files from https://github.com/zalandoresearch/fashion-mnist into a folder DIR,
     and give --data DIR or set FMNIST_DATA=DIR
  3. Run once with access to the net or to a Debian package mirror: what is found is kept in {cache}"""


class FashionMNIST(NamedTuple):
    train_images: np.ndarray  # [n, 28, 28] uint8
    train_labels: np.ndarray  # [n] uint8
    test_images: np.ndarray  # [n, 28, 28] uint8
    test_labels: np.ndarray  # [n] uint8
    source: str  # where it was found, in words
    complete: bool  # False: the sample


def load(
    directory: str | None = None, require_full: bool = False, log: Callable[[str], None] | None = None
) -> FashionMNIST:
    """The dataset, from `directory` if given ("sample" for the sample), else from wherever it can be had.

    Raises UserError if `directory` does not hold it whole, or if only the sample is left and `require_full` is set.
    """
    log = log or (lambda line: print(line, file=sys.stderr))
    directory = directory or os.environ.get("FMNIST_DATA")
    if directory == "sample":
        if require_full:
            raise UserError("--data sample with --require-full-data: " + HOW_TO_SUPPLY.format(cache=cache_dir()))
        return _sample()
    if directory:
        return _read(_folder_with_files(Path(os.path.expanduser(directory))), directory, SHA256)

    cache = cache_dir()
    if _has_files(cache):
        try:
            return _read(cache, str(cache), SHA256)
        except UserError as error:
            log(f"data: the cached copy is not usable, fetching it again ({error})")
            try:
                _remove_files(cache)
            except OSError as trouble:
                raise UserError(f"cannot replace the cached copy in {cache}: {trouble.strerror}") from trouble
    if _has_files(DEBIAN_DIR):
        return _read(DEBIAN_DIR, str(DEBIAN_DIR), SHA256)

    if not _can_keep(cache, log):
        return _without_the_rest(cache, require_full)
    archives = [f"{name}.gz" for name in SHA256]
    for fetch_from in (fetch.from_mirrors, fetch.from_debian):
        try:
            log(f"data: not on this machine; trying {_WHERE[fetch_from.__name__]}")
            source = fetch_from(archives, cache, _verify_archive)
            return _read(cache, f"{cache}, from {source}", SHA256)
        except (UserError, OSError) as error:
            log(f"data: {error}")

    return _without_the_rest(cache, require_full)


def _can_keep(cache: Path, log: Callable[[str], None]) -> bool:
    """Whether what is fetched can be written to the cache; if not, say what does it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as file:
            file.write(bytes(1 << 12))
    except OSError as error:
        log(
            f"data: not fetched, as it cannot be kept in {cache}: {error.strerror}. "
            "Set XDG_CACHE_HOME to a folder that can be written, or give --data DIR with the files in it"
        )
        return False
    return True


def _without_the_rest(cache: Path, require_full: bool) -> FashionMNIST:
    if require_full:
        raise UserError("Fashion-MNIST is not to be had here.\n" + HOW_TO_SUPPLY.format(cache=cache))
    return _sample()


def _sample() -> FashionMNIST:
    return _read(SAMPLE_DIR, "the embedded sample", SAMPLE_SHA256, complete=False)


_WHERE = {"from_mirrors": "the mirrors of the upstream archives", "from_debian": "Debian's package"}


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/softxent/fashion-mnist, and ~/.cache where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "softxent" / "fashion-mnist"


def _folder_with_files(directory: Path) -> Path:
    """`directory`, or the folder below it where torchvision keeps the files: its root, or its FashionMNIST."""
    if not directory.is_dir():
        raise UserError(f"the data directory {directory} {'is not one' if directory.exists() else 'does not exist'}")
    for folder in (directory, directory / "raw", directory / "FashionMNIST" / "raw"):
        if _has_files(folder):
            return folder
    missing = ", ".join(f"{name}[.gz]" for name in SHA256 if _find(directory, name) is None)
    raise UserError(f"the data directory {directory} lacks {missing}.\n{HOW_TO_SUPPLY.format(cache=cache_dir())}")


def _has_files(folder: Path) -> bool:
    return all(_find(folder, name) is not None for name in SHA256)


def _remove_files(folder: Path) -> None:
    for name in SHA256:
        for suffix in ("", ".gz"):
            (folder / (name + suffix)).unlink(missing_ok=True)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _verify_archive(path: Path) -> None:
    """Raise UserError unless the archive, named like one of ours with a prefix perhaps, holds what it should."""
    name = next(name for name in SHA256 if name in path.name)
    _verified_bytes(path, SHA256[name])


def _verified_bytes(path: Path, sha256: str) -> bytes:
    data = idx.read_bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(
            f"{path} is not the file it should be: SHA-256 of its decompressed bytes is {found}, expected {sha256}. "
            "Delete it, or replace it by an upstream copy"
        )
    return data


def _read(folder: Path, source: str, sums: dict[str, str], complete: bool = True) -> FashionMNIST:
    arrays: list[np.ndarray] = []
    for name, sha256 in sums.items():
        path = _find(folder, name)
        if path is None:
            raise UserError(f"{folder} lacks {name}[.gz]")
        arrays.append(idx.parse(_verified_bytes(path, sha256), str(path)))
    return FashionMNIST(arrays[0], arrays[1], arrays[2], arrays[3], source, complete)

"""Where the dataset is looked for, what is accepted, and what is said when it is not there.

A small dataset with checksums of its own stands for the full one, and a server on this machine for the mirrors.
"""

import gzip
import hashlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fmnist import data, fetch, files, idx
from fmnist.errors import UserError

SHAPES = {
    "train-images-idx3-ubyte": (30, 28, 28),
    "train-labels-idx1-ubyte": (30,),
    "t10k-images-idx3-ubyte": (10, 28, 28),
    "t10k-labels-idx1-ubyte": (10,),
}
RANDOM = np.random.default_rng(0)
FILES = {name: idx.write_bytes(RANDOM.integers(0, 10, shape, dtype=np.uint8)) for name, shape in SHAPES.items()}
NAMES = [f"{name}.gz" for name in FILES]


@pytest.fixture(autouse=True)
def nothing_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()})
    monkeypatch.setattr(data, "DEBIAN_DIR", tmp_path / "usr-share")
    monkeypatch.setattr(fetch, "from_mirrors", _nowhere("from_mirrors"))
    monkeypatch.setattr(fetch, "from_debian", _nowhere("from_debian"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FMNIST_DATA", raising=False)


def _nowhere(name: str) -> Callable[..., str]:
    def fetch_nothing(*_: object) -> str:
        raise UserError("no route to host")

    fetch_nothing.__name__ = name
    return fetch_nothing


def fill(folder: Path, compressed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("compressed", [True, False])
def test_a_given_directory_is_read_compressed_or_not(tmp_path: Path, compressed: bool) -> None:
    dataset = data.load(str(fill(tmp_path / "given", compressed)))
    assert dataset.complete and dataset.source == str(tmp_path / "given")
    np.testing.assert_array_equal(dataset.train_images, idx.parse(FILES["train-images-idx3-ubyte"], ""))
    np.testing.assert_array_equal(dataset.test_labels, idx.parse(FILES["t10k-labels-idx1-ubyte"], ""))


def test_torchvisions_folder_is_found(tmp_path: Path) -> None:
    fill(tmp_path / "FashionMNIST" / "raw", compressed=False)
    assert data.load(str(tmp_path)).complete


def test_torchvisions_folder_is_found_when_it_is_named_itself(tmp_path: Path) -> None:
    fill(tmp_path / "FashionMNIST" / "raw", compressed=False)
    assert data.load(str(tmp_path / "FashionMNIST")).complete


@pytest.mark.parametrize("by", ["variable", "option"])
def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """A shell leaves it alone in quotes, and in FMNIST_DATA=~/x of a .env file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "x")
    if by == "variable":
        monkeypatch.setenv("FMNIST_DATA", "~/x")
    assert data.load("~/x" if by == "option" else None).complete


def test_the_order_of_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(data.DEBIAN_DIR)
    assert data.load().source == str(data.DEBIAN_DIR)
    fill(data.cache_dir())
    assert data.load().source == str(data.cache_dir())
    monkeypatch.setenv("FMNIST_DATA", str(fill(tmp_path / "variable")))
    assert data.load().source == str(tmp_path / "variable")
    assert data.load(str(fill(tmp_path / "option"))).source == str(tmp_path / "option")


def test_a_missing_directory_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data directory .*absent does not exist"):
        data.load(str(tmp_path / "absent"))
    fill(tmp_path / "some")
    (tmp_path / "some" / NAMES[2]).unlink()
    with pytest.raises(UserError, match=r"lacks t10k-images-idx3-ubyte\[\.gz\](.|\n)*Three ways to supply"):
        data.load(str(tmp_path / "some"))


def test_a_wrong_checksum_names_the_file_both_sums_and_what_to_do(tmp_path: Path) -> None:
    folder = fill(tmp_path / "given", compressed=False)
    changed = bytearray(FILES["train-images-idx3-ubyte"])
    changed[-1] ^= 1
    (folder / "train-images-idx3-ubyte").write_bytes(changed)
    with pytest.raises(UserError) as error:
        data.load(str(folder))
    message = str(error.value)
    assert str(folder / "train-images-idx3-ubyte") in message and "Delete it, or replace it" in message
    assert hashlib.sha256(changed).hexdigest() in message and data.SHA256["train-images-idx3-ubyte"] in message


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "given")
    path = folder / NAMES[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{NAMES[0]} is truncated or corrupt"):
        data.load(str(folder))


def test_the_sample_is_the_last_resort_and_can_be_refused(tmp_path: Path) -> None:
    lines: list[str] = []
    dataset = data.load(log=lines.append)
    assert not dataset.complete and dataset.source == "the embedded sample"
    assert dataset.train_images.shape == (2000, 28, 28) and dataset.test_images.shape == (500, 28, 28)
    assert all(np.bincount(dataset.train_labels) > 150)
    assert sum("no route to host" in line for line in lines) == 2
    with pytest.raises(UserError) as error:
        data.load(require_full=True, log=lines.append)
    assert all(way in str(error.value) for way in ("apt-get install", "--data DIR", str(data.cache_dir())))
    assert not data.load("sample").complete
    with pytest.raises(UserError, match="Three ways"):
        data.load("sample", require_full=True)


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """A server on this machine: its folder truncated/ ends early, other/ has another file, missing/ has none, number/
    says a length that is no number, and drips/ sends a byte now and then."""
    archives = {name: gzip.compress(content) for name, content in zip(NAMES, FILES.values(), strict=True)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            folder, _, name = self.path[1:].rpartition("/")
            if name not in archives or folder == "missing":
                self.send_error(404)
                return
            content = gzip.compress(b"something else") if folder == "other" else archives[name]
            self.send_response(200)
            self.send_header("Content-Length", "many" if folder == "number" else str(len(content)))
            self.end_headers()
            if folder == "drips":
                try:
                    for i in range(200):
                        self.wfile.write(content[i : i + 1])
                        time.sleep(0.1)
                except OSError:  # nobody listens any more
                    return
            self.wfile.write(content[:-50] if folder == "truncated" and "images" in name else content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def real_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


def test_each_mirror_is_tried_until_one_serves_everything(
    real_fetch: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mirror: str
) -> None:
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    monkeypatch.setattr(data, "SHA256", sums)
    mirrors = (f"{mirror}missing/", f"{mirror}truncated/", f"{mirror}other/", "http://127.0.0.1:1/", f"{mirror}good/")
    source = fetch.from_mirrors(NAMES, tmp_path / "to", data._verify_archive, mirrors)
    assert source == f"{mirror}good/"
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == sorted(NAMES)
    assert data.load(str(tmp_path / "to")).complete


def test_mirrors_that_fail_leave_nothing_behind_and_give_their_reasons(
    real_fetch: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mirror: str
) -> None:
    monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()})
    with pytest.raises(UserError, match=r"404(.|\n)*truncated or corrupt(.|\n)*SHA-256"):
        mirrors = (f"{mirror}missing/", f"{mirror}truncated/", f"{mirror}other/")
        fetch.from_mirrors(NAMES[:1], tmp_path / "to", data._verify_archive, mirrors)
    assert list((tmp_path / "to").iterdir()) == []


def test_a_length_that_is_no_number_is_left_unread(
    real_fetch: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mirror: str
) -> None:
    monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()})
    assert fetch.from_mirrors(NAMES, tmp_path / "to", data._verify_archive, (f"{mirror}number/",))
    assert data.load(str(tmp_path / "to")).complete


def test_a_server_that_drips_is_left_after_the_time_for_a_file(
    real_fetch: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mirror: str
) -> None:
    """Each byte comes within the time for an answer, and the last of them after 20 seconds."""
    monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()})
    monkeypatch.setattr(fetch, "FILE_SECONDS", 0.5, raising=False)
    began = time.monotonic()
    mirrors = (f"{mirror}drips/", f"{mirror}good/")
    assert fetch.from_mirrors(NAMES, tmp_path / "to", data._verify_archive, mirrors) == f"{mirror}good/"
    assert time.monotonic() - began < 10
    with pytest.raises(UserError, match=r"drips/: train-images-idx3-ubyte\.gz was not there after 0\.5 seconds"):
        fetch.from_mirrors(NAMES[:1], tmp_path / "again", data._verify_archive, mirrors[:1])


def test_a_cache_that_cannot_be_written_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    lines: list[str] = []
    assert not data.load(log=lines.append).complete
    (line,) = lines
    assert f"cannot be kept in {tmp_path / 'file' / 'softxent'}" in line
    assert "XDG_CACHE_HOME" in line and "--data DIR" in line
    with pytest.raises(UserError, match="Three ways"):
        data.load(require_full=True, log=lines.append)


def test_an_interrupted_download_is_never_read_as_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    with pytest.raises(KeyboardInterrupt), files.whole(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_cached_copy_gone_bad_is_fetched_again(monkeypatch: pytest.MonkeyPatch, mirror: str) -> None:
    fill(data.cache_dir())
    (data.cache_dir() / NAMES[0]).write_bytes(b"bad")
    real = vars(fetch)["_download"]

    def from_mirrors(names: list[str], folder: Path, verify: fetch.Verify) -> str:
        for name in names:
            real(f"{mirror}good/{name}", folder / name, verify)
        return "the mirror"

    monkeypatch.setattr(fetch, "from_mirrors", from_mirrors)
    lines: list[str] = []
    dataset = data.load(log=lines.append)
    assert dataset.complete and dataset.source.endswith("from the mirror")
    assert "not usable, fetching it again" in lines[0]


def test_debians_package_is_unpacked_without_being_installed(
    real_fetch: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With stand-ins for apt-get and dpkg-deb, which insist that lists and package stay out of the system."""
    monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()})
    package = fill(tmp_path / "package" / fetch.DEBIAN_DIR)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(
        '#!/bin/sh\nfor last; do :; done\ncase "$*" in *Dir::State=/*Dir::Cache=/*) ;; *) exit 9;; esac\n'
        '[ "$last" = update ] || touch dataset-fashion-mnist_1_all.deb\n'
    )
    (tools / "dpkg-deb").write_text(f'#!/bin/sh\nmkdir -p "$3" && cp -r "{tmp_path}/package/usr" "$3/"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    source = fetch.from_debian(NAMES, tmp_path / "to", data._verify_archive)
    assert source == "Debian's package dataset-fashion-mnist_1_all.deb"
    assert data.load(str(tmp_path / "to")).complete

    (package / NAMES[1]).write_bytes(b"bad")
    with pytest.raises(UserError, match=f"{NAMES[1]} is truncated or corrupt"):
        fetch.from_debian(NAMES, tmp_path / "again", data._verify_archive)
    (tools / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2; exit 100\n")
    with pytest.raises(UserError, match=r"apt-get update: E: Unable to locate package"):
        fetch.from_debian(NAMES, tmp_path / "again", data._verify_archive)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no apt-get here"):
        fetch.from_debian(NAMES, tmp_path / "again", data._verify_archive)

"""The IDX reader: what it reads, and what it says of files that are something else."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from fmnist import idx
from fmnist.errors import UserError


@pytest.mark.parametrize("shape", [(5,), (0,), (3, 28, 28), (2, 3, 4, 5)])
def test_reads_what_it_writes(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(idx.parse(idx.write_bytes(array), "test"), array)


def test_the_layout_is_that_of_the_format() -> None:
    data = bytes.fromhex("00000803 00000001 00000002 00000003") + bytes(range(6))
    np.testing.assert_array_equal(idx.parse(data, "test"), [[[0, 1, 2], [3, 4, 5]]])


GOOD = idx.write_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x1f\x8b" + GOOD[2:], "not an IDX file of uint8: it begins with 1f 8b"),
        (b"\0\0\x0d" + GOOD[3:], "not an IDX file of uint8"),
        (GOOD[:7], "truncated or too long: 7 bytes"),
        (GOOD[:-1], r"truncated or too long: 23 bytes, and its header \(3, 4\) asks for 24"),
        (GOOD + b"x", "truncated or too long: 25 bytes"),
    ],
)
def test_bad_bytes_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"some-file is {message}"):
        idx.parse(data, "some-file")


def test_a_truncated_or_corrupt_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(GOOD * 100)
    path = tmp_path / "data.gz"
    for data in (whole[:-20], whole[:40] + b"\xff" * 20 + whole[60:], b"no archive at all"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"data\.gz is truncated or corrupt"):
            idx.read_bytes(path)
    path.write_bytes(whole)
    assert idx.read_bytes(path) == GOOD * 100

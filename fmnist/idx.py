"""The IDX format of the MNIST family: magic 00 00 TT DD, then DD big-endian uint32 sizes, then the values, row-major.

TT is the type, 08 for uint8, the only one used here; DD the number of dimensions.
Source: http://yann.lecun.com/exdb/mnist, "the IDX file format".
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from .errors import UserError

UINT8 = 0x08


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in .gz. UserError if it is not whole."""
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is truncated or corrupt ({error}): delete it, or replace it by a whole copy"
        ) from error


def parse(data: bytes, name: str) -> np.ndarray:
    """IDX bytes as a uint8 array of 1 to 4 dimensions. `name` is for the UserError if they are something else."""
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != UINT8 or not 1 <= data[3] <= 4:
        raise UserError(f"{name} is not an IDX file of uint8: it begins with {data[:4].hex(' ')}, not 00 00 08 ..")
    n_dims = data[3]
    sizes = np.frombuffer(data, ">u4", n_dims, offset=4) if len(data) >= 4 + 4 * n_dims else np.zeros(n_dims, ">u4")
    shape = tuple(int(size) for size in sizes)
    expected = 4 + 4 * n_dims + math.prod(shape)
    if len(data) != expected:
        raise UserError(
            f"{name} is truncated or too long: {len(data)} bytes, and its header {shape} asks for {expected}"
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * n_dims).reshape(shape)


def write_bytes(array: np.ndarray) -> bytes:
    """A uint8 array as IDX bytes: the inverse of `parse`."""
    assert array.dtype == np.uint8
    return bytes([0, 0, UINT8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()

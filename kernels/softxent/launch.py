"""Launch choices: how many rows and columns a program takes, and its warps. Pure functions of the shape and the dtype.

A choice never depends on the number of rows or on a timing, so that a row's reduction tree, and with it every bit of
its loss, is the same in any batch and in any run.
"""

from typing import NamedTuple

# Values in a tile, by the largest n_cols and by the bytes of the dtype they are computed in. Twice as many spill where
# rows of an odd length need a mask and an address a value.
VALUES = ((512, {4: 1024, 8: 256}), (1 << 62, {4: 4096, 8: 512}))


# Multiply and add in one rounding, said aloud: Triton 3.10 stops doing so by itself, and 3.9 warns of it.
OPTIONS = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    block_m: int  # rows
    block_n: int  # columns, a power of two
    num_warps: int


def power_of_two_from(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile(n_cols: int, acc_bytes: int, n_matrices: int = 1) -> Tile:
    """The tile for rows of n_cols values of so many matrices, each value computed in acc_bytes (4 or 8).

    Wide rows go one at a time, few classes many rows at a time, but no more than 64: more buys nothing, and a small
    batch should still spread over the device.
    """
    values = next(values[acc_bytes] for limit, values in VALUES if n_cols <= limit) // n_matrices
    block_n = min(power_of_two_from(n_cols), values)
    block_m = min(64, values // block_n) if n_cols <= VALUES[0][0] else 1
    return Tile(block_m, block_n, num_warps=4 if block_m * block_n <= 2048 else 8)

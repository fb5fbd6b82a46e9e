"""Launch choices: how many rows and columns a program takes, and its warps. Pure functions of the shape and the dtype.

A choice never depends on the number of rows or on a timing, so that a row's reduction tree, and with it every bit of
its loss, is the same in any batch and in any run.
"""

from typing import NamedTuple

TILE = 4096  # float32 values in one tile: 16 a thread at 8 warps. Of float64 an eighth, or odd row lengths spill


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


def tile(n_cols: int, acc_bytes: int) -> Tile:
    """The tile for rows of n_cols values, each held in acc_bytes (4 or 8).

    Wide rows go one at a time, few classes many rows at a time, but no more than 64: more buys nothing, and a small
    batch should still spread over the device.
    """
    values = TILE if acc_bytes == 4 else TILE // 8
    block_n = min(power_of_two_from(n_cols), values)
    block_m = min(64, values // block_n)
    return Tile(block_m, block_n, num_warps=4 if block_m * block_n <= 2048 else 8)

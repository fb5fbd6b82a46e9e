"""Launch choices: which kernel takes rows of a width, and with what tile. Pure functions of how the rows lie.

A choice never depends on a timing, nor on the number of rows, but for SMALL, which computes a row as its alternative
does: every bit of a row's loss and gradient is the same in any batch of that layout, and in any run.

    n_cols <= NARROW    narrow_rows    some rows a program, a row in one thread or in some
    beyond              wide_row       a program a row
"""

from typing import NamedTuple

NARROW = 1024
MOST = 2**31 - 2**16  # columns: the kernels count them in 32 bits
SMALL = 512, 32  # rows and columns of a batch that one program takes from the targets to the mean

# Of wide rows, by their bytes: warps of 32 threads, granules that a thread loads at a time, and how many times as many
# stay in registers; of 16 bits, and of more. As measured on an H100 (bench/results/nvidia-h100).
WIDE = (
    (4 << 10, (2, 2, 0), (2, 2, 0)),
    (8 << 10, (4, 1, 0), (4, 1, 0)),
    (16 << 10, (8, 1, 0), (8, 1, 0)),
    (32 << 10, (8, 2, 1), (8, 2, 1)),
    (64 << 10, (16, 2, 0), (16, 2, 2)),
    (128 << 10, (16, 2, 1), (16, 2, 2)),
)
WIDEST = (32, 2, 2)

SUM, SUM_WARPS = 4096, 8  # targets, or losses, at a time
MANY = 128  # programs that sum them together
SCALE = 4096  # values at a time
SCALERS = 1024  # programs that scale them: few, since there is mostly nothing to do

# Multiply and add in one rounding, said aloud: Triton 3.10 stops doing so by itself, and 3.9 warns of it.
OPTIONS = {"enable_fp_fusion": True}


class Access(NamedTuple):
    granule: int  # values in 16 bytes, where they lie side by side; 1: value by value
    odd: bool  # whether rows start and end within a granule


class Narrow(NamedTuple):
    """A tile of narrow rows."""

    N_COLS: int
    ROWS: int
    SPAN: int  # columns of each
    WIDTH: int  # values in one access to logits
    GIVEN: int  # to probabilities
    OUT: int  # to gradients


class Wide(NamedTuple):
    """Chunks of a wide row."""

    THREADS: int
    UNROLL: int  # granules of a thread in a chunk
    HELD: int  # chunks that stay in registers
    GRANULE: int  # values in 16 bytes of logits; 1 if they do not lie side by side
    GIVEN: int  # GRANULE, if the probabilities lie in granules as the logits do, or 1
    ODD: bool  # whether rows start and end within a granule


def power_of_two_from(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


Layout = tuple[int, int, int, int, int]  # n_cols, stride_row, stride_col, itemsize, address


def access(n_cols: int, stride_row: int, stride_col: int, itemsize: int, address: int) -> Access:
    """How rows lie in 16-byte granules."""
    if stride_col != 1:
        return Access(1, False)
    granule = 16 // itemsize
    return Access(granule, bool(n_cols % granule or stride_row % granule or address % 16))


def lines_up(given: Layout, other: Layout, granule: int) -> bool:
    """Whether given rows lie in granules, of so many values, as rows of another matrix do."""
    _, stride_row, stride_col, itemsize, address = given
    _, other_stride_row, _, other_itemsize, other_address = other
    apart = address // itemsize - other_address // other_itemsize
    return stride_col == 1 and (stride_row - other_stride_row) % granule == 0 and apart % granule == 0


def vector(n_cols: int, stride_row: int, stride_col: int, itemsize: int, address: int) -> int:
    """Values in one access to narrow rows: the most, up to 16 bytes, at which every row's accesses align."""
    width = 16 // itemsize
    while width > 1 and (stride_col != 1 or n_cols % width or stride_row % width or address % (width * itemsize)):
        width //= 2
    return width


def narrow(n_cols: int, itemsize: int, width: int, plain: bool, warp_size: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps. width: values in one access. plain: nothing is summed but exponentials.

    A row goes to as few threads as can hold it; value by value, to so many that neighbours access a sector together.
    Rows of one thread are stored in pieces, which the cache puts together while there are few.
    """
    if not plain:
        values = 16 // itemsize
    elif width > 1:
        values = 64 // itemsize
    else:
        values = 4 if itemsize == 8 else 16
    threads = min(32 if plain and itemsize < 8 else 256, power_of_two_from(cdiv(n_cols, values)))
    lanes = 64 if itemsize == 2 or warp_size == 64 else 32
    lanes = max(lanes, threads)
    return lanes // threads, threads * width, lanes // warp_size


def wide(row_bytes: int, itemsize: int, odd: bool, soft: bool, plain: bool, step: bool) -> tuple[int, int, int]:
    """Threads, granules of each at a time, and how many times as many stay in registers.

    row_bytes: of logits and probabilities. odd: rows start within a granule. soft: there are probabilities. plain:
    nothing is summed but exponentials. step: a gradient is written after a first pass.
    """
    shapes = next((shapes for most, *shapes in WIDE if row_bytes <= most), (WIDEST, WIDEST))
    warps, unroll, held = shapes[itemsize > 2]
    if not step:
        warps, unroll, held = min(warps, 8), 2, 0
    if odd and itemsize == 2 and warps == 16 and held:  # as many registers as two programs have
        unroll, held = 1, unroll * held
    if soft:
        unroll, held = 1, min(held, 1)
    if itemsize == 8 or not plain:
        warps, unroll, held = min(warps, 8), 1, 0
    return 32 * warps, unroll, held


def softmax_backward(n_cols: int, warp_size: int) -> dict[str, int]:
    """Of two matrices, 4096 values of each at a time."""
    block_n = min(4096, power_of_two_from(n_cols))
    block_m = 4096 // block_n if n_cols <= NARROW else 1
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 256 // warp_size}


def summing(n: int) -> int:
    """Programs that share a sum of so many; each leaves a part."""
    return 1 if n <= 4 * SUM else MANY

"""Launch choices: which kernel takes rows of a width, and with what tile. Pure functions of how the rows lie.

A choice never depends on a timing, nor on the number of rows, but for ONE_LAUNCH, which computes a row as its
alternative does: every bit of a row's loss and gradient is the same in any batch of that layout, and in any run.

    n_cols <= 32                few_classes   a thread holds a row
    to the widest of WHOLE      whole_row     a program holds a row, or some
    to the widest of PACKED     packed_row    a program holds a row as it was loaded
    beyond                      streaming     the row is read again for the gradient
"""

from typing import NamedTuple

FEW = 32
ROWS = 128  # of few classes, in a program

# For rows that a program holds: columns of the tile, rows, and warps of 32 threads, by the bytes of the dtype that
# they are computed in. Each is the widest tile that a row fits into, and compiles without a spill.
WHOLE = {
    4: (
        (64, 32, 4),
        (128, 16, 4),
        (256, 8, 4),
        (512, 1, 1),
        (1024, 1, 1),
        (2048, 1, 2),
        (4096, 1, 4),
        (8192, 1, 8),
        (16384, 1, 16),
        (32768, 1, 16),
    ),
    8: ((64, 8, 4), (128, 4, 4), (256, 1, 1), (512, 1, 2), (1024, 1, 4), (2048, 1, 8), (4096, 1, 16)),
}
# Wider rows, kept as they were loaded, by itemsize: columns; where one thing more is held or summed; where two are.
PACKED = ({2: 81920, 4: 51200}, {2: 65536, 4: 32768}, {2: 32768, 4: 16384})
PACKED_WARPS = 16
# Where the widest tile of WHOLE would spill: rows of which more is held or summed; and odd rows on devices whose
# compiler needs a few registers more.
SPILLS = 16384  # columns that do not

THREADS = 1024  # a program has no more

# Rows that no program holds, held by the programs of a cluster, which reduce through each other's shared memory, by
# itemsize: columns and programs. Triton >= 3.8 compiles it for Hopper and Blackwell. It has never been run: off.
CLUSTERS = False
CLUSTER = {2: ((131072, 4), (262144, 8)), 4: ((65536, 4), (131072, 8), (262144, 8))}

BY_VALUE = 4096  # columns: wider rows that are accessed value by value are streamed

STREAM = {2: (8, 8192), 4: (8, 4096), 8: (8, 2048)}  # by itemsize: warps, columns at a time
NORM = 1024  # targets at a time
MANY = 128  # programs that count targets together
SCALE = 4096  # values at a time
SCALERS = 1024  # programs that scale them: few, since there is mostly nothing to do

ONE_LAUNCH = 512  # rows of few classes that one program takes from the targets to the mean

# Multiply and add in one rounding, said aloud: Triton 3.10 stops doing so by itself, and 3.9 warns of it.
OPTIONS = {"enable_fp_fusion": True}


class Device(NamedTuple):
    warp_size: int  # 32; on AMD's Instinct GPUs 64, on its Radeons 32
    arch: int  # NVIDIA's compute capability times ten; 0 on AMD's GPUs, which do not read the packed kernel's PTX


class Access(NamedTuple):
    granule: int  # values in 16 bytes, where they lie side by side; 1: value by value
    odd: bool  # whether rows start and end within a granule


class Holds(NamedTuple):
    """What a program holds of a row besides its values, or sums besides their exponentials."""

    smoothing: bool = False
    weights: bool = False  # of the classes, which smoothing sums
    softcap: bool = False
    entropy_gradient: bool = False
    stats: bool = False  # entropy or prediction


class Whole(NamedTuple):
    block_m: int  # rows
    block_n: int  # columns: a power of two, or, packed, as many chunks as the row has
    num_warps: int
    access: Access
    packed: bool = False  # whether values stay as they were loaded, those of 16 bits two in a register
    num_ctas: int = 1  # programs of a cluster, which hold a row together


def power_of_two_from(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def access(n_cols: int, stride_row: int, stride_col: int, itemsize: int, address: int) -> Access:
    """How rows lie in 16-byte granules. float64 rows that do not fit into them go value by value."""
    if stride_col != 1:
        return Access(1, False)
    granule = 16 // itemsize
    odd = bool(n_cols % granule or stride_row % granule or address % 16)
    return Access(1, False) if odd and itemsize == 8 else Access(granule, odd)


def whole(
    n_cols: int,
    stride_row: int,
    stride_col: int,
    itemsize: int,
    address: int,
    holds: Holds,
    device: Device,
) -> Whole | None:
    """The tile for rows that fit into a program's registers, or None.

    The sum that label smoothing needs has to be taken in the order of the columns: of odd rows, value by value.
    """
    how = access(n_cols, stride_row, stride_col, itemsize, address)
    if how.odd and holds.smoothing:
        how = Access(1, False)
    if how.granule == 1 and n_cols > BY_VALUE:
        return None
    blackwell, amd = device.arch >= 100, device.arch == 0
    spills = any(holds) or (how.odd and (amd or (blackwell and itemsize == 4)))
    widest = WHOLE[max(4, itemsize)][-1][0]
    if spills:
        widest = SPILLS // 2 if how.odd and any(holds) else SPILLS
    if holds.softcap and itemsize == 2 and not amd:  # wider ones are packed
        widest = min(widest, SPILLS // 2)
    for block_n, block_m, num_warps in WHOLE[max(4, itemsize)]:
        if n_cols <= block_n <= widest:
            ends = how.odd and (holds.stats or holds.entropy_gradient) and num_warps < 16
            if holds.smoothing or holds.softcap or ends:
                # Fewer values a thread. Of odd rows no bit changes, with stats or without.
                times = 4 if ends and blackwell and itemsize == 4 else 2
                fewer = (block_m // 2, num_warps) if block_m > 1 else (1, times * num_warps)
                threads = fewer[1] * device.warp_size
                if threads <= THREADS and fewer[0] * block_n >= threads * how.granule:
                    block_m, num_warps = fewer
            return Whole(block_m, block_n, num_warps, how)
    more = min(max(sum(holds), blackwell), len(PACKED) - 1)
    if how.granule > 1 and not amd and n_cols <= PACKED[more].get(itemsize, 0):
        chunk = PACKED_WARPS * device.warp_size * how.granule
        return Whole(1, cdiv(n_cols, chunk) * chunk, PACKED_WARPS, how, packed=True)
    if CLUSTERS and not spills and itemsize < 8 and device.arch >= 90:
        for block_n, num_ctas in CLUSTER[itemsize]:
            fits = not (how.odd and itemsize == 4) or block_n // num_ctas <= SPILLS
            if n_cols <= block_n and fits:
                return Whole(1, block_n, WHOLE[4][-1][2], how, num_ctas=num_ctas)
    return None


Layout = tuple[int, int, int, int, int]  # n_cols, stride_row, stride_col, itemsize, address


def lines_up(given: Layout, other: Layout, granule: int) -> bool:
    """Whether given rows lie in granules, of so many values, as rows of another matrix do."""
    _, stride_row, stride_col, itemsize, address = given
    _, other_stride_row, _, other_itemsize, other_address = other
    apart = address // itemsize - other_address // other_itemsize
    return stride_col == 1 and (stride_row - other_stride_row) % granule == 0 and apart % granule == 0


def softmax(n_cols: int, stride_col: int, itemsize: int, n_matrices: int, device: Device) -> Whole | None:
    """The tile for rows of 1 matrix, or of 2, that a program holds at once; None: they are streamed.

    The access is that to contiguous rows. Sums of integers, of odd rows, take registers.
    """
    how = access(n_cols, n_cols, 1, itemsize, 0)
    if (how.granule == 1 or stride_col != 1) and n_cols > BY_VALUE:
        return None
    spills = n_matrices == 2 or (how.odd and (device.arch == 0 or device.arch >= 100))
    if spills and n_cols > SPILLS:
        return None
    for block_n, block_m, num_warps in WHOLE[max(4, itemsize)]:
        if n_cols <= block_n:
            most = THREADS // device.warp_size // (2 if how.odd else 1)
            most = min(most, block_n // (how.granule * device.warp_size))
            if n_matrices == 2 and block_m == 1 and 2 * num_warps <= most:
                num_warps *= 2
            return Whole(block_m, block_n, num_warps, how)
    return None


def soft_target(
    n_cols: int,
    stride_row: int,
    stride_col: int,
    itemsize: int,
    address: int,
    target_itemsize: int,
    target_lines_up: bool,
    holds: Holds,
    device: Device,
) -> Whole | None:
    """The tile for rows of logits that a program holds with their rows of probabilities; None: they are streamed.

    holds.smoothing: or class weights. More threads share a row where a softcap is computed, and where odd rows of two
    dtypes lie differently in their granules.
    """
    how = access(n_cols, stride_row, stride_col, itemsize, address)
    if n_cols > BY_VALUE and (how.granule == 1 or not target_lines_up):
        return None
    tiles = WHOLE[max(4, itemsize, target_itemsize)]
    widest = min(tiles[-1][0], SPILLS) // (2 if how.odd else 1) // (2 if any(holds) else 1)
    if holds.softcap:
        widest = min(widest, SPILLS // 4)
    for block_n, block_m, num_warps in tiles:
        if n_cols <= block_n <= widest:
            most = THREADS // device.warp_size // (2 if how.odd else 1)
            if block_m == 1:
                times = 4 if holds.softcap or (how.odd and itemsize != target_itemsize) else 2
                num_warps = min(times * num_warps, most, block_n // (how.granule * device.warp_size))
            return Whole(block_m, block_n, num_warps, how)
    return None


def unroll(itemsize: int, holds: Holds, device: Device) -> int:
    """Vectors that a thread loads at a time where rows are streamed: fewer where more is summed, or it would spill."""
    vectors = 2 if itemsize == 8 else 4
    one = holds.softcap or (holds.stats and device.arch < 90)
    return 1 if one else vectors // 2 if any(holds) else vectors


def vector(n_cols: int, stride_row: int, stride_col: int, itemsize: int, address: int) -> int:
    """Values in one access to rows of few classes: the most, up to 16 bytes, at which every row's accesses align."""
    width = 16 // itemsize
    while width > 1 and (stride_col != 1 or n_cols % width or stride_row % width or address % (width * itemsize)):
        width //= 2
    return width


def norms(n_rows: int) -> int:
    """Programs that share the counting of targets; each leaves a part for the kernels to add up."""
    return 1 if n_rows <= 16 * NORM else MANY

"""The launch table: pure, and within what Triton and the kernels allow."""

import itertools
from typing import Any

import pytest

from softxent import launch

HOPPER, BLACKWELL, AMD, RADEON = (launch.Device(*of) for of in ((32, 90), (32, 100), (64, 0), (32, 0)))
WIDTHS = (1, 2, 3, 10, 16, 17, 33, 64, 65, 512, 513, 1000, 4096, 4097, 16384, 32768, 50257, 65536, 262144)


PLAIN, SMOOTHED = launch.Holds(), launch.Holds(smoothing=True)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("odd", [False, True])
def test_a_row_that_a_program_holds_fits_wherever_it_starts(itemsize: int, odd: bool) -> None:
    for n_cols in WIDTHS:
        stride = n_cols + (1 if odd else -n_cols % 16)
        tile = launch.whole(n_cols, stride, 1, itemsize, 0, PLAIN, HOPPER)
        if tile is None:
            assert n_cols > {2: 81920, 4: 51200, 8: 4096}[itemsize]
            continue
        assert n_cols <= tile.block_n < max(65, 2 * n_cols)
        for size in (tile.block_m, tile.num_warps, *(() if tile.packed else (tile.block_n,))):
            assert size & (size - 1) == 0
        if tile.packed:
            assert tile.block_n % (32 * tile.num_warps * 16 // itemsize) == 0 and tile.block_m == 1


def test_rows_are_accessed_in_granules_of_16_bytes_where_they_have_them() -> None:
    assert launch.access(1024, 1024, 1, 2, 0) == (8, False)
    assert launch.access(1000, 1000, 1, 2, 0) == (8, False)
    assert launch.access(50257, 50257, 1, 2, 0) == (8, True)
    assert launch.access(50257, 50304, 1, 4, 0) == (4, True)  # a padded vocabulary: the last granule is shared
    assert launch.access(1024, 1024, 1, 4, 4) == (4, True)  # a slice that starts off a granule
    assert launch.access(10, 1, 256, 4, 0) == (1, False)  # classes first in memory
    assert launch.access(51, 51, 1, 8, 0) == (1, False)


def test_label_smoothing_of_odd_rows_is_summed_in_the_order_of_the_columns() -> None:
    tile = launch.whole(1001, 1001, 1, 2, 0, SMOOTHED, HOPPER)
    assert tile is not None and tile.access == (1, False)
    assert launch.whole(50257, 50257, 1, 2, 0, SMOOTHED, HOPPER) is None
    tile = launch.whole(50257, 50257, 1, 2, 0, PLAIN, HOPPER)
    assert tile is not None and tile.access == (8, True) and tile.packed


def test_rows_that_would_spill_are_held_only_where_they_do_not() -> None:
    def held(itemsize: int, odd: bool, holds: launch.Holds, device: launch.Device) -> tuple[int, int]:
        """The widest rows: whose values are taken apart, and that stay as they were loaded."""
        widths = (8192, 16384, 32768, 51200, 65536, 81920)
        tiles = {n: launch.whole(n - 7 * odd, n - 7 * odd, 1, itemsize, 0, holds, device) for n in widths}
        found = [(n, tile.packed) for n, tile in tiles.items() if tile is not None]
        apart, kept = ([n for n, packed in found if packed == which] for which in (False, True))
        return max(apart), max(kept, default=0)

    more = (launch.Holds(softcap=True), launch.Holds(entropy_gradient=True), launch.Holds(stats=True))
    for device in (HOPPER, BLACKWELL, AMD, RADEON):
        packs = device in (HOPPER, BLACKWELL)  # whose compilers read PTX
        assert held(4, False, PLAIN, device) == (32768, {HOPPER: 51200}.get(device, 0))
        assert held(2, False, PLAIN, device) == (32768, {HOPPER: 81920, BLACKWELL: 65536}.get(device, 0))
        for holds in (SMOOTHED, *more):
            assert held(4, False, holds, device) == (16384, 32768 * packs)
            apart = 8192 if packs and holds.softcap else 16384
            assert held(2, False, holds, device) == (apart, 65536 * packs)
        for holds in more:
            assert held(4, True, holds, device) == (8192, 32768 * packs)
            assert held(2, True, holds, device) == (8192, 65536 * packs)
        for holds in (launch.Holds(softcap=True, stats=True), launch.Holds(smoothing=True, weights=True)):
            apart = 8192 if packs and holds.softcap else 16384
            assert held(2, False, holds, device) == (apart, 32768 * packs)
            assert held(4, False, holds, device) == (16384, 0)
    assert [held(4, True, PLAIN, device)[0] for device in (HOPPER, BLACKWELL, AMD)] == [32768, 16384, 16384]
    assert [held(2, True, PLAIN, device)[0] for device in (HOPPER, BLACKWELL, AMD)] == [32768, 32768, 16384]
    assert [held(4, True, PLAIN, device)[1] for device in (HOPPER, BLACKWELL, AMD)] == [51200, 32768, 0]


def test_softmax_holds_what_its_registers_hold() -> None:
    def held(itemsize: int, odd: bool, n_matrices: int, device: launch.Device, stride_col: int = 1) -> int:
        """The widest rows."""
        widths = [n - odd for n in (2048, 4096, 8192, 16384, 32768, 65536)]
        tiles = [launch.softmax(n, stride_col, itemsize, n_matrices, device) for n in widths]
        return max(n for n, tile in zip(widths, tiles, strict=True) if tile is not None)

    for device, odd_forward in ((HOPPER, 32767), (BLACKWELL, 16383), (AMD, 16383), (RADEON, 16383)):
        for itemsize in (2, 4):
            assert [held(itemsize, False, n, device) for n in (1, 2)] == [32768, 16384]
            assert [held(itemsize, True, n, device) for n in (1, 2)] == [odd_forward, 16383]
            assert [held(itemsize, False, n, device, stride_col=2) for n in (1, 2)] == [4096, 4096]
        assert [held(8, odd, n, device) for odd in (False, True) for n in (1, 2)] == [4096, 4096, 4095, 4095]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("n_matrices", [1, 2])
def test_a_row_of_softmax_that_a_program_holds_fits(itemsize: int, n_matrices: int) -> None:
    for device in (HOPPER, BLACKWELL, AMD):
        for n_cols in WIDTHS:
            tile = launch.softmax(n_cols, 1, itemsize, n_matrices, device)
            if n_cols <= launch.BY_VALUE:
                assert launch.softmax(n_cols, 256, itemsize, n_matrices, device) == tile
            if tile is not None:
                assert n_cols <= tile.block_n < max(65, 2 * n_cols)
                assert tile.num_warps * device.warp_size <= 1024
                if tile.block_m == 1:  # no thread has less than a granule
                    assert tile.num_warps * device.warp_size * tile.access.granule <= tile.block_n
                assert not tile.packed


def lines_up(n_cols: int, stride_row: int, stride_col: int, address: int, n_values: int, of: int = 0) -> bool:
    """16-bit rows with contiguous ones that start `of` bytes after a granule."""
    return launch.lines_up((n_cols, stride_row, stride_col, 2, address), (n_cols, n_cols, 1, 2, of), n_values)


def test_rows_line_up_with_those_of_another_matrix() -> None:
    assert lines_up(1000, 1000, 1, 32, 8)
    assert lines_up(50257, 50257, 1, 0, 8)
    assert lines_up(50257, 50265, 1, 0, 8)
    assert not lines_up(50257, 50304, 1, 0, 8)  # a padded vocabulary
    assert not lines_up(1000, 1000, 1, 2, 8)
    assert lines_up(1000, 1000, 1, 2, 8, of=18)
    assert not lines_up(1000, 1000, 1, 0, 8, of=18)
    assert not lines_up(1000, 1, 256, 0, 8)
    assert lines_up(1000, 0, 1, 0, 8) and not lines_up(1001, 0, 1, 0, 8)  # one row for all
    half, single = (1001, 1001, 1, 2, 0), (1001, 1001, 1, 4, 4)
    assert launch.lines_up((1001, 1001, 1, 4, 0), half, 8)  # so many values, each of another size
    assert not launch.lines_up(single, half, 8)
    assert launch.lines_up(single, (1001, 1001, 1, 2, 2), 8)


def soft_target(
    n_cols: int,
    itemsize: int,
    device: launch.Device,
    *,
    odd: bool = False,
    target_itemsize: int = 0,
    lines_up: bool = True,
    holds: launch.Holds = PLAIN,
) -> launch.Whole | None:
    """Of rows that lie in granules, or not."""
    stride = n_cols + (1 if odd else -n_cols % 16)
    target_itemsize = target_itemsize or itemsize
    return launch.soft_target(n_cols, stride, 1, itemsize, 0, target_itemsize, lines_up, holds, device)


def test_rows_are_held_with_their_probabilities_where_the_registers_hold_both() -> None:
    def held(itemsize: int, device: launch.Device = HOPPER, **how: Any) -> int:
        """The widest rows."""
        widths = [n - 16 * bool(how.get("odd")) for n in (2048, 4096, 8192, 16384, 32768, 65536)]
        return max(n for n in widths if soft_target(n, itemsize, device, **how) is not None)

    for device in (HOPPER, BLACKWELL, AMD):
        assert held(4, device) == held(2, device) == held(2, device, target_itemsize=4) == 16384
        assert held(4, device, odd=True) == held(2, device, odd=True) == 8176
        for holds, widest in ((SMOOTHED, 8192), (launch.Holds(softcap=True), 4096)):
            assert held(2, device, holds=holds) == held(4, device, holds=holds) == widest
            assert held(2, device, holds=holds, odd=True) == held(4, device, holds=holds, odd=True) == 4080
        assert held(2, device, lines_up=False) == held(4, device, lines_up=False, odd=True) + 16 == 4096
        assert [held(8, device, holds=holds) for holds in (PLAIN, SMOOTHED)] == [4096, 2048]
        assert held(4, device, target_itemsize=8) == 4096


def test_a_row_that_is_held_with_its_probabilities_fits() -> None:
    for device in (HOPPER, BLACKWELL, AMD):
        for n_cols, itemsize, odd, holds in itertools.product(
            [n for n in WIDTHS if n > launch.FEW],
            (2, 4, 8),
            (False, True),
            (PLAIN, SMOOTHED, launch.Holds(softcap=True)),
        ):
            tile = soft_target(n_cols, itemsize, device, odd=odd, holds=holds)
            if tile is not None:
                threads = tile.num_warps * device.warp_size
                assert n_cols <= tile.block_n < max(65, 2 * n_cols)
                assert threads <= 1024 and tile.block_m * tile.block_n >= threads
                assert tile.num_warps & (tile.num_warps - 1) == 0


def test_no_program_has_more_threads_than_a_gpu_allows() -> None:
    for device in (HOPPER, BLACKWELL, AMD):
        for holds in (PLAIN, SMOOTHED, launch.Holds(softcap=True), launch.Holds(stats=True)):
            for n_cols, itemsize in ((n, size) for n in WIDTHS for size in (2, 4, 8)):
                for stride in (n_cols, n_cols + 16):
                    tile = launch.whole(n_cols, stride, 1, itemsize, 0, holds, device)
                    assert tile is None or tile.num_warps * device.warp_size <= 1024


def test_accesses_to_few_classes_are_as_wide_as_every_row_allows() -> None:
    assert launch.vector(10, 10, 1, 4, 0) == 2
    assert launch.vector(10, 10, 1, 2, 0) == 2
    assert launch.vector(16, 16, 1, 2, 0) == 8
    assert launch.vector(16, 16, 1, 4, 0) == 4
    assert launch.vector(16, 16, 1, 4, 8) == 2
    assert launch.vector(9, 10, 1, 4, 0) == 1
    assert launch.vector(10, 11, 1, 4, 0) == 1
    assert launch.vector(10, 1, 256, 4, 0) == 1


def test_power_of_two_from_and_cdiv() -> None:
    assert [launch.power_of_two_from(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]
    assert [launch.cdiv(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]

"""The launch table: pure, and within what Triton and the kernels allow."""

import itertools

import pytest

from softxent import launch

WIDTHS = (1, 2, 3, 8, 9, 10, 16, 17, 33, 64, 65, 100, 512, 513, 1000, 1001, 1024)
WARPS = (32, 64)  # threads in one


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_a_tile_of_narrow_rows_holds_them_and_is_of_powers_of_two(itemsize: int) -> None:
    for n_cols, warp_size, plain in itertools.product(WIDTHS, WARPS, (False, True)):
        width = launch.vector(n_cols, n_cols, 1, itemsize, 0)
        rows, span, warps = tile = launch.narrow(n_cols, itemsize, width, plain, warp_size)
        for n in tile:
            assert n >= 1 and n & (n - 1) == 0
        assert span < max(2 * n_cols, 4) * width
        assert span % width == 0
        threads = warps * warp_size
        assert threads <= 1024 and rows * span // width == threads  # a granule to a thread


def test_a_row_of_few_classes_belongs_to_one_thread() -> None:
    for itemsize in (2, 4):
        assert launch.narrow(10, itemsize, 2, True, 32)[1] == 2
    assert launch.narrow(100, 2, 4, True, 32)[1] == 4 * 4


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_of_wide_rows_no_more_is_held_than_registers_allow(itemsize: int) -> None:
    sizes = [most + more for most, *_ in launch.WIDE for more in (0, 1)]
    for row_bytes, odd, soft, plain, step in itertools.product(sizes, *4 * ((False, True),)):
        threads, unroll, held = launch.wide(row_bytes, itemsize, odd, soft, plain, step)
        assert 64 <= threads <= 1024 and threads & (threads - 1) == 0
        assert 4 * unroll * (1 + held) * threads <= 65536 // 2  # registers of a multiprocessor
        assert held == 0 or (plain and step)


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


def test_few_programs_sum_few_numbers() -> None:
    assert [launch.summing(n) for n in (0, 1, 4 * launch.SUM, 4 * launch.SUM + 1)] == [1, 1, 1, launch.MANY]

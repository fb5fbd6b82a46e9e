"""The launch table: pure, and within what Triton and the kernels allow."""

import pytest

from softxent import launch


@pytest.mark.parametrize("acc_bytes", [4, 8])
def test_tiles_are_powers_of_two_that_cover_the_row_or_fill_the_budget(acc_bytes: int) -> None:
    for n_cols in (1, 2, 3, 10, 16, 17, 512, 513, 1000, 4096, 4097, 50257, 262144):
        budget = launch.VALUES[n_cols > 512][1][acc_bytes]
        tile = launch.tile(n_cols, acc_bytes)
        for size in tile:
            assert size > 0 and size & (size - 1) == 0
        assert tile.block_n < 2 * n_cols
        assert tile.block_n >= n_cols or tile.block_n == budget
        assert tile.block_m * tile.block_n <= budget


def test_few_classes_take_many_rows_and_a_vocabulary_one() -> None:
    assert launch.tile(10, 4) == (64, 16, 4)
    assert launch.tile(100, 4) == (8, 128, 4)
    assert launch.tile(50257, 4) == (1, 4096, 8)


def test_power_of_two_from_and_cdiv() -> None:
    assert [launch.power_of_two_from(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]
    assert [launch.cdiv(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]

"""The formulas of bench/scaling.py against the algorithms, step by step, and its page against what it prints."""

import math
from itertools import chain
from pathlib import Path

import pytest
import torch

from bench import scaling
from softxent.options import Inputs, Options
from softxent.parallel.shards import fields_of

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def ring_all_gather(blocks: list[list[float]]) -> tuple[list[list[float]], int, int]:
    """Each device sends the block that came last to the next. What all have, numbers sent by each, steps."""
    size = len(blocks)
    has = [{rank: blocks[rank]} for rank in range(size)]
    sent = steps = 0
    for step in range(size - 1):
        moving = [(rank, (rank - step) % size) for rank in range(size)]
        arriving = [((rank + 1) % size, block, has[rank][block]) for rank, block in moving]
        for to, block, values in arriving:
            has[to][block] = values
        sent += len(blocks[0])
        steps += 1
    return [list(chain(*(of[i] for i in range(size)))) for of in has], sent, steps


def ring_all_reduce(values: list[list[float]]) -> tuple[list[list[float]], int, int]:
    """A block of each device goes round and is added to; then the sums are gathered."""
    size, n = len(values), len(values[0]) // len(values)
    blocks = [[row[i * n : (i + 1) * n] for i in range(size)] for row in values]
    sent = steps = 0
    for step in range(size - 1):
        arriving = [
            ((rank + 1) % size, (rank - step) % size, blocks[rank][(rank - step) % size]) for rank in range(size)
        ]
        for to, block, added in arriving:
            blocks[to][block] = [a + b for a, b in zip(blocks[to][block], added, strict=True)]
        sent += n
        steps += 1
    whole, more, further = ring_all_gather([blocks[rank][(rank + 1) % size] for rank in range(size)])
    in_order = [row[-n:] + row[:-n] for row in whole]  # device 0 has the sums of block 1
    return in_order, sent + more, steps + further


@pytest.mark.parametrize("size", [2, 3, 8, 13])
def test_the_formulas_count_what_a_ring_sends(size: int) -> None:
    values = [[float(rank * 100 + i) for i in range(4 * size)] for rank in range(size)]
    gathered, sent, steps = ring_all_gather(values)
    assert gathered == [list(chain(*values))] * size
    assert scaling.all_gather(8 * 4 * size, size) == (8 * sent, steps)
    reduced, sent, steps = ring_all_reduce(values)
    assert reduced == [[sum(column) for column in zip(*values, strict=True)]] * size
    found = scaling.all_reduce(8 * 4 * size, size)
    assert found.n_bytes == pytest.approx(8 * sent) and found.steps == steps


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("size", [8, 1024])
def test_at_the_break_even_both_take_the_same_time(size: int, trees: bool) -> None:
    latency, bandwidth = 3e-6, 20e9
    n_rows = scaling.break_even(size, 3, latency * bandwidth, trees)

    def seconds(way: scaling.Traffic) -> float:
        steps = way.steps / (size - 1) * math.log2(size) if trees else way.steps
        return steps * latency + way.n_bytes / bandwidth

    for rows, ours_is_less in ((n_rows / 2, True), (n_rows * 2, False)):
        ours, theirs = (seconds(scaling.one_all_gather(rows, size, 3)), seconds(scaling.three_all_reduces(rows, size)))
        assert (ours < theirs) == ours_is_less
    same = seconds(scaling.one_all_gather(n_rows, size, 3)), seconds(scaling.three_all_reduces(n_rows, size))
    assert same[0] == pytest.approx(same[1])


def test_three_all_reduces_are_the_fewer_bytes_by_half_the_number_of_devices() -> None:
    """What the page says of 3 numbers a row; and where the exchange outweighs the logits."""
    for size in scaling.DEVICES:
        ratio = scaling.one_all_gather(10, size, 3).n_bytes / scaling.three_all_reduces(10, size).n_bytes
        assert ratio == pytest.approx(size / 2)
    rows = [row.strip("| ").split(" | ") for row in scaling.on_the_chip(8192).splitlines()[2:]]
    heavier = [int(row[0]) for row in rows if _number(row[5]) > _number(row[3])]
    assert heavier == [256, 512, 1024]


def _number(cell: str) -> float:
    return float(cell.removesuffix(" MB").replace(",", ""))


def test_the_page_holds_what_the_script_prints() -> None:
    assert scaling.page() in PAGE.read_text(encoding="utf-8")


def test_as_many_numbers_are_exchanged_as_the_op_exchanges() -> None:
    x, y, w = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.ones(2)
    stats = "lse", "entropy", "target_logprob", "prediction"
    everything = Inputs(x, y, w), Options(label_smoothing=0.1, z_loss=0.1)
    assert len(fields_of(Inputs(x, y), Options(), ())) == scaling.FEWEST
    assert len(fields_of(*everything, ())) == scaling.LOSS
    assert len(fields_of(*everything, stats)) == scaling.STATS

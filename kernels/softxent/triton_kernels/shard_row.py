"""Rows of which this GPU holds a shard of the classes. parallel/shards.py has what is exchanged, formula.py the loss.

sums_kernel        reads a row of the shard: its sums, as the first part of wide_row.py makes them
combine_kernel     the sums of all shards, in the order of ranks: losses, stats, and what the gradient wants
gradient_kernel    reads the row again and writes its gradient, as the third part of wide_row.py does

A program takes a row, but for combine_kernel, which takes BLOCK and sees no logits.
"""

# mypy: disable-error-code="assignment, misc, no-redef"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import exp, finite_or_zero, nan_unless, raised
from .formula import (
    Formula,
    RowSums,
    Target,
    better_of,
    gradient_of_row,
    load_factor,
    load_target,
    logit_map,
    loss_of_row,
    no_target,
    rows_that_count,
    smoothing,
    store_stats,
    with_target,
)
from .handles import cached_launch
from .wide_row import INF, NOWHERE, place_of, sum_row, write_row


class Exchanged(NamedTuple):
    """Pointers to [n_rows], or None for what is not exchanged."""

    m: Any
    rest: Any
    z_y: Any
    w_y: Any
    total: Any
    gap: Any
    moment: Any
    best: Any  # integers of the same width


class RowOut(NamedTuple):
    """Pointers to [n_rows], or None: parallel.shards.Row."""

    m: Any
    rest: Any
    z_y: Any
    w_y: Any
    total: Any
    moment: Any


class Classes(NamedTuple):
    """The shard has n_cols of them, from the first on, of all."""

    n_cols: Any
    first: Any
    of_all: Any


@triton.jit
def store_if(ptr, at, value, mask=None):
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_or(ptr, at, mask, other: tl.constexpr, dtype: tl.constexpr):
    value = tl.full(at.shape, other, dtype)
    if ptr is not None:
        value = tl.load(ptr + at, mask=mask, other=other).to(dtype)
    return value


@cached_launch
@triton.jit
def sums_kernel(
    batch,  # Batch, without gradients; the target classes are counted over all
    extras,  # Extras
    out,  # Exchanged
    classes,  # Classes
    strides,  # Strides
    tile: tl.constexpr,  # launch.Wide
):
    acc: tl.constexpr = tl.float64 if batch.logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    MOMENT: tl.constexpr = out.moment is not None
    row = tl.program_id(0).to(tl.int64)
    place = place_of(batch, row, classes.n_cols, strides, tile)
    eps, even = smoothing(extras, classes.of_all, acc)
    formula = Formula(batch.probs_ptr, batch.weight_ptr, eps, even, extras)

    active = rows_that_count(batch.sample_weight_ptr, row, tl.num_programs(0))
    local = tl.full((), -1, tl.int32)
    missing = tl.full((), False, tl.int1)
    if batch.target_ptr is not None:
        y = tl.load(batch.target_ptr + row).to(tl.int64)
        counts = y != extras.ignore_index
        active = active & counts
        missing = counts & ((y < 0) | (y >= classes.of_all))
        tl.device_assert(missing == 0, "softxent: target out of range")
        here = counts & (y >= classes.first) & (y < classes.first + classes.n_cols)
        local = tl.where(here, y - classes.first, -1).to(tl.int32)
        x_ptr = batch.logits_ptr + row * strides.row + local.to(tl.int64) * strides.col
        x_y = tl.load(x_ptr, mask=here & active, other=0.0)
        z_y, _ = logit_map(x_y, extras, acc)
        store_if(out.z_y, row, tl.where(here & active, z_y, INF))
        if batch.weight_ptr is not None:  # of a row of sample weight 0, too: the mean counts it
            store_if(out.w_y, row, tl.load(batch.weight_ptr + local, mask=here, other=0.0).to(acc))

    _, sums = sum_row(place, active, local, strides, formula, "evict_first", MOMENT, out.best is not None, tile)
    rest = sums.rest
    if MOMENT:
        rest = tl.where(sums.m == -INF, 0.0, tl.where(rest < 2.0, sums.below, rest - 1.0))
    store_if(out.m, row, sums.m)
    store_if(out.rest, row, tl.where(missing, -1.0, rest))
    store_if(out.total, row, sums.total)
    store_if(out.gap, row, sums.gap)
    store_if(out.moment, row, sums.moment)
    if out.best is not None:  # NOWHERE + classes.first would overflow, which Triton's debug mode asserts against
        none = sums.m == -INF
        best = tl.where(none, place.low, sums.best) - place.low + classes.first
        tl.store(out.best + row, tl.where(none, NOWHERE, best).to(out.best.dtype.element_ty))


@cached_launch
@triton.jit
def combine_kernel(
    of_ranks,  # Exchanged, of the first rank; those of the next are stride_rank further
    batch,  # Batch, without logits
    extras,  # Extras
    outputs,  # Outputs
    out,  # RowOut
    n_rows,
    n_ranks,
    stride_rank,
    classes,  # Classes
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = of_ranks.m.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = rows < n_rows
    to_rank = tl.cast(stride_rank, tl.int64)
    eps, even = smoothing(extras, classes.of_all, acc)
    formula = Formula(batch.probs_ptr, None, eps, even, extras)
    zero = tl.zeros([BLOCK], acc)

    # all shards' sums, moved to the largest m
    highest = zero - INF
    for i in range(n_ranks):
        highest = tl.maximum(highest, tl.load(of_ranks.m + rows + i * to_rank, mask=in_range, other=0.0))
    shift = finite_or_zero(highest)
    rest, below, total, gap, moment, w_y = zero, zero, zero, zero, zero, zero
    seen = tl.zeros([BLOCK], tl.int1)
    z_y = zero + INF
    holders = tl.zeros([BLOCK], tl.int32)
    best = tl.full([BLOCK], NOWHERE, tl.int64)
    for i in range(n_ranks):
        at = rows + i * to_rank
        m_i = tl.load(of_ranks.m + at, mask=in_range, other=0.0)
        rest_i = tl.load(of_ranks.rest + at, mask=in_range, other=0.0)
        less = exp(m_i - shift)
        risen = tl.where(m_i == -INF, 0.0, highest - m_i)
        if of_ranks.moment is not None:
            but_one = rest_i
            rest_i = tl.where(m_i == -INF, 0.0, 1.0 + but_one)
            largest = (m_i == highest) & (m_i > -INF) & (seen == 0)
            seen = seen | largest
            below += tl.where(largest, but_one, less * rest_i)
            moment += less * (tl.load(of_ranks.moment + at, mask=in_range, other=0.0) + risen * rest_i)
        rest += less * rest_i
        if of_ranks.gap is not None:
            total_i = tl.load(of_ranks.total + at, mask=in_range, other=0.0)
            gap += tl.load(of_ranks.gap + at, mask=in_range, other=0.0) + raised(total_i, risen)
            total += total_i
        if of_ranks.best is not None:
            best_i = tl.load(of_ranks.best + at, mask=in_range, other=0).to(tl.int64)
            best = tl.where(m_i == highest, tl.minimum(best, best_i), best)
        if of_ranks.z_y is not None:
            z_i = tl.load(of_ranks.z_y + at, mask=in_range, other=0.0)
            holders += (z_i < INF).to(tl.int32)  # not NaN either
            z_y = tl.minimum(z_y, z_i)
            w_y += load_or(of_ranks.w_y, at, in_range, 0.0, acc)

    # the target's own term, and the loss
    if of_ranks.moment is not None:  # beside the 1 of a largest that is alone, the others would have lost digits
        rest = tl.where(seen, 1.0 + below, rest)
    if batch.target_ptr is not None:
        y, active, valid = load_target(
            batch.target_ptr, batch.sample_weight_ptr, rows, n_rows, classes.of_all, extras.ignore_index
        )
        valid = valid & (holders == 1)
        if of_ranks.w_y is None:
            w_y += 1.0
        store_if(out.w_y, rows, w_y, in_range)
        w_y += nan_unless(valid, acc)
        target = Target(y, active, valid, z_y, zero, w_y, w_y, even)
    else:
        target = no_target(rows, rows_that_count(batch.sample_weight_ptr, rows, n_rows), formula)
    row, gap = with_target(highest, rest, total, gap, moment, target)
    d, log_d, loss = loss_of_row(row, gap, target, formula)
    store_if(outputs.loss, rows, tl.where(target.active, loss, 0.0), in_range)
    store_stats(outputs, rows, in_range, target, row, d, log_d, below, better_of(target, highest, best))
    store_if(out.m, rows, row.m, in_range)
    store_if(out.rest, rows, row.rest, in_range)
    store_if(out.z_y, rows, target.z, in_range)
    store_if(out.total, rows, row.total, in_range)
    store_if(out.moment, rows, row.moment, in_range)


@cached_launch
@triton.jit
def gradient_kernel(
    batch,  # Batch; its sample weights are in the cotangents, and here say only which rows count
    cotangents,  # Cotangents
    extras,  # Extras
    of_row,  # RowOut
    classes,  # Classes
    strides,  # Strides
    tile: tl.constexpr,  # launch.Wide
):
    acc: tl.constexpr = tl.float64 if batch.logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    place = place_of(batch, row, classes.n_cols, strides, tile)
    eps, even = smoothing(extras, classes.of_all, acc)
    formula = Formula(batch.probs_ptr, batch.weight_ptr, eps, even, extras)
    if batch.target_ptr is None:
        target = no_target(row, rows_that_count(batch.sample_weight_ptr, row, n_rows), formula)
    else:
        y, active, valid = load_target(
            batch.target_ptr, batch.sample_weight_ptr, row, n_rows, classes.of_all, extras.ignore_index
        )
        here = valid & (y >= classes.first) & (y < classes.first + classes.n_cols)
        local = tl.where(here, y - classes.first, -1)
        x_ptr = batch.logits_ptr + row * strides.row + local.to(tl.int64) * strides.col
        _, slope = logit_map(tl.load(x_ptr, mask=here, other=0.0), extras, acc)
        w_y = load_or(of_row.w_y, row, valid, 1.0, acc) + nan_unless(valid, acc)
        # of the class in this shard's columns, if it is here
        target = Target(local, active, here, tl.load(of_row.z_y + row), slope, w_y, w_y, even)
    sums = RowSums(
        tl.load(of_row.m + row),
        tl.load(of_row.rest + row),
        load_or(of_row.total, row, target.active, 0.0, acc),
        load_or(of_row.moment, row, target.active, 0.0, acc),
    )
    r = load_factor(cotangents, strides.dloss, None, None, row, target.active, 0, acc)
    factors = gradient_of_row(r, sums, target, formula, cotangents, row)
    # nothing is held: launch.wide has HELD 0 where no first pass is made
    tl.debug_barrier()  # the gradient may go over the logits, of which another warp may still want the target's
    write_row(batch, place, (), target, factors, strides, formula, cotangents.entropy is not None, tile)

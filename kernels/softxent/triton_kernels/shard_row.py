"""Rows of which this GPU holds a shard of the classes. parallel/shards.py has what is exchanged, common.py the formula.

sums_kernel        reads a row of the shard: its sums, as the first part of wide_row.py makes them
combine_kernel     the sums of all shards, in the order of ranks: losses, stats, and what the gradient wants
gradient_kernel    reads the row again and writes its gradient, as the third part of wide_row.py does

A program takes a row, but for combine_kernel, which takes BLOCK and sees no logits.
"""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    behind,
    better_of,
    exp,
    finite_or_zero,
    gradient_of_row,
    load_factor,
    load_target,
    log_normalizer,
    logit_map,
    loss_of_target,
    moment_of,
    nan_unless,
    raised,
    rows_that_count,
    smoothing,
    store_stats,
    times_slope,
    weighed_gap,
)
from .handles import cached_launch
from .wide_row import NOWHERE, add_chunk, load_chunk, start_of, sums_of_row, write_chunk


class Sums(NamedTuple):
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


@triton.jit
def place_of(logits_ptr, row, stride_row, n_cols, THREADS: tl.constexpr, GRANULE: tl.constexpr, ODD: tl.constexpr):
    """low, first, last, high, and the columns outside [first, last), as in wide_row.py; but a shard may have fewer
    columns than a granule, or none."""
    low, first = 0, 0
    if ODD:
        low = ((logits_ptr + row * stride_row).to(tl.int64) // (16 // GRANULE) % GRANULE).to(tl.int32)
        first = (low + GRANULE - 1) // GRANULE * GRANULE
    high = low + n_cols
    last = tl.maximum(high, first) // GRANULE * GRANULE
    ends = tl.arange(0, THREADS)[None, :]
    if ODD:
        ends = tl.where(ends < GRANULE, ends, tl.maximum(last, GRANULE) + ends - GRANULE)
        is_end = (ends < first) | (ends >= last)
        ends = tl.where(is_end & (ends >= low) & (ends < high), ends, NOWHERE)
    return low, first, last, high, ends


@triton.jit
def store_if(ptr, at, value, mask=None):
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_or(ptr, at, mask, other: tl.constexpr, dtype: tl.constexpr):
    if ptr is None:
        value = tl.full(at.shape, other, dtype)
    else:
        value = tl.load(ptr + at, mask=mask, other=other).to(dtype)
    return value


@cached_launch
@triton.jit
def sums_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int, over all classes; or [n_rows, n_cols] floating point
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None
    extras,  # Extras
    sums,  # Sums, out
    n_cols,
    first_class,
    n_classes,
    strides,  # Strides
    ignore_index,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    GRANULE: tl.constexpr,
    GIVEN: tl.constexpr,
    ODD: tl.constexpr,
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    SOFT: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    U: tl.constexpr = sums.gap is not None
    MOMENT: tl.constexpr = sums.moment is not None
    BEST: tl.constexpr = sums.best is not None
    INF: tl.constexpr = float("-inf")
    CHUNK: tl.constexpr = THREADS * UNROLL * GRANULE
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    low, first, last, high, ends = place_of(logits_ptr, row, strides.row, n_cols, THREADS, GRANULE, ODD)
    x_ptr = start_of(logits_ptr, row * strides.row - low, GRANULE)
    t_ptr = x_ptr
    if weight_ptr is not None:
        weight_ptr -= low
    lane = tl.arange(0, UNROLL)[:, None] * (THREADS * GRANULE) + tl.arange(0, THREADS * GRANULE)[None, :]
    eps, even = smoothing(extras, n_classes, acc)
    formula = weight_ptr, eps, even, extras

    active = rows_that_count(sample_weight_ptr, row, n_rows)
    at_y = tl.full((), -1, tl.int32)
    missing = tl.full((), False, tl.int1)
    if SOFT:
        t_ptr = start_of(target_ptr, row * strides.target_row - low * strides.target_col, GIVEN)
    else:
        target = tl.load(target_ptr + row).to(tl.int64)
        counts = target != ignore_index
        active = active & counts
        missing = counts & ((target < 0) | (target >= n_classes))
        tl.device_assert(missing == 0, "softxent: target out of range")
        held = counts & (target >= first_class) & (target < first_class + n_cols)
        at_y = tl.where(held, target - first_class, -1).to(tl.int32) + low
        x_y = tl.load(x_ptr + at_y.to(tl.int64) * strides.col, mask=held & active, other=0.0)
        z_y, _ = logit_map(x_y, None, extras, acc)
        store_if(sums.z_y, row, tl.where(held & active, z_y, float("inf")))
        if weight_ptr is not None:  # of a row of sample weight 0, too: the mean counts it
            store_if(sums.w_y, row, tl.load(weight_ptr + at_y, mask=held, other=0.0).to(acc))
    until = tl.where(active, last, 0) // GRANULE * GRANULE
    until_end = tl.where(active, high, 0)

    zero = tl.zeros([THREADS], acc)
    found = zero + INF, zero, zero, zero, zero, zero, tl.full([THREADS], NOWHERE, tl.int32)
    m, rest, below, moment, total, gap, best = found
    for start in range(0, until, CHUNK):
        at = start + lane
        x = load_chunk(x_ptr, strides.col, at, first, until, INF, "evict_first", THREADS, GRANULE, ODD)
        t = x
        if SOFT:
            t = load_chunk(t_ptr, strides.target_col, at, first, until, 0.0, "evict_first", THREADS, GIVEN, ODD)
        found = m, rest, below, moment, total, gap, best
        m, rest, below, moment, total, gap, best = add_chunk(
            found, x, t, at, start, first, until, at_y, formula, CHUNK, SOFT, U, MOMENT, BEST
        )
    found = m, rest, below, moment, total, gap, best
    if ODD:
        x_end = load_chunk(x_ptr, 1, ends, low, until_end, INF, "evict_first", THREADS, 1, ODD)
        t_end = x_end
        if SOFT:
            t_end = load_chunk(t_ptr, strides.target_col, ends, low, until_end, 0.0, "evict_first", THREADS, 1, ODD)
        found = add_chunk(found, x_end, t_end, ends, -1, low, until_end, at_y, formula, 0, SOFT, U, MOMENT, BEST)
    m, rest, below, moment, total, gap, best = sums_of_row(found)
    if MOMENT:
        rest = tl.where(m == INF, 0.0, tl.where(rest < 2.0, below, rest - 1.0))
    store_if(sums.m, row, m)
    store_if(sums.rest, row, tl.where(missing, -1.0, rest))
    store_if(sums.total, row, total)
    store_if(sums.gap, row, gap)
    store_if(sums.moment, row, moment)
    store_if(sums.best, row, tl.where(m == INF, NOWHERE, best - low + first_class))


@cached_launch
@triton.jit
def combine_kernel(
    sums,  # Sums of the first rank; those of the next are stride_rank further
    target_ptr,  # [n_rows] int, over all classes; or floating point
    sample_weight_ptr,  # [n_rows], or None
    extras,  # Extras
    outputs,  # Outputs
    out,  # RowOut
    n_rows,
    n_ranks,
    stride_rank,
    n_classes,
    ignore_index,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = sums.m.dtype.element_ty
    CLASS: tl.constexpr = sums.z_y is not None
    U: tl.constexpr = sums.gap is not None
    INF: tl.constexpr = float("-inf")
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = rows < n_rows
    to_rank = tl.cast(stride_rank, tl.int64)
    eps, share = smoothing(extras, n_classes, acc)
    zero = tl.zeros([BLOCK], acc)

    # all shards' sums, moved to the largest m
    highest = zero + INF
    for i in range(n_ranks):
        at = rows + i * to_rank
        highest = tl.maximum(highest, tl.load(sums.m + at, mask=in_range, other=0.0))
    shift = finite_or_zero(highest)
    rest, below, total, gap, moment, w_y = zero, zero, zero, zero, zero, zero
    seen = tl.zeros([BLOCK], tl.int1)
    z_y = zero + float("inf")
    holders = tl.zeros([BLOCK], tl.int32)
    best = tl.full([BLOCK], NOWHERE, tl.int64)
    for i in range(n_ranks):
        at = rows + i * to_rank
        m_i = tl.load(sums.m + at, mask=in_range, other=0.0)
        rest_i = tl.load(sums.rest + at, mask=in_range, other=0.0)
        less = exp(m_i - shift)
        risen = tl.where(m_i == INF, 0.0, highest - m_i)
        if sums.moment is not None:
            but_one = rest_i
            rest_i = tl.where(m_i == INF, 0.0, 1.0 + but_one)
            largest = (m_i == highest) & (m_i > INF) & (seen == 0)
            seen = seen | largest
            below += tl.where(largest, but_one, less * rest_i)
        rest += less * rest_i
        if sums.moment is not None:
            moment += less * (tl.load(sums.moment + at, mask=in_range, other=0.0) + risen * rest_i)
        if U:
            total_i = tl.load(sums.total + at, mask=in_range, other=0.0)
            gap += tl.load(sums.gap + at, mask=in_range, other=0.0) + raised(total_i, risen)
            total += total_i
        if sums.best is not None:
            best_i = tl.load(sums.best + at, mask=in_range, other=0).to(tl.int64)
            best = tl.where(m_i == highest, tl.minimum(best, best_i), best)
        if CLASS:
            z_i = tl.load(sums.z_y + at, mask=in_range, other=0.0)
            holders += (z_i < float("inf")).to(tl.int32)  # not NaN either
            z_y = tl.minimum(z_y, z_i)
            w_y += load_or(sums.w_y, at, in_range, 0.0, acc)

    # the target's own term, and the loss
    if sums.moment is not None:  # beside the 1 of a largest that is alone, the others would have lost digits
        rest = tl.where(seen, 1.0 + below, rest)
    if CLASS:
        target, active, valid = load_target(target_ptr, sample_weight_ptr, rows, n_rows, n_classes, ignore_index)
        valid = valid & (holders == 1)
        if sums.w_y is None:
            w_y += 1.0
        store_if(out.w_y, rows, w_y, in_range)
        w_y += nan_unless(valid, acc)
        v = w_y
    else:
        active = rows_that_count(sample_weight_ptr, rows, n_rows)
        target, valid = tl.full(rows.shape, -1, tl.int32), active
        z_y, share, v = zero + INF, zero + 1.0, zero + 1.0
    m = tl.where(active, tl.maximum(highest, z_y), 0.0)
    risen = tl.where(highest == INF, 0.0, m - highest)
    over = exp(highest - m)
    moment = moment_of(over, moment + rest * risen) + moment_of(exp(z_y - m), behind(m, z_y))
    rest *= over
    if U:
        gap += raised(total, risen) + weighed_gap(m, z_y, w_y)
        total += w_y
    d, log_d, loss = loss_of_target(m, rest, z_y, w_y, v, eps, extras)
    if U:
        loss += share * (total * log_d + gap)
    store_if(outputs.loss, rows, tl.where(active, loss, 0.0), in_range)
    store_stats(
        outputs, rows, in_range, active, valid, m, d, log_d, z_y, below, moment, better_of(z_y, target, highest, best)
    )
    store_if(out.m, rows, m, in_range)
    store_if(out.rest, rows, rest, in_range)
    store_if(out.z_y, rows, z_y, in_range)
    store_if(out.total, rows, total, in_range)
    store_if(out.moment, rows, moment, in_range)


@cached_launch
@triton.jit
def gradient_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int, over all classes; or [n_rows, n_cols] floating point
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: it is in the cotangents, and here says only which rows count
    cotangents,  # Cotangents
    extras,  # Extras
    row_in,  # RowOut
    dlogits_ptr,  # [n_rows, n_cols] out, or None; perhaps the logits
    dtarget_ptr,  # likewise, of probabilities
    n_cols,
    first_class,
    n_classes,
    strides,  # Strides
    ignore_index,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    GRANULE: tl.constexpr,
    GIVEN: tl.constexpr,
    ODD: tl.constexpr,
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    SOFT: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    U: tl.constexpr = row_in.total is not None
    INF: tl.constexpr = float("-inf")
    CHUNK: tl.constexpr = THREADS * UNROLL * GRANULE
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    low, first, last, high, ends = place_of(logits_ptr, row, strides.row, n_cols, THREADS, GRANULE, ODD)
    x_ptr = start_of(logits_ptr, row * strides.row - low, GRANULE)
    starts = row * strides.dlogits_row - low, row * strides.dtarget_row - low
    t_ptr = x_ptr
    if weight_ptr is not None:
        weight_ptr -= low
    lane = tl.arange(0, UNROLL)[:, None] * (THREADS * GRANULE) + tl.arange(0, THREADS * GRANULE)[None, :]
    eps, share = smoothing(extras, n_classes, acc)
    formula = weight_ptr, eps, share, extras

    m = tl.load(row_in.m + row)
    rest = tl.load(row_in.rest + row)
    z_y, slope_y = tl.full((), INF, acc), tl.full((), 1.0, acc)
    if SOFT:
        active = rows_that_count(sample_weight_ptr, row, n_rows)
        held = active
        at_y = low - 1
        w_y, v, share = tl.zeros((), acc), tl.full((), 1.0, acc), tl.full((), 1.0, acc)
        t_ptr = start_of(target_ptr, row * strides.target_row - low * strides.target_col, GIVEN)
    else:
        target, active, valid = load_target(target_ptr, sample_weight_ptr, row, n_rows, n_classes, ignore_index)
        held = valid & (target >= first_class) & (target < first_class + n_cols)
        at_y = tl.where(held, target - first_class, -1) + low
        _, slope_y = logit_map(
            tl.load(x_ptr + at_y.to(tl.int64) * strides.col, mask=held, other=0.0), None, extras, acc
        )
        z_y = tl.load(row_in.z_y + row)
        w_y = tl.full((), 1.0, acc)
        if row_in.w_y is not None:
            w_y = tl.load(row_in.w_y + row)
        w_y += nan_unless(valid, acc)
        v = w_y
    total, moment = tl.zeros((), acc), tl.zeros((), acc)
    if U:
        total = tl.load(row_in.total + row)
    if row_in.moment is not None:
        moment = tl.load(row_in.moment + row)
    r = load_factor(cotangents, strides.dloss, None, None, row, active, 0, acc)
    scale, bend, smooth, at_target = gradient_of_row(
        r, m, rest, z_y, w_y, v, total, moment, eps, share, extras, cotangents, row, active, U
    )
    _, log_d = log_normalizer(m, rest, z_y)
    factors = m, log_d, scale, bend, smooth, tl.where(active, r * (1.0 - eps), 0.0)
    out = dlogits_ptr, dtarget_ptr, starts
    until = tl.where(active, last, 0) // GRANULE * GRANULE
    until_end = tl.where(active, high, 0)
    tl.debug_barrier()  # the gradient may go over the logits, of which another warp may still want the target's

    for start in range(0, last, CHUNK):
        at = start + lane
        x = load_chunk(x_ptr, strides.col, at, first, until, INF, "evict_first", THREADS, GRANULE, ODD)
        t = x
        if SOFT:
            t = load_chunk(t_ptr, strides.target_col, at, first, until, 0.0, "evict_first", THREADS, GIVEN, ODD)
        write_chunk(out, x, t, at, first, last, factors, formula, cotangents, GRANULE, ODD, SOFT, U)
    if ODD:
        x = load_chunk(x_ptr, 1, ends, low, until_end, INF, "evict_first", THREADS, 1, ODD)
        t = x
        if SOFT:
            t = load_chunk(t_ptr, strides.target_col, ends, low, until_end, 0.0, "evict_first", THREADS, 1, ODD)
        write_chunk(out, x, t, ends, low, high, factors, formula, cotangents, 1, ODD, SOFT, U)
    if not SOFT:
        if dlogits_ptr is not None:
            tl.debug_barrier()  # the target's value goes over what another thread may have written there
            at_target = times_slope(at_target, slope_y, extras).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + starts[0] + at_y, at_target, mask=held)

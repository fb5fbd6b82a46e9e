"""A training step with whole rows on chip: a program reads its rows once, and writes their gradient once.

Many narrow rows a program, to one row as wide as a program's registers hold; common.py has the formula. A forward pass
is the same without the last part: dlogits_ptr is None.
"""

import triton
import triton.language as tl

from .common import (
    behind,
    better_of,
    edges,
    exp,
    exp_for,
    finite_or_zero,
    first_granule,
    fixed_point,
    from_fixed_point,
    gradient_of_row,
    larger_or_nan,
    load_factor,
    load_sample_weight,
    load_target,
    load_target_weight,
    load_weights,
    logit_map,
    loss_of_target,
    moment_of,
    power_of_two,
    smoothing,
    store_stats,
    times_slope,
    weighed_gap,
    whole_granules,
)
from .handles import cached_launch


@triton.jit
def columns(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr):
    """The columns of the tile: [BLOCK_N] of one row; of some [BLOCK_N / SPAN, 1, SPAN], where a span of 128 bytes goes
    to eight threads, which keep the row's other spans too. What is computed once a row they compute eight times;
    the 32 threads of a warp, between which Triton would share a row of [BLOCK_M, BLOCK_N], compute it 32 times."""
    if BLOCK_M > 1:
        at = tl.arange(0, BLOCK_N // SPAN)[:, None, None] * SPAN + tl.arange(0, SPAN)[None, None, :]
    else:
        at = tl.arange(0, BLOCK_N)
    return at


@triton.jit
def spread(values, BLOCK_M: tl.constexpr):
    """A value a row, in the shape of the tile; one row's value itself."""
    if BLOCK_M > 1:
        values = values[None, :, None]
    return values


@triton.jit
def sum_row(values, BLOCK_M: tl.constexpr):
    if BLOCK_M > 1:
        values = tl.sum(values, 0)
        return tl.sum(values, 1)
    else:
        return tl.sum(values, 0)


@triton.jit
def max_row(values, BLOCK_M: tl.constexpr, NAN: tl.constexpr):
    """NAN: whether a NaN is the largest."""
    if NAN:
        if BLOCK_M > 1:
            values = tl.reduce(values, 0, larger_or_nan)
            return tl.reduce(values, 1, larger_or_nan)
        else:
            return tl.reduce(values, 0, larger_or_nan)
    else:
        if BLOCK_M > 1:
            return tl.max(tl.max(values, 0), 1)
        else:
            return tl.max(values, 0)


@triton.jit
def first_of_row(hits, cols, BLOCK_M: tl.constexpr):
    """The smallest of the columns that are hit."""
    cols = tl.where(hits, cols, 2147483647)
    if BLOCK_M > 1:
        return tl.min(tl.min(cols, 0), 1)
    else:
        return tl.min(cols, 0)


@triton.jit
def edge_index(BLOCK_M: tl.constexpr, GRANULE: tl.constexpr):
    """0 ... 2 * GRANULE - 1, in the shape of a tile: the halves to one thread."""
    if BLOCK_M > 1:
        return tl.arange(0, 2)[:, None, None] * GRANULE + tl.arange(0, GRANULE)[None, None, :]
    else:
        return tl.arange(0, 2 * GRANULE)


@triton.jit
def places(row_ptr, rows, n_rows, n_cols, BLOCK_M: tl.constexpr, at, GRANULE: tl.constexpr, ODD: tl.constexpr):
    """Where the contiguous rows at row_ptr are accessed: how many columns lie before the first whole granule, which of
    `at`, counted from there, are in whole granules, and the columns of the ends; which of those there are."""
    skip, whole = whole_granules(row_ptr, n_cols, GRANULE, ODD)
    in_range = spread(rows < n_rows, BLOCK_M)
    mask = in_range & (at < spread(whole, BLOCK_M) if ODD else at < whole)
    edge_cols, in_edge = at, mask
    if ODD:
        edge = edge_index(BLOCK_M, GRANULE)
        edge_cols, in_edge = edges(edge, n_cols, spread(skip, BLOCK_M), spread(whole, BLOCK_M), GRANULE)
        in_edge = in_range & in_edge
    return skip, mask, edge_cols, in_edge


@triton.jit
def load_at(row_ptr, skip, at, mask, stride_col, other: tl.constexpr, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Values at columns that are counted from `skip`. GRANULE: 1 for value by value."""
    if GRANULE > 1:
        values = tl.load(spread(first_granule(row_ptr, skip, GRANULE), BLOCK_M) + at, mask=mask, other=other)
    else:
        start_ptr = spread(row_ptr + skip * stride_col, BLOCK_M)
        values = tl.load(start_ptr + at.to(tl.int64) * stride_col, mask=mask, other=other)
    return values


@triton.jit
def store_at(row_ptr, skip, at, mask, values, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr):
    pos = spread(first_granule(row_ptr, skip, GRANULE), BLOCK_M) + at
    tl.store(pos, values.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_in_any_order(terms, edge_terms, BLOCK_M: tl.constexpr):
    """The sum of float32 of either sign, the same in any order: as integers, whose unit is 2^-44 of the largest's power
    of two. Of terms that are not finite, what floating point makes of them."""
    highest = larger_or_nan(max_row(terms, BLOCK_M, True), max_row(edge_terms, BLOCK_M, True))
    lowest = larger_or_nan(max_row(-terms, BLOCK_M, True), max_row(-edge_terms, BLOCK_M, True))
    largest = larger_or_nan(highest, lowest)
    size, per_size = power_of_two(largest)
    per_size = spread(per_size, BLOCK_M)
    total = sum_row(fixed_point(terms * per_size), BLOCK_M) + sum_row(fixed_point(edge_terms * per_size), BLOCK_M)
    return tl.where(largest < float("inf"), from_fixed_point(total) * size, highest - lowest)


@cached_launch
@triton.jit
def step_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents
    outputs,  # Outputs; with SUMMED the loss is one number a program
    dlogits_ptr,  # [n_rows, n_cols] out, or None; its rows start in their granules where those of the logits do
    extras,  # Extras
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_out,
    stride_dloss,
    ignore_index,
    NORMS: tl.constexpr,
    SUMMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least n_cols
    GRANULE: tl.constexpr,  # values in 16 bytes; or 1: a load and a store are as wide as Triton finds
    ODD: tl.constexpr,  # whether rows start and end within a granule
    CLUSTER: tl.constexpr,  # whether several programs hold the row: a barrier within one does not order their stores
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    eps, share = smoothing(extras, n_cols, acc)
    if GRANULE > 1 and not ODD:  # what Triton has to know to access 16 bytes at once
        stride_row = stride_row // GRANULE * GRANULE
        stride_out = stride_out // GRANULE * GRANULE
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M
    if BLOCK_M > 1:
        rows += tl.arange(0, BLOCK_M)
    target, active, valid = load_target(target_ptr, sample_weight_ptr, rows, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + rows * stride_row
    x_y = tl.load(row_ptr + target.to(tl.int64) * stride_col, mask=valid, other=0.0)
    z_y, slope_y = logit_map(x_y, None, extras, acc)
    w_y = load_target_weight(weight_ptr, target, valid, acc)

    skip, whole = whole_granules(row_ptr, n_cols, GRANULE, ODD)
    start_ptr = spread(first_granule(row_ptr, skip, GRANULE), BLOCK_M)
    at = columns(BLOCK_M, BLOCK_N, 1024 // dtype.primitive_bitwidth)
    if ODD:
        edge = edge_index(BLOCK_M, GRANULE)
        edge_cols, in_edge = edges(edge, n_cols, spread(skip, BLOCK_M), spread(whole, BLOCK_M), GRANULE)
        whole = spread(whole, BLOCK_M)
    mask = spread(active, BLOCK_M) & (at < whole)
    if GRANULE == 1:
        x = tl.load(start_ptr + at.to(tl.int64) * stride_col, mask=mask, other=float("-inf"))
    else:
        x = tl.load(start_ptr + at, mask=mask, other=float("-inf"))
    is_target = at == spread(target - skip, BLOCK_M)
    z, slope = logit_map(x, mask, extras, acc)
    z = tl.where(is_target, float("-inf"), z)  # its own term is left out of the sum, and kept in z_y
    if ODD:
        edge_mask = spread(active, BLOCK_M) & in_edge & (edge_cols != spread(target, BLOCK_M))
        x = tl.load(spread(row_ptr, BLOCK_M) + edge_cols, mask=edge_mask, other=float("-inf"))
        z_edge, slope_edge = logit_map(x, edge_mask, extras, acc)
        runner_up = larger_or_nan(max_row(z, BLOCK_M, True), max_row(z_edge, BLOCK_M, True))
    else:
        runner_up = max_row(z, BLOCK_M, False)
    m = tl.where(active, tl.maximum(runner_up, z_y), 0.0)
    shift = spread(finite_or_zero(runner_up), BLOCK_M)

    total = tl.zeros((), acc) + n_cols
    if extras.label_smoothing is not None:
        w = load_weights(weight_ptr, at, mask, acc)
        total = sum_row(w, BLOCK_M)
        gap = tl.where(is_target, 0.0, weighed_gap(spread(m, BLOCK_M), z, w))
        gap = sum_row(gap, BLOCK_M) + weighed_gap(m, z_y, w_y)
    e = exp_for(z - shift, dtype)
    if ODD:
        e_edge = exp_for(z_edge - shift, dtype)
        rest = from_fixed_point(sum_row(fixed_point(e), BLOCK_M) + sum_row(fixed_point(e_edge), BLOCK_M))
    else:
        rest = sum_row(e, BLOCK_M)
    over = exp(runner_up - m)
    moment = tl.zeros((), acc)
    if outputs.entropy is not None or cotangents.entropy is not None:
        gaps = moment_of(e, shift - z)
        if ODD:  # none is above 1 / e
            gaps_edge = moment_of(e_edge, shift - z_edge)
            moment = from_fixed_point(sum_row(fixed_point(gaps), BLOCK_M) + sum_row(fixed_point(gaps_edge), BLOCK_M))
        else:
            moment = sum_row(gaps, BLOCK_M)
        moment = moment_of(over, moment + rest * (m - runner_up)) + moment_of(exp(z_y - m), behind(m, z_y))
    rest *= over
    best = target
    if outputs.prediction is not None:
        best = first_of_row(z == shift, at, BLOCK_M)
        if ODD:
            best = tl.where(best < n_cols, best + skip, n_cols)
            best = tl.minimum(best, first_of_row(z_edge == shift, edge_cols, BLOCK_M))
        best = better_of(z_y, target, runner_up, best)
    d, log_d, loss = loss_of_target(m, rest, z_y, w_y, eps, extras)
    if extras.label_smoothing is not None:
        loss += share * (total * log_d + gap)
    loss = tl.where(active, loss * load_sample_weight(sample_weight_ptr, rows, active, acc), 0.0)
    if outputs.loss is not None:
        if SUMMED and BLOCK_M > 1:
            tl.store(outputs.loss + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(outputs.loss + rows, loss.to(outputs.loss.dtype.element_ty), mask=rows < n_rows)
    store_stats(outputs, rows, rows < n_rows, active, valid, m, d, log_d, z_y, moment, best)

    if dlogits_ptr is not None:
        out: tl.constexpr = dlogits_ptr.dtype.element_ty
        r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, rows, active, NORMS, acc)
        scale, bend, smooth, at_target = gradient_of_row(
            r, m, rest, z_y, w_y, total, moment, eps, share, extras, cotangents, rows, active
        )
        at_target = times_slope(at_target, slope_y, extras)
        if cotangents.entropy is not None:  # its gaps are counted from m, not from the runner-up
            scale += bend * tl.where(active, m - finite_or_zero(runner_up), 0.0)
            bend = spread(tl.where(active, bend * over, 0.0), BLOCK_M)
        scale = spread(tl.where(active, scale * over, 0.0), BLOCK_M)
        out_ptr = dlogits_ptr + rows * stride_out
        written = spread(rows < n_rows, BLOCK_M)
        dz = scale * e
        tl.debug_barrier()  # the gradient may go over the logits, of which another warp may still want z_y
        if cotangents.entropy is not None:
            dz += bend * moment_of(e, shift - z)
        if extras.label_smoothing is not None:
            dz -= spread(smooth, BLOCK_M) * load_weights(weight_ptr, at, mask, acc)
        dz = times_slope(dz, slope, extras)
        if CLUSTER:
            dz = tl.where(is_target, spread(at_target, BLOCK_M), dz)
        tl.store(spread(first_granule(out_ptr, skip, GRANULE), BLOCK_M) + at, dz.to(out), mask=written & (at < whole))
        if ODD:
            dz = scale * e_edge
            if cotangents.entropy is not None:
                dz += bend * moment_of(e_edge, shift - z_edge)
            dz = times_slope(dz, slope_edge, extras)
            if CLUSTER:
                dz = tl.where(edge_cols == spread(target, BLOCK_M), spread(at_target, BLOCK_M), dz)
            tl.store(spread(out_ptr, BLOCK_M) + edge_cols, dz.to(out), mask=written & in_edge)
        if not CLUSTER:
            tl.debug_barrier()  # the target's value goes over what another thread may have written there
            tl.store(out_ptr + target, at_target.to(out), mask=valid)

"""A training step with whole rows on chip: a program reads its rows once, and writes their gradient once.

Many narrow rows a program, to one row as wide as a program's registers hold; common.py has the formula. A forward pass
is the same without the last part: dlogits_ptr is None.
"""

import triton
import triton.language as tl

from .common import (
    edges,
    exp,
    finite_or_zero,
    fixed_point,
    from_fixed_point,
    gradient_of_row,
    granule_of,
    larger_or_nan,
    load_factor,
    load_target,
    load_target_weight,
    load_weights,
    loss_of_target,
    scalar,
    to_granule,
    weighed_gap,
    whole_granules,
)


@triton.jit
def column(values, BLOCK_M: tl.constexpr):
    """[BLOCK_M, 1] from a value a row; one row's value itself."""
    if BLOCK_M > 1:
        values = values[:, None]
    return values


@triton.jit
def step_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or None: no mean
    dloss_ptr,  # [n_rows], one number with stride_dloss = 0, or None: 1
    loss_ptr,  # out: [n_rows], or with SUMMED one number a program; or None
    dlogits_ptr,  # [n_rows, n_cols] out, or None; its rows start in their granules where those of the logits do
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_out,
    stride_dloss,
    ignore_index,
    label_smoothing: tl.float64,
    NORMS: tl.constexpr,
    SMOOTHED: tl.constexpr,  # whether label_smoothing is not 0
    SUMMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a row, from its first granule to its last, fits into it
    GRANULE: tl.constexpr,  # values in 16 bytes; or 1: a load and a store are as wide as Triton finds
    ODD: tl.constexpr,  # whether rows start and end within a granule
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    eps = scalar(label_smoothing, acc)
    if GRANULE > 1 and not ODD:  # what Triton has to know to access 16 bytes at once
        stride_row = stride_row // GRANULE * GRANULE
        stride_out = stride_out // GRANULE * GRANULE
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M
    if BLOCK_M > 1:
        rows += tl.arange(0, BLOCK_M)
    axis: tl.constexpr = 1 if BLOCK_M > 1 else 0  # of a row's columns. One row's sums are scalars, which need no layout
    target, active, valid = load_target(target_ptr, rows, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + rows * stride_row
    z_y = tl.load(row_ptr + target.to(tl.int64) * stride_col, mask=valid, other=float("nan")).to(acc)
    w_y = load_target_weight(weight_ptr, target, valid, acc)

    start_ptr, lead = granule_of(row_ptr, GRANULE, ODD)
    start = column(lead, BLOCK_M)
    first, last = whole_granules(n_cols, start, GRANULE)
    at = tl.arange(0, BLOCK_N)
    mask = column(active, BLOCK_M) & (at >= first) & (at < last)
    if GRANULE == 1:
        x = tl.load(column(start_ptr, BLOCK_M) + at.to(tl.int64) * stride_col, mask=mask, other=float("-inf"))
    else:
        x = tl.load(column(start_ptr, BLOCK_M) + at, mask=mask, other=float("-inf"))
    is_target = at == column(target + lead, BLOCK_M)
    z = tl.where(is_target, float("-inf"), x.to(acc))  # its own term is left out of the sum, and kept in z_y
    if ODD:
        edge_cols, in_edge = edges(n_cols, start, last, GRANULE)
        edge_mask = column(active, BLOCK_M) & in_edge
        x_edge = tl.load(column(row_ptr, BLOCK_M) + edge_cols, mask=edge_mask, other=float("-inf"))
        edge_is_target = edge_cols == column(target, BLOCK_M)
        z_edge = tl.where(edge_is_target, float("-inf"), x_edge.to(acc))
        runner_up = tl.reduce(z, axis, larger_or_nan)
        runner_up = larger_or_nan(runner_up, tl.reduce(z_edge, axis, larger_or_nan))
    else:
        runner_up = tl.max(z, axis)
    m = tl.where(active, tl.maximum(runner_up, z_y), 0.0)
    shift = column(finite_or_zero(runner_up), BLOCK_M)

    total = tl.zeros((), acc) + n_cols
    if SMOOTHED:
        w = load_weights(weight_ptr, at, mask, acc)
        total = tl.sum(w, axis)
        gap = tl.where(is_target, 0.0, weighed_gap(column(m, BLOCK_M), z, w))
        gap = tl.sum(gap, axis) + weighed_gap(m, z_y, w_y)
    e = exp(z - shift)
    if ODD:
        e_edge = exp(z_edge - shift)
        rest = from_fixed_point(tl.sum(fixed_point(e), axis) + tl.sum(fixed_point(e_edge), axis))
    else:
        rest = tl.sum(e, axis)
    over = exp(runner_up - m)
    rest *= over
    log_d, loss = loss_of_target(m, rest, z_y, (1.0 - eps) * w_y)
    if SMOOTHED:
        loss += (eps / n_cols) * (total * log_d + gap)
    loss = tl.where(active, loss, 0.0)
    if loss_ptr is not None:
        if SUMMED and BLOCK_M > 1:
            tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(loss_ptr + rows, loss.to(loss_ptr.dtype.element_ty), mask=rows < n_rows)

    if dlogits_ptr is not None:
        out: tl.constexpr = dlogits_ptr.dtype.element_ty
        r = load_factor(dloss_ptr, stride_dloss, norm_ptr, rows, active, NORMS, acc)
        scale, smooth, at_target = gradient_of_row(r, rest, m, z_y, w_y, total, eps, n_cols, active)
        scale = column(tl.where(active, scale * over, 0.0), BLOCK_M)
        written = column(rows < n_rows, BLOCK_M) & (at >= first) & (at < last)
        out_ptr = dlogits_ptr + rows * stride_out
        start_ptr = to_granule(out_ptr, lead, GRANULE, ODD)
        dz = scale * e
        if SMOOTHED:
            dz -= column(smooth, BLOCK_M) * load_weights(weight_ptr, at, mask, acc)
        tl.store(column(start_ptr, BLOCK_M) + at, dz.to(out), mask=written)
        if ODD:
            written = column(rows < n_rows, BLOCK_M) & in_edge
            tl.store(column(out_ptr, BLOCK_M) + edge_cols, (scale * e_edge).to(out), mask=written)
        tl.debug_barrier()  # the target's value goes over what another thread may have written there
        tl.store(out_ptr + target, at_target.to(out), mask=valid)

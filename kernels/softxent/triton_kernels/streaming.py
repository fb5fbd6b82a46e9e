"""Rows wider than a program's registers: a running maximum and sum for each thread, one row a program.

The running maximum moves, and with it the sum so far (Milakov and Gimelshein, 2018, "Online normalizer calculation for
softmax"). Kept for each thread, it needs no communication until the row is through. common.py has the formula.

    forward_kernel     reads the logits once
    step_kernel        reads them twice and writes the gradient; the second time from the cache, as far as that goes
    backward_kernel    reads them once and writes the gradient, from what forward_kernel kept of each row
"""

import triton
import triton.language as tl

from .common import (
    edges,
    exp,
    exp_for,
    finite_or_zero,
    first_granule,
    gradient_of_row,
    load_factor,
    load_target,
    load_target_weight,
    load_weights,
    loss_of_target,
    smoothing,
    weighed_gap,
    whole_granules,
)


@triton.jit
def sums_of_row(
    row_ptr,
    target,
    weight_ptr,
    n_cols,  # 0 for a row that is not to be read
    stride_col,
    acc: tl.constexpr,
    SMOOTHED: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    GRANULE: tl.constexpr,  # 1 for odd rows too: their loss must not depend on where in a granule they start
):
    """m, rest, sum_j w_j, and sum_j w_j * (m - z_j) of one row; the latter two only if SMOOTHED."""
    UNROLL: tl.constexpr = 2 if SMOOTHED else 4  # which holds as much again
    start_ptr = first_granule(row_ptr, 0, GRANULE)
    group = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR)
    lane = group + tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    m = tl.full([THREADS], float("-inf"), acc)
    rest = tl.zeros([THREADS], acc)
    total = tl.zeros([THREADS], acc)
    gap = tl.zeros([THREADS], acc)
    last = n_cols // GRANULE * GRANULE
    for start in range(0, last, UNROLL * THREADS * VECTOR):
        at = start + lane
        mask = at < last
        if GRANULE == 1:
            z = tl.load(start_ptr + at.to(tl.int64) * stride_col, mask=mask, other=float("-inf")).to(acc)
        else:
            z = tl.load(start_ptr + at, mask=mask, other=float("-inf")).to(acc)
        m_new = tl.maximum(m, tl.max(tl.max(z, 2), 0))
        shift = finite_or_zero(m_new)
        e = tl.where(at == target, 0.0, exp_for(z - shift[None, :, None], row_ptr.dtype.element_ty))
        rest = rest * exp(m - shift) + tl.sum(tl.sum(e, 2), 0)
        if SMOOTHED:
            w = load_weights(weight_ptr, at, mask, acc)
            gap += total * tl.where(m == float("-inf"), 0.0, m_new - m)
            gap += tl.sum(tl.sum(weighed_gap(shift[None, :, None], z, w), 2), 0)
            total += tl.sum(tl.sum(w, 2), 0)
        m = m_new

    highest = tl.max(m, 0)
    shift = finite_or_zero(highest)
    rest = tl.sum(rest * exp(m - shift), 0)
    if SMOOTHED:
        gap = tl.sum(gap + total * tl.where(m == float("-inf"), 0.0, shift - m), 0)
        total = tl.sum(total, 0)
    else:
        gap = tl.zeros((), acc)
        total = tl.zeros((), acc) + n_cols
    return highest, rest, total, gap


@triton.jit
def gradient(row_ptr, cols, mask, stride_col, target, weight_ptr, m, row_gradient, SMOOTHED: tl.constexpr):
    """dlogits of columns of a row. row_gradient: as gradient_of_row has it."""
    scale, smooth, at_target = row_gradient
    z = tl.load(row_ptr + cols.to(tl.int64) * stride_col, mask=mask, other=float("-inf")).to(m.dtype)
    dz = scale * exp_for(z - m, row_ptr.dtype.element_ty)
    if SMOOTHED:
        dz -= smooth * load_weights(weight_ptr, cols, mask, m.dtype)
    return tl.where(cols == target, at_target, dz)


@triton.jit
def write_block(
    start,
    row_ptr,
    out_ptr,
    target,
    active,
    weight_ptr,
    n_cols,
    stride_col,
    m,
    row_gradient,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
):
    """The gradient of the BLOCK columns that follow `start`, counted from the row's first whole granule."""
    out: tl.constexpr = out_ptr.dtype.element_ty
    skip, whole = whole_granules(row_ptr, n_cols, GRANULE, ODD)
    at = start + tl.arange(0, BLOCK)
    first_ptr, first_out_ptr = first_granule(row_ptr, skip, GRANULE), first_granule(out_ptr, skip, GRANULE)
    first_weight_ptr = weight_ptr
    if weight_ptr is not None:
        first_weight_ptr += skip
    mask = active & (at < whole)
    dz = gradient(first_ptr, at, mask, stride_col, target - skip, first_weight_ptr, m, row_gradient, SMOOTHED)
    tl.store(first_out_ptr + at, dz.to(out), mask=at < whole)
    if ODD:
        if start == 0:
            cols, mine = edges(tl.arange(0, 2 * GRANULE), n_cols, skip, whole, GRANULE)
            ends = gradient(row_ptr, cols, active & mine, 1, target, weight_ptr, m, row_gradient, SMOOTHED)
            tl.store(out_ptr + cols, ends.to(out), mask=mine)


@triton.jit
def forward_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    loss_ptr,  # [n_rows] out
    stats_ptr,  # [n_rows, 4] out: m, rest, sum_j w_j and z_y; or None
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    ignore_index,
    label_smoothing: tl.float64,
    SMOOTHED: tl.constexpr,  # whether label_smoothing is not 0
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # values in 16 bytes
    GRANULE: tl.constexpr,  # the same; or 1, for odd rows too: a load is as wide as Triton finds
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    eps, share = smoothing(label_smoothing, n_cols, acc)
    row = tl.program_id(0).to(tl.int64)
    target, active, valid = load_target(target_ptr, row, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + row * stride_row
    z_y = tl.load(row_ptr + target.to(tl.int64) * stride_col, mask=valid, other=0.0).to(acc)
    w_y = load_target_weight(weight_ptr, target, valid, acc)
    width = tl.where(active, n_cols, 0)
    m, rest, total, gap = sums_of_row(
        row_ptr, target, weight_ptr, width, stride_col, acc, SMOOTHED, THREADS, VECTOR, GRANULE
    )
    log_d, loss = loss_of_target(m, rest, z_y, (1.0 - eps) * w_y)
    if SMOOTHED:
        loss += share * (total * log_d + gap)
    tl.store(loss_ptr + row, tl.where(active, loss, 0.0).to(loss_ptr.dtype.element_ty))
    if stats_ptr is not None:
        tl.store(stats_ptr + row * 4, m)
        tl.store(stats_ptr + row * 4 + 1, rest)
        tl.store(stats_ptr + row * 4 + 2, total)
        tl.store(stats_ptr + row * 4 + 3, z_y)


@triton.jit
def step_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or None: no mean
    loss_ptr,  # [n_rows] out, or None
    dlogits_ptr,  # [n_rows, n_cols] out; its rows start in their granules where those of the logits do
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_out,
    ignore_index,
    label_smoothing: tl.float64,
    NORMS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    eps, share = smoothing(label_smoothing, n_cols, acc)
    row = tl.program_id(0).to(tl.int64)
    target, active, valid = load_target(target_ptr, row, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + row * stride_row
    z_y = tl.load(row_ptr + target.to(tl.int64) * stride_col, mask=valid, other=0.0).to(acc)
    w_y = load_target_weight(weight_ptr, target, valid, acc)
    width = tl.where(active, n_cols, 0)
    m, rest, total, gap = sums_of_row(
        row_ptr, target, weight_ptr, width, stride_col, acc, SMOOTHED, THREADS, VECTOR, 1 if ODD else GRANULE
    )
    log_d, loss = loss_of_target(m, rest, z_y, (1.0 - eps) * w_y)
    if SMOOTHED:
        loss += share * (total * log_d + gap)
    if loss_ptr is not None:
        tl.store(loss_ptr + row, tl.where(active, loss, 0.0).to(loss_ptr.dtype.element_ty))

    r = load_factor(None, 0, norm_ptr, row, active, NORMS, acc)
    row_gradient = gradient_of_row(r, rest, m, z_y, w_y, total, eps, share, active)
    m = tl.where(active, m, 0.0)
    out_ptr = dlogits_ptr + row * stride_out
    BLOCK: tl.constexpr = 4 * THREADS * VECTOR
    for start in range(0, n_cols, BLOCK):
        write_block(
            start,
            row_ptr,
            out_ptr,
            target,
            active,
            weight_ptr,
            n_cols,
            stride_col,
            m,
            row_gradient,
            SMOOTHED,
            BLOCK,
            GRANULE,
            ODD,
        )


@triton.jit
def backward_kernel(
    dloss_ptr,  # [n_rows], or one number with stride_dloss = 0
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or None: no mean
    stats_ptr,  # [n_rows, 4]; z_y too: where the gradient goes over the logits, another program may have written there
    dlogits_ptr,  # [n_rows, n_cols] out; its rows start in their granules where those of the logits do
    n_rows,
    n_cols,
    stride_dloss,
    stride_row,
    stride_col,
    stride_out,
    ignore_index,
    label_smoothing: tl.float64,
    NORMS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
):
    acc: tl.constexpr = stats_ptr.dtype.element_ty
    eps, share = smoothing(label_smoothing, n_cols, acc)
    row = tl.program_id(0).to(tl.int64)
    target, active, valid = load_target(target_ptr, row, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + row * stride_row
    w_y = load_target_weight(weight_ptr, target, valid, acc)
    m = tl.load(stats_ptr + row * 4, mask=active, other=0.0)
    rest = tl.load(stats_ptr + row * 4 + 1, mask=active, other=0.0)
    total = tl.load(stats_ptr + row * 4 + 2, mask=active, other=0.0)
    z_y = tl.load(stats_ptr + row * 4 + 3, mask=active, other=0.0)
    r = load_factor(dloss_ptr, stride_dloss, norm_ptr, row, active, NORMS, acc)
    row_gradient = gradient_of_row(r, rest, m, z_y, w_y, total, eps, share, active)
    write_block(
        tl.program_id(1) * BLOCK,
        row_ptr,
        dlogits_ptr + row * stride_out,
        target,
        active,
        weight_ptr,
        n_cols,
        stride_col,
        m,
        row_gradient,
        SMOOTHED,
        BLOCK,
        GRANULE,
        ODD,
    )

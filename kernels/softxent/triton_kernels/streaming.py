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
    behind,
    edges,
    exp,
    exp_for,
    finite_or_zero,
    first_granule,
    gradient_of_row,
    load_factor,
    load_sample_weight,
    load_target,
    load_target_weight,
    load_weights,
    logit_map,
    loss_of_target,
    moment_of,
    smoothing,
    store_stats,
    times_slope,
    weighed_gap,
    whole_granules,
)
from .handles import cached_launch

STATS = tl.constexpr(5)  # numbers that forward_kernel keeps of a row


@triton.jit
def lanes(THREADS: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr):
    """Columns that a program reads at a time [UNROLL, THREADS, VECTOR]: threads side by side, a vector each."""
    group = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR)
    return group + tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def sums_of_row(
    row_ptr,
    target,
    weight_ptr,
    outputs,
    extras,
    n_cols,  # 0 for a row that is not to be read
    stride_col,
    acc: tl.constexpr,
    MOMENT: tl.constexpr,  # whether to sum exp(z_j - m) * (m - z_j)
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    GRANULE: tl.constexpr,  # 1 for odd rows too: their loss must not depend on where in a granule they start
    UNROLL: tl.constexpr,
):
    """m, rest, the moment without the target's, sum_j w_j, sum_j w_j * (m - z_j), and the first class whose logit is m;
    each of the latter four only where it is wanted."""
    start_ptr = first_granule(row_ptr, 0, GRANULE)
    lane = lanes(THREADS, VECTOR, UNROLL)
    m = tl.full([THREADS], float("-inf"), acc)
    rest = tl.zeros([THREADS], acc)
    moment = tl.zeros([THREADS], acc)
    total = tl.zeros([THREADS], acc)
    gap = tl.zeros([THREADS], acc)
    best = tl.full([THREADS], 2147483647, tl.int32)
    last = n_cols // GRANULE * GRANULE
    for start in range(0, last, UNROLL * THREADS * VECTOR):
        at = start + lane
        mask = at < last
        if GRANULE == 1:
            x = tl.load(start_ptr + at.to(tl.int64) * stride_col, mask=mask, other=float("-inf"))
        else:
            x = tl.load(start_ptr + at, mask=mask, other=float("-inf"))
        z, _ = logit_map(x, mask, extras, acc)
        highest = tl.max(tl.max(z, 2), 0)
        m_new = tl.maximum(m, highest)
        shift = finite_or_zero(m_new)
        risen = tl.where(m == float("-inf"), 0.0, m_new - m)
        e = tl.where(at == target, 0.0, exp_for(z - shift[None, :, None], row_ptr.dtype.element_ty))
        less = exp(m - shift)
        if MOMENT:
            moment = less * (moment + risen * rest)
            moment += tl.sum(tl.sum(moment_of(e, shift[None, :, None] - z), 2), 0)
        rest = rest * less + tl.sum(tl.sum(e, 2), 0)
        if extras.label_smoothing is not None:
            w = load_weights(weight_ptr, at, mask, acc)
            gap += total * risen
            gap += tl.sum(tl.sum(weighed_gap(shift[None, :, None], z, w), 2), 0)
            total += tl.sum(tl.sum(w, 2), 0)
        if outputs.prediction is not None:
            hit = tl.where(z == highest[None, :, None], at, 2147483647)
            best = tl.where(highest > m, tl.min(tl.min(hit, 2), 0), best)
        m = m_new

    highest = tl.max(m, 0)
    shift = finite_or_zero(highest)
    less = exp(m - shift)
    risen = tl.where(m == float("-inf"), 0.0, shift - m)
    if MOMENT:
        moment = tl.sum(less * (moment + risen * rest), 0)
    else:
        moment = tl.zeros((), acc)
    rest = tl.sum(rest * less, 0)
    if extras.label_smoothing is not None:
        gap = tl.sum(gap + total * risen, 0)
        total = tl.sum(total, 0)
    else:
        gap = tl.zeros((), acc)
        total = tl.zeros((), acc) + n_cols
    return highest, rest, moment, total, gap, tl.min(tl.where(m == highest, best, 2147483647), 0)


@triton.jit
def loss_of_row(
    row,
    row_ptr,
    target,
    active,
    valid,
    weight_ptr,
    sample_weight_ptr,
    outputs,
    extras,
    n_rows,
    n_cols,
    stride_col,
    acc: tl.constexpr,
    MOMENT: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    GRANULE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Writes what is wanted of a row. Its m, rest, moment, sum_j w_j, and x_y, which the gradient may go over."""
    eps, share = smoothing(extras, n_cols, acc)
    x_y = tl.load(row_ptr + target.to(tl.int64) * stride_col, mask=valid, other=0.0).to(acc)
    z_y, _ = logit_map(x_y, None, extras, acc)
    w_y = load_target_weight(weight_ptr, target, valid, acc)
    width = tl.where(active, n_cols, 0)
    m, rest, moment, total, gap, best = sums_of_row(
        row_ptr,
        target,
        weight_ptr,
        outputs,
        extras,
        width,
        stride_col,
        acc,
        MOMENT,
        THREADS,
        VECTOR,
        GRANULE,
        UNROLL,
    )
    if MOMENT:
        moment += moment_of(exp(z_y - m), behind(m, z_y))
    d, log_d, loss = loss_of_target(m, rest, z_y, w_y, eps, extras)
    if extras.label_smoothing is not None:
        loss += share * (total * log_d + gap)
    loss = tl.where(active, loss * load_sample_weight(sample_weight_ptr, row, active, acc), 0.0)
    if outputs.loss is not None:
        tl.store(outputs.loss + row, loss.to(outputs.loss.dtype.element_ty))
    store_stats(outputs, row, row < n_rows, active, valid, m, d, log_d, z_y, moment, best)
    return m, rest, moment, total, x_y


@triton.jit
def gradient(row_ptr, cols, mask, stride_col, target, weight_ptr, m, row_gradient, extras, cotangents):
    """dlogits of columns of a row. row_gradient: as gradient_of_row has it."""
    scale, bend, smooth, at_target = row_gradient
    x = tl.load(row_ptr + cols.to(tl.int64) * stride_col, mask=mask, other=float("-inf"))
    z, slope = logit_map(x, mask, extras, m.dtype)
    e = exp_for(z - m, row_ptr.dtype.element_ty)
    dz = scale * e
    if cotangents.entropy is not None:
        dz += bend * moment_of(e, m - z)
    if extras.label_smoothing is not None:
        dz -= smooth * load_weights(weight_ptr, cols, mask, m.dtype)
    return tl.where(cols == target, at_target, times_slope(dz, slope, extras))


@triton.jit
def write_block(
    start,
    row_ptr,
    out_ptr,
    target,
    active,
    weight_ptr,
    extras,
    cotangents,
    n_cols,
    stride_col,
    m,
    row_gradient,
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
    target_at = target - skip
    dz = gradient(first_ptr, at, mask, stride_col, target_at, first_weight_ptr, m, row_gradient, extras, cotangents)
    tl.store(first_out_ptr + at, dz.to(out), mask=at < whole)
    if ODD:
        if start == 0:
            cols, mine = edges(tl.arange(0, 2 * GRANULE), n_cols, skip, whole, GRANULE)
            ends = gradient(row_ptr, cols, active & mine, 1, target, weight_ptr, m, row_gradient, extras, cotangents)
            tl.store(out_ptr + cols, ends.to(out), mask=mine)


@triton.jit
def gradient_from(
    m,
    rest,
    moment,
    total,
    x_y,
    row,
    target,
    valid,
    active,
    r,
    weight_ptr,
    n_cols,
    extras,
    cotangents,
    acc: tl.constexpr,
):
    """m where it can be subtracted, and the row's gradient as `gradient` wants it."""
    eps, share = smoothing(extras, n_cols, acc)
    z_y, slope_y = logit_map(x_y, None, extras, acc)
    w_y = load_target_weight(weight_ptr, target, valid, acc)
    scale, bend, smooth, at_target = gradient_of_row(
        r, m, rest, z_y, w_y, total, moment, eps, share, extras, cotangents, row, active
    )
    return tl.where(active, m, 0.0), (scale, bend, smooth, times_slope(at_target, slope_y, extras))


@cached_launch
@triton.jit
def forward_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    outputs,  # Outputs
    stats_ptr,  # [n_rows, STATS] out: m, rest, moment, sum_j w_j and x_y; or None
    extras,  # Extras
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    ignore_index,
    MOMENT: tl.constexpr,  # whether that is to be kept
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # values in 16 bytes
    GRANULE: tl.constexpr,  # the same; or 1, for odd rows too: a load is as wide as Triton finds
    UNROLL: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    target, active, valid = load_target(target_ptr, sample_weight_ptr, row, n_rows, n_cols, ignore_index)
    m, rest, moment, total, x_y = loss_of_row(
        row,
        logits_ptr + row * stride_row,
        target,
        active,
        valid,
        weight_ptr,
        sample_weight_ptr,
        outputs,
        extras,
        n_rows,
        n_cols,
        stride_col,
        acc,
        MOMENT or outputs.entropy is not None,
        THREADS,
        VECTOR,
        GRANULE,
        UNROLL,
    )
    if stats_ptr is not None:
        stats_ptr += row * STATS
        tl.store(stats_ptr, m)
        tl.store(stats_ptr + 1, rest)
        tl.store(stats_ptr + 2, moment)
        tl.store(stats_ptr + 3, total)
        tl.store(stats_ptr + 4, x_y)


@cached_launch
@triton.jit
def step_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents: none
    outputs,  # Outputs
    dlogits_ptr,  # [n_rows, n_cols] out; its rows start in their granules where those of the logits do
    extras,  # Extras
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_out,
    ignore_index,
    NORMS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    target, active, valid = load_target(target_ptr, sample_weight_ptr, row, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + row * stride_row
    m, rest, moment, total, x_y = loss_of_row(
        row,
        row_ptr,
        target,
        active,
        valid,
        weight_ptr,
        sample_weight_ptr,
        outputs,
        extras,
        n_rows,
        n_cols,
        stride_col,
        acc,
        outputs.entropy is not None,
        THREADS,
        VECTOR,
        1 if ODD else GRANULE,
        UNROLL,
    )
    r = load_factor(cotangents, 0, norm_ptr, sample_weight_ptr, row, active, NORMS, acc)
    m, row_gradient = gradient_from(
        m, rest, moment, total, x_y, row, target, valid, active, r, weight_ptr, n_cols, extras, cotangents, acc
    )
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
            extras,
            cotangents,
            n_cols,
            stride_col,
            m,
            row_gradient,
            BLOCK,
            GRANULE,
            ODD,
        )


@cached_launch
@triton.jit
def backward_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents
    stats_ptr,  # [n_rows, STATS]; x_y too: where the gradient goes over the logits, another program may have written it
    dlogits_ptr,  # [n_rows, n_cols] out; its rows start in their granules where those of the logits do
    extras,  # Extras
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_out,
    stride_dloss,
    ignore_index,
    NORMS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
):
    acc: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    target, active, valid = load_target(target_ptr, sample_weight_ptr, row, n_rows, n_cols, ignore_index)
    stats_ptr += row * STATS
    m = tl.load(stats_ptr, mask=active, other=0.0)
    rest = tl.load(stats_ptr + 1, mask=active, other=0.0)
    moment = tl.load(stats_ptr + 2, mask=active, other=0.0)
    total = tl.load(stats_ptr + 3, mask=active, other=0.0)
    x_y = tl.load(stats_ptr + 4, mask=active, other=0.0)
    r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, row, active, NORMS, acc)
    m, row_gradient = gradient_from(
        m, rest, moment, total, x_y, row, target, valid, active, r, weight_ptr, n_cols, extras, cotangents, acc
    )
    write_block(
        tl.program_id(1) * BLOCK,
        logits_ptr + row * stride_row,
        dlogits_ptr + row * stride_out,
        target,
        active,
        weight_ptr,
        extras,
        cotangents,
        n_cols,
        stride_col,
        m,
        row_gradient,
        BLOCK,
        GRANULE,
        ODD,
    )

"""A step against probabilities with whole rows on chip: a program reads its rows once, and writes their gradients once.

A thread holds a row of few classes, a program rows as wide as its registers hold; soft_target.py has the formula. What
belongs together is one argument, here and in soft_streams.py:

    formula   weight_ptr, eps, eps / n_cols, extras: what c_j is made of besides t_j
    pair      row_ptr, stride_col, target_row_ptr, stride_target_col: rows of logits, and their targets
    place     skip, at, cols, mask, written: columns, which lie at `at` counted from `skip`; those that are read, and
              those whose gradients are written
    sums      m, d, a
    factors   m, log d, and the factors of exp(z_j - m), of c_j, and of w_j * (log d + (m - z_j)), in the gradients
"""

# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .common import (
    exp_for,
    fixed_point,
    from_fixed_point,
    larger_or_nan,
    load_factor,
    load_sample_weight,
    load_weights,
    logit_map,
    reciprocal,
    scalar,
    smoothing,
    times_slope,
    weighed_gap,
)
from .few_classes import load_column_weight, load_columns, store_columns
from .handles import cached_launch
from .whole_row import columns, load_at, max_row, places, spread, store_at, sum_in_any_order, sum_row


@triton.jit
def counting(sample_weight_ptr, rows, n_rows):
    """Which rows there are, but for those of sample weight 0."""
    active = rows < n_rows
    if sample_weight_ptr is not None:
        active = active & (tl.load(sample_weight_ptr + rows, mask=active, other=0.0) != 0.0)
    return active


@triton.jit
def rows_at(ptr, rows, stride_row, GRANULE: tl.constexpr, ODD: tl.constexpr):
    """Where rows begin."""
    if not ODD:  # what Triton has to know to access granules at once
        stride_row = stride_row // GRANULE * GRANULE
    return ptr + rows * stride_row


@triton.jit
def smoothed(t, formula):
    _, eps, share, extras = formula
    if extras.label_smoothing is not None:
        t = (1.0 - eps) * t + share
    return t


@triton.jit
def coefficients(t, cols, mask, formula):
    """c_j of columns; 0 of those that are not there."""
    weight_ptr, _, _, extras = formula
    c = smoothed(t, formula)
    if weight_ptr is not None:
        c *= load_weights(weight_ptr, cols, mask, c.dtype)
    elif extras.label_smoothing is not None:
        c = tl.where(mask, c, 0.0)
    return c


@triton.jit
def write_loss(loss_ptr, sums, gap, sample_weight_ptr, rows, n_rows, active, extras, SUMMED: tl.constexpr):
    """gap: sum_j c_j * (m - z_j). SUMMED: whether one number is wanted of a program's rows."""
    m, d, a = sums
    if loss_ptr is not None:
        log_d = tl.log(d)
        loss = a * log_d + gap
        if extras.z_loss is not None:
            lse = m + log_d
            loss += scalar(extras.z_loss, loss.dtype) * lse * lse
        loss = tl.where(active, loss * load_sample_weight(sample_weight_ptr, rows, active, loss.dtype), 0.0)
        if SUMMED:
            tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(loss_ptr + rows, loss.to(loss_ptr.dtype.element_ty), mask=rows < n_rows)


@triton.jit
def gradient_factors(sums, r, active, formula):
    """`factors`: those that multiply are 0 for a row that does not count, and its m can be subtracted."""
    m, d, a = sums
    _, eps, _, extras = formula
    log_d = tl.log(d)
    if extras.z_loss is not None:
        a += 2.0 * scalar(extras.z_loss, a.dtype) * (m + log_d)
    of_p, of_c = tl.where(active, a * reciprocal(d) * r, 0.0), tl.where(active, r, 0.0)
    return tl.where(active, m, 0.0), log_d, of_p, of_c, of_c * (1.0 - eps)


@triton.jit
def load_pair(pair, place, GRANULE: tl.constexpr, GIVEN: tl.constexpr, BLOCK_M: tl.constexpr):
    """x, -inf where it is not to be read, and t, 0 there."""
    row_ptr, stride_col, target_row_ptr, stride_target_col = pair
    skip, at, _, mask, _ = place
    x = load_at(row_ptr, skip, at, mask, stride_col, float("-inf"), GRANULE, BLOCK_M)
    t = load_at(target_row_ptr, skip, at, mask, stride_target_col, 0.0, GIVEN, BLOCK_M)
    return x, t


@triton.jit
def write_gradients(
    x, t, place, dlogits_row_ptr, dtarget_row_ptr, formula, factors, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Of dlogits and dtarget either may be None, which Triton 3.6 takes neither in a tuple nor as a result."""
    skip, at, cols, mask, written = place
    weight_ptr, _, _, extras = formula
    m, log_d, of_p, of_c, of_gap = factors
    acc: tl.constexpr = m.dtype
    m = spread(m, BLOCK_M)
    z, slope = logit_map(x, mask, extras, acc)
    if dlogits_row_ptr is not None:
        c = coefficients(t.to(acc), cols, mask, formula)
        dz = spread(of_p, BLOCK_M) * exp_for(z - m, x.dtype) - spread(of_c, BLOCK_M) * c
        store_at(dlogits_row_ptr, skip, at, written, times_slope(dz, slope, extras), GRANULE, BLOCK_M)
    if dtarget_row_ptr is not None:
        dt = spread(of_gap, BLOCK_M) * (spread(log_d, BLOCK_M) + (m - z))
        if weight_ptr is not None:
            dt *= load_weights(weight_ptr, cols, mask, acc)
        store_at(dtarget_row_ptr, skip, at, written, tl.where(mask, dt, 0.0), GRANULE, BLOCK_M)


@cached_launch
@triton.jit
def few_step_kernel(
    logits_ptr,  # [n_rows, N_COLS]
    target_ptr,  # [n_rows, N_COLS]
    weight_ptr,  # [N_COLS], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # the mean's divisor, a number or [1], or None: no mean
    cotangents,  # Cotangents, of the loss alone
    loss_ptr,  # [n_rows] out, or with SUMMED one number a program; or None
    dlogits_ptr,  # [n_rows, N_COLS] out, rows contiguous, perhaps the logits; or None
    dtarget_ptr,  # [n_rows, N_COLS] out, rows contiguous; or None
    extras,  # Extras
    n_rows,
    stride_row,
    stride_col,
    stride_target_row,
    stride_target_col,
    stride_out,  # of dlogits
    stride_dtarget,
    stride_dloss,
    SUMMED: tl.constexpr,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # values in an access to logits and dlogits
    GIVEN: tl.constexpr,  # values in an access to target and dtarget
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    eps, share = smoothing(extras, N_COLS, acc)
    formula = weight_ptr, eps, share, extras
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    active = counting(sample_weight_ptr, rows, n_rows)
    x = load_columns(logits_ptr, rows, active, stride_row, stride_col, N_COLS, ROWS, WIDTH)
    t = load_columns(target_ptr, rows, active, stride_target_row, stride_target_col, N_COLS, ROWS, GIVEN)
    z = ()
    slope = ()
    c = ()
    for j in tl.static_range(N_COLS):
        z_j, slope_j = logit_map(x[j], None, extras, acc)
        z = z + (z_j,)  # noqa: RUF005
        slope = slope + (slope_j,)  # noqa: RUF005
        c_j = smoothed(t[j].to(acc), formula)
        if weight_ptr is not None:
            c_j *= load_column_weight(weight_ptr, j, acc)
        c = c + (c_j,)  # noqa: RUF005
    m = z[0]
    for j in tl.static_range(1, N_COLS):
        m = tl.maximum(m, z[j])
    d = tl.zeros_like(m)
    a = tl.zeros_like(m)
    gap = tl.zeros_like(m)
    e = ()
    for j in tl.static_range(N_COLS):
        e = e + (exp_for(z[j] - m, dtype),)  # noqa: RUF005
        d += e[j]
        a += c[j]
        gap += weighed_gap(m, z[j], c[j])
    if dlogits_ptr is not None or dtarget_ptr is not None:
        r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, rows, active, 0, acc)
        _, log_d, of_p, of_c, of_gap = gradient_factors((m, d, a), r, active, formula)
        if dtarget_ptr is not None:
            dt = ()
            for j in tl.static_range(N_COLS):
                g = of_gap * load_column_weight(weight_ptr, j, acc) * (log_d + (m - z[j]))
                dt = dt + (tl.where(active, g, 0.0),)  # noqa: RUF005
            store_columns(dtarget_ptr, rows, dt, rows < n_rows, stride_dtarget, N_COLS, ROWS, GIVEN)
        if dlogits_ptr is not None:
            dz = ()
            for j in tl.static_range(N_COLS):
                g = times_slope(of_p * e[j] - of_c * c[j], slope[j], extras)
                dz = dz + (tl.where(active, g, 0.0),)  # noqa: RUF005
            store_columns(dlogits_ptr, rows, dz, rows < n_rows, stride_out, N_COLS, ROWS, WIDTH)
    write_loss(loss_ptr, (m, d, a), gap, sample_weight_ptr, rows, n_rows, active, extras, SUMMED)


@cached_launch
@triton.jit
def step_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows, n_cols]
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # the mean's divisor, a number or [1], or None: no mean
    cotangents,  # Cotangents, of the loss alone
    loss_ptr,  # [n_rows] out, or with SUMMED one number a program; or None
    dlogits_ptr,  # [n_rows, n_cols] out, or None; its rows start in their granules where those of the logits do
    dtarget_ptr,  # [n_rows, n_cols] out, or None; likewise
    extras,  # Extras
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_target_row,
    stride_target_col,
    stride_out,
    stride_dtarget,
    stride_dloss,
    SUMMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least n_cols
    GRANULE: tl.constexpr,  # values in 16 bytes of logits; or 1: value by value
    ODD: tl.constexpr,  # whether rows start and end within a granule
    GIVEN: tl.constexpr,  # values in an access to the target: GRANULE, if its rows line up with the logits', or 1
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    eps, share = smoothing(extras, n_cols, acc)
    formula = weight_ptr, eps, share, extras
    if not ODD:
        n_cols = n_cols // GRANULE * GRANULE
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M
    if BLOCK_M > 1:
        rows += tl.arange(0, BLOCK_M)
    active = counting(sample_weight_ptr, rows, n_rows)
    row_ptr = rows_at(logits_ptr, rows, stride_row, GRANULE, ODD)
    pair = row_ptr, stride_col, rows_at(target_ptr, rows, stride_target_row, GIVEN, ODD), stride_target_col
    at = columns(BLOCK_M, BLOCK_N, 1024 // dtype.primitive_bitwidth)
    skip, written, edge_cols, edge_written = places(row_ptr, rows, n_rows, n_cols, BLOCK_M, at, GRANULE, ODD)
    cols = at
    if ODD:
        cols = at + spread(skip, BLOCK_M)
    mask = written & spread(active, BLOCK_M)
    place = skip, at, cols, mask, written
    x, t = load_pair(pair, place, GRANULE, GIVEN, BLOCK_M)
    z, _ = logit_map(x, mask, extras, acc)
    m = max_row(z, BLOCK_M, ODD)
    if ODD:
        edge_mask = edge_written & spread(active, BLOCK_M)
        edge_place = 0, edge_cols, edge_cols, edge_mask, edge_written
        x_edge, t_edge = load_pair(pair, edge_place, 1, 1, BLOCK_M)
        z_edge, _ = logit_map(x_edge, edge_mask, extras, acc)
        m = larger_or_nan(m, max_row(z_edge, BLOCK_M, True))
    shift = spread(m, BLOCK_M)
    e = exp_for(z - shift, dtype)
    c = coefficients(t.to(acc), cols, mask, formula)
    gaps = weighed_gap(shift, z, c)
    if ODD:
        e_edge = exp_for(z_edge - shift, dtype)
        c_edge = coefficients(t_edge.to(acc), edge_cols, edge_mask, formula)
        d = from_fixed_point(sum_row(fixed_point(e), BLOCK_M) + sum_row(fixed_point(e_edge), BLOCK_M))
        d += m - m  # NaN where there is no softmax: an integer is never
        a = sum_in_any_order(c, c_edge, BLOCK_M)
        gap = sum_in_any_order(gaps, weighed_gap(shift, z_edge, c_edge), BLOCK_M)
    else:
        d, a, gap = sum_row(e, BLOCK_M), sum_row(c, BLOCK_M), sum_row(gaps, BLOCK_M)
    sums = m, d, a
    write_loss(loss_ptr, sums, gap, sample_weight_ptr, rows, n_rows, active, extras, SUMMED and BLOCK_M > 1)
    if dlogits_ptr is not None or dtarget_ptr is not None:
        r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, rows, active, 0, acc)
        factors = gradient_factors(sums, r, active, formula)
        dz_ptr = dlogits_ptr
        dt_ptr = dtarget_ptr
        if dlogits_ptr is not None:
            dz_ptr = rows_at(dlogits_ptr, rows, stride_out, GRANULE, ODD)
        if dtarget_ptr is not None:
            dt_ptr = rows_at(dtarget_ptr, rows, stride_dtarget, GRANULE, ODD)
        write_gradients(x, t, place, dz_ptr, dt_ptr, formula, factors, GRANULE, BLOCK_M)
        if ODD:
            write_gradients(x_edge, t_edge, edge_place, dz_ptr, dt_ptr, formula, factors, 1, BLOCK_M)

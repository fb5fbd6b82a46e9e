"""Cross-entropy of rows of logits against rows of probabilities, reduced, and its gradients.

For one row x of n_cols logits with target row t, class weights w, label smoothing eps, z-loss zeta, and a factor r (its
sample weight, over n for the mean, times the incoming gradient), with c_j = w_j * ((1 - eps) * t_j + eps / n_cols) and
a = sum_j c_j (reference.py):

    z     = softcap * tanh(logit_scale * x / softcap)     or what is left of that
    m     = max_j z_j
    d     = sum_j exp(z_j - m)
    lse   = m + log d
    loss  = a * log d + sum_j c_j * (m - z_j) + zeta * lse^2        a class with c_j = 0 left out, whatever its logit
    dloss/dz_j = r * ((a + 2 * zeta * lse) * exp(z_j - m) / d - c_j)
    dloss/dt_j = r * (1 - eps) * w_j * (log d + (m - z_j))

The target need not sum to 1, nor be positive. As for class indices (row_loss.py) the gradients are written while a row
is on chip, in forward, but for reduction="none" and float16: a step reads logits and target once, and writes each
gradient once. A thread holds a row of few classes, a program rows as wide as its registers hold; wider rows are
streamed, read for the sums and again for the gradients. A row of sample weight 0 is not read.

Logits and dlogits are accessed in the same granules of 16 bytes (common.whole_granules), the target in as many values
at a time where its rows line up with those, and elsewhere value by value.
"""

# mypy: disable-error-code="assignment, misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from ..options import Inputs, Options, Stats
from .common import (
    Cotangents,
    edges,
    exp,
    exp_for,
    finite_or_zero,
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
    whole_granules,
)
from .few_classes import load_column_weight, load_columns, store_columns
from .row_loss import (
    NO_COTANGENTS,
    NO_STATS,
    device,
    gradient_like,
    in_forward,
    layout,
    numbers,
    reduced,
    scale_by,
    stream,
)
from .streaming import lanes
from .whole_row import columns, load_at, max_row, places, spread, store_at, sum_in_any_order, sum_row

Gradients = tuple[Tensor | None, Tensor | None]  # of logits and target, those that are wanted
HOLDS = launch.Holds(smoothing=True)  # in the sums of streamed rows: those of c are added up too
KEPT = tl.constexpr(3)  # numbers that stream_forward_kernel keeps of a row: m, d and a


@triton.jit
def counting(sample_weight_ptr, rows, n_rows):
    """Which rows there are, but for those of sample weight 0."""
    active = rows < n_rows
    if sample_weight_ptr is not None:
        active = active & (tl.load(sample_weight_ptr + rows, mask=active, other=0.0) != 0.0)
    return active


@triton.jit
def smoothed(t, eps, share, extras):
    if extras.label_smoothing is not None:
        t = (1.0 - eps) * t + share
    return t


@triton.jit
def coefficients(t, weight_ptr, cols, mask, eps, share, extras):
    """c_j of columns; 0 of those that are not there."""
    c = smoothed(t, eps, share, extras)
    if weight_ptr is not None:
        c *= load_weights(weight_ptr, cols, mask, c.dtype)
    elif extras.label_smoothing is not None:
        c = tl.where(mask, c, 0.0)
    return c


@triton.jit
def loss_of_sums(m, d, a, gap, sample_weight_ptr, rows, active, extras):
    """gap: sum_j c_j * (m - z_j)."""
    log_d = tl.log(d)
    loss = a * log_d + gap
    if extras.z_loss is not None:
        lse = m + log_d
        loss += scalar(extras.z_loss, loss.dtype) * lse * lse
    return tl.where(active, loss * load_sample_weight(sample_weight_ptr, rows, active, loss.dtype), 0.0)


@triton.jit
def gradient_factors(m, d, a, r, active, extras):
    """What of a row its gradients are made of: m where it can be subtracted, log d, and the factors of exp(z_j - m) and
    of c_j; those 0 for a row that does not count."""
    log_d = tl.log(d)
    if extras.z_loss is not None:
        a += 2.0 * scalar(extras.z_loss, a.dtype) * (m + log_d)
    return tl.where(active, m, 0.0), log_d, tl.where(active, a * reciprocal(d) * r, 0.0), tl.where(active, r, 0.0)


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
        c_j = smoothed(t[j].to(acc), eps, share, extras)
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
        _, log_d, of_p, of_c = gradient_factors(m, d, a, r, active, extras)
        if dtarget_ptr is not None:
            dt = ()
            for j in tl.static_range(N_COLS):
                g = of_c * (1.0 - eps) * load_column_weight(weight_ptr, j, acc) * (log_d + (m - z[j]))
                dt = dt + (tl.where(active, g, 0.0),)  # noqa: RUF005
            store_columns(dtarget_ptr, rows, dt, rows < n_rows, stride_dtarget, N_COLS, ROWS, GIVEN)
        if dlogits_ptr is not None:
            dz = ()
            for j in tl.static_range(N_COLS):
                g = times_slope(of_p * e[j] - of_c * c[j], slope[j], extras)
                dz = dz + (tl.where(active, g, 0.0),)  # noqa: RUF005
            store_columns(dlogits_ptr, rows, dz, rows < n_rows, stride_out, N_COLS, ROWS, WIDTH)
    if loss_ptr is not None:
        loss = loss_of_sums(m, d, a, gap, sample_weight_ptr, rows, active, extras)
        if SUMMED:
            tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(loss_ptr + rows, loss.to(loss_ptr.dtype.element_ty), mask=rows < n_rows)


@triton.jit
def write_gradients(
    x,  # logits, -inf where the mask is false
    t,  # target, 0 there
    skip,
    at,
    cols,
    mask,
    written,
    dlogits_row_ptr,
    dtarget_row_ptr,
    weight_ptr,
    eps,
    share,
    extras,
    factors,  # of gradient_factors
    acc: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The gradients of columns, which lie at `at`, counted from `skip`."""
    m, log_d, of_p, of_c = factors
    m = spread(m, BLOCK_M)
    z, slope = logit_map(x, mask, extras, acc)
    if dlogits_row_ptr is not None:
        c = coefficients(t.to(acc), weight_ptr, cols, mask, eps, share, extras)
        dz = spread(of_p, BLOCK_M) * exp_for(z - m, x.dtype) - spread(of_c, BLOCK_M) * c
        store_at(dlogits_row_ptr, skip, at, written, times_slope(dz, slope, extras), GRANULE, BLOCK_M)
    if dtarget_row_ptr is not None:
        dt = spread(of_c * (1.0 - eps), BLOCK_M) * (spread(log_d, BLOCK_M) + (m - z))
        if weight_ptr is not None:
            dt *= load_weights(weight_ptr, cols, mask, acc)
        store_at(dtarget_row_ptr, skip, at, written, tl.where(mask, dt, 0.0), GRANULE, BLOCK_M)


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
    if not ODD:  # what Triton has to know to access granules at once
        n_cols = n_cols // GRANULE * GRANULE
        stride_row = stride_row // GRANULE * GRANULE
        stride_target_row = stride_target_row // GIVEN * GIVEN
        stride_out, stride_dtarget = stride_out // GRANULE * GRANULE, stride_dtarget // GRANULE * GRANULE
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M
    if BLOCK_M > 1:
        rows += tl.arange(0, BLOCK_M)
    active = counting(sample_weight_ptr, rows, n_rows)
    row_ptr, target_row_ptr = logits_ptr + rows * stride_row, target_ptr + rows * stride_target_row
    at = columns(BLOCK_M, BLOCK_N, 1024 // dtype.primitive_bitwidth)
    skip, written, edge_cols, edge_written = places(row_ptr, rows, n_rows, n_cols, BLOCK_M, at, GRANULE, ODD)
    cols = at
    if ODD:
        cols = at + spread(skip, BLOCK_M)
    mask = written & spread(active, BLOCK_M)
    x = load_at(row_ptr, skip, at, mask, stride_col, float("-inf"), GRANULE, BLOCK_M)
    t = load_at(target_row_ptr, skip, at, mask, stride_target_col, 0.0, GIVEN, BLOCK_M)
    z, _ = logit_map(x, mask, extras, acc)
    m = max_row(z, BLOCK_M, ODD)
    if ODD:
        edge_mask = edge_written & spread(active, BLOCK_M)
        x_edge = load_at(row_ptr, 0, edge_cols, edge_mask, stride_col, float("-inf"), 1, BLOCK_M)
        t_edge = load_at(target_row_ptr, 0, edge_cols, edge_mask, stride_target_col, 0.0, 1, BLOCK_M)
        z_edge, _ = logit_map(x_edge, edge_mask, extras, acc)
        m = larger_or_nan(m, max_row(z_edge, BLOCK_M, True))
    shift = spread(m, BLOCK_M)
    e = exp_for(z - shift, dtype)
    c = coefficients(t.to(acc), weight_ptr, cols, mask, eps, share, extras)
    gaps = weighed_gap(shift, z, c)
    if ODD:
        e_edge = exp_for(z_edge - shift, dtype)
        c_edge = coefficients(t_edge.to(acc), weight_ptr, edge_cols, edge_mask, eps, share, extras)
        d = from_fixed_point(sum_row(fixed_point(e), BLOCK_M) + sum_row(fixed_point(e_edge), BLOCK_M))
        d += m - m  # NaN where there is no softmax: an integer is never
        a = sum_in_any_order(c, c_edge, BLOCK_M)
        gap = sum_in_any_order(gaps, weighed_gap(shift, z_edge, c_edge), BLOCK_M)
    else:
        d, a, gap = sum_row(e, BLOCK_M), sum_row(c, BLOCK_M), sum_row(gaps, BLOCK_M)
    loss = loss_of_sums(m, d, a, gap, sample_weight_ptr, rows, active, extras)
    if loss_ptr is not None:
        if SUMMED and BLOCK_M > 1:
            tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(loss_ptr + rows, loss.to(loss_ptr.dtype.element_ty), mask=rows < n_rows)
    if dlogits_ptr is not None or dtarget_ptr is not None:
        r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, rows, active, 0, acc)
        factors = gradient_factors(m, d, a, r, active, extras)
        if dlogits_ptr is not None:
            dlogits_ptr += rows * stride_out
        if dtarget_ptr is not None:
            dtarget_ptr += rows * stride_dtarget
        write_gradients(
            x,
            t,
            skip,
            at,
            cols,
            mask,
            written,
            dlogits_ptr,
            dtarget_ptr,
            weight_ptr,
            eps,
            share,
            extras,
            factors,
            acc,
            GRANULE,
            BLOCK_M,
        )
        if ODD:
            write_gradients(
                x_edge,
                t_edge,
                0,
                edge_cols,
                edge_cols,
                edge_mask,
                edge_written,
                dlogits_ptr,
                dtarget_ptr,
                weight_ptr,
                eps,
                share,
                extras,
                factors,
                acc,
                1,
                BLOCK_M,
            )


@triton.jit
def sums_of_row(
    row_ptr,
    target_row_ptr,
    weight_ptr,
    eps,
    share,
    extras,
    n_cols,  # 0 for a row that is not to be read
    stride_col,
    stride_target_col,
    acc: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    GRANULE: tl.constexpr,  # 1 for odd rows too: their bits must not depend on where in a granule they start
    GIVEN: tl.constexpr,
):
    """m, d, a, and sum_j c_j * (m - z_j)."""
    lane = lanes(THREADS, VECTOR, UNROLL)
    m = tl.full([THREADS], float("-inf"), acc)
    d = tl.zeros([THREADS], acc)
    a = tl.zeros([THREADS], acc)
    gap = tl.zeros([THREADS], acc)
    last = n_cols // GRANULE * GRANULE
    for start in range(0, last, UNROLL * THREADS * VECTOR):
        at = start + lane
        mask = at < last
        x = load_at(row_ptr, 0, at, mask, stride_col, float("-inf"), GRANULE, 1)
        t = load_at(target_row_ptr, 0, at, mask, stride_target_col, 0.0, GIVEN, 1)
        z, _ = logit_map(x, mask, extras, acc)
        c = coefficients(t.to(acc), weight_ptr, at, mask, eps, share, extras)
        m_new = tl.maximum(m, tl.max(tl.max(z, 2), 0))
        shift = finite_or_zero(m_new)
        gap += a * tl.where(m == float("-inf"), 0.0, m_new - m)
        gap += tl.sum(tl.sum(weighed_gap(shift[None, :, None], z, c), 2), 0)
        a += tl.sum(tl.sum(c, 2), 0)
        e = exp_for(z - shift[None, :, None], row_ptr.dtype.element_ty)
        d = d * exp(m - shift) + tl.sum(tl.sum(e, 2), 0)
        m = m_new
    highest = tl.max(m, 0)
    shift = finite_or_zero(highest)
    gap = tl.sum(gap + a * tl.where(m == float("-inf"), 0.0, shift - m), 0)
    d = tl.sum(d * exp(m - shift), 0) + (highest - highest)  # NaN where there is no softmax
    return highest, d, tl.sum(a, 0), gap


@triton.jit
def loss_of_row(
    row,
    row_ptr,
    target_row_ptr,
    active,
    weight_ptr,
    sample_weight_ptr,
    loss_ptr,
    eps,
    share,
    extras,
    n_cols,
    stride_col,
    stride_target_col,
    acc: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    GRANULE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Writes the loss of a row, if it is wanted. Its m, d and a."""
    m, d, a, gap = sums_of_row(
        row_ptr,
        target_row_ptr,
        weight_ptr,
        eps,
        share,
        extras,
        tl.where(active, n_cols, 0),
        stride_col,
        stride_target_col,
        acc,
        THREADS,
        VECTOR,
        UNROLL,
        GRANULE,
        GIVEN,
    )
    if loss_ptr is not None:
        loss = loss_of_sums(m, d, a, gap, sample_weight_ptr, row, active, extras)
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))
    return m, d, a


@triton.jit
def write_block(
    start,
    row_ptr,
    target_row_ptr,
    dlogits_row_ptr,
    dtarget_row_ptr,
    active,
    weight_ptr,
    eps,
    share,
    extras,
    factors,
    n_cols,
    stride_col,
    stride_target_col,
    acc: tl.constexpr,
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """The gradients of the BLOCK columns that follow `start`, counted from the row's first whole granule."""
    skip, whole = whole_granules(row_ptr, n_cols, GRANULE, ODD)
    at = start + tl.arange(0, BLOCK)
    mask = active & (at < whole)
    x = load_at(row_ptr, skip, at, mask, stride_col, float("-inf"), GRANULE, 1)
    t = load_at(target_row_ptr, skip, at, mask, stride_target_col, 0.0, GIVEN, 1)
    write_gradients(
        x,
        t,
        skip,
        at,
        at + skip,
        mask,
        at < whole,
        dlogits_row_ptr,
        dtarget_row_ptr,
        weight_ptr,
        eps,
        share,
        extras,
        factors,
        acc,
        GRANULE,
        1,
    )
    if ODD:
        if start == 0:
            cols, mine = edges(tl.arange(0, 2 * GRANULE), n_cols, skip, whole, GRANULE)
            ends = active & mine
            x_ends = load_at(row_ptr, 0, cols, ends, stride_col, float("-inf"), 1, 1)
            t_ends = load_at(target_row_ptr, 0, cols, ends, stride_target_col, 0.0, 1, 1)
            write_gradients(
                x_ends,
                t_ends,
                0,
                cols,
                cols,
                ends,
                mine,
                dlogits_row_ptr,
                dtarget_row_ptr,
                weight_ptr,
                eps,
                share,
                extras,
                factors,
                acc,
                1,
                1,
            )


@triton.jit
def stream_forward_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows, n_cols]
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    loss_ptr,  # [n_rows] out, or None
    kept_ptr,  # [n_rows, KEPT] out, or None
    extras,  # Extras
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_target_row,
    stride_target_col,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # values in 16 bytes
    UNROLL: tl.constexpr,
    GRANULE: tl.constexpr,  # as of step_kernel
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    eps, share = smoothing(extras, n_cols, acc)
    if not ODD:  # what Triton has to know to access granules at once
        stride_row, stride_target_row = stride_row // GRANULE * GRANULE, stride_target_row // GIVEN * GIVEN
    row = tl.program_id(0).to(tl.int64)
    m, d, a = loss_of_row(
        row,
        logits_ptr + row * stride_row,
        target_ptr + row * stride_target_row,
        counting(sample_weight_ptr, row, n_rows),
        weight_ptr,
        sample_weight_ptr,
        loss_ptr,
        eps,
        share,
        extras,
        n_cols,
        stride_col,
        stride_target_col,
        acc,
        THREADS,
        VECTOR,
        UNROLL,
        1 if ODD else GRANULE,
        1 if ODD else GIVEN,
    )
    if kept_ptr is not None:
        kept_ptr += row * KEPT
        tl.store(kept_ptr, m)
        tl.store(kept_ptr + 1, d)
        tl.store(kept_ptr + 2, a)


@triton.jit
def stream_step_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows, n_cols]
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # the mean's divisor, a number or [1], or None: no mean
    cotangents,  # Cotangents: none
    loss_ptr,  # [n_rows] out, or None
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
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # values in 16 bytes
    UNROLL: tl.constexpr,
    GRANULE: tl.constexpr,  # as of step_kernel
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    eps, share = smoothing(extras, n_cols, acc)
    if not ODD:  # what Triton has to know to access granules at once
        stride_row, stride_target_row = stride_row // GRANULE * GRANULE, stride_target_row // GIVEN * GIVEN
        stride_out, stride_dtarget = stride_out // GRANULE * GRANULE, stride_dtarget // GRANULE * GRANULE
    row = tl.program_id(0).to(tl.int64)
    active = counting(sample_weight_ptr, row, n_rows)
    row_ptr, target_row_ptr = logits_ptr + row * stride_row, target_ptr + row * stride_target_row
    m, d, a = loss_of_row(
        row,
        row_ptr,
        target_row_ptr,
        active,
        weight_ptr,
        sample_weight_ptr,
        loss_ptr,
        eps,
        share,
        extras,
        n_cols,
        stride_col,
        stride_target_col,
        acc,
        THREADS,
        VECTOR,
        UNROLL,
        1 if ODD else GRANULE,
        1 if ODD else GIVEN,
    )
    r = load_factor(cotangents, 0, norm_ptr, sample_weight_ptr, row, active, 0, acc)
    factors = gradient_factors(m, d, a, r, active, extras)
    if dlogits_ptr is not None:
        dlogits_ptr += row * stride_out
    if dtarget_ptr is not None:
        dtarget_ptr += row * stride_dtarget
    BLOCK: tl.constexpr = 2 * THREADS * VECTOR
    for start in range(0, n_cols, BLOCK):
        write_block(
            start,
            row_ptr,
            target_row_ptr,
            dlogits_ptr,
            dtarget_ptr,
            active,
            weight_ptr,
            eps,
            share,
            extras,
            factors,
            n_cols,
            stride_col,
            stride_target_col,
            acc,
            BLOCK,
            GRANULE,
            ODD,
            GIVEN,
        )


@triton.jit
def stream_backward_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows, n_cols]
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # the mean's divisor, a number or [1], or None: no mean
    cotangents,  # Cotangents, of the loss alone
    kept_ptr,  # [n_rows, KEPT] of stream_forward_kernel
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
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,  # as of step_kernel
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    acc: tl.constexpr = kept_ptr.dtype.element_ty
    eps, share = smoothing(extras, n_cols, acc)
    if not ODD:  # what Triton has to know to access granules at once
        stride_row, stride_target_row = stride_row // GRANULE * GRANULE, stride_target_row // GIVEN * GIVEN
        stride_out, stride_dtarget = stride_out // GRANULE * GRANULE, stride_dtarget // GRANULE * GRANULE
    row = tl.program_id(0).to(tl.int64)
    active = counting(sample_weight_ptr, row, n_rows)
    kept_ptr += row * KEPT
    m, d, a = tl.load(kept_ptr), tl.load(kept_ptr + 1), tl.load(kept_ptr + 2)
    r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, row, active, 0, acc)
    if dlogits_ptr is not None:
        dlogits_ptr += row * stride_out
    if dtarget_ptr is not None:
        dtarget_ptr += row * stride_dtarget
    write_block(
        tl.program_id(1) * BLOCK,
        logits_ptr + row * stride_row,
        target_ptr + row * stride_target_row,
        dlogits_ptr,
        dtarget_ptr,
        active,
        weight_ptr,
        eps,
        share,
        extras,
        gradient_factors(m, d, a, r, active, extras),
        n_cols,
        stride_col,
        stride_target_col,
        acc,
        BLOCK,
        GRANULE,
        ODD,
        GIVEN,
    )


def forward(
    inputs: Inputs, options: Options, dtype: torch.dtype, needs_grad: bool, inplace: bool, wanted: frozenset[str]
) -> tuple[Tensor, Stats, list[Any]]:
    """The loss in `dtype`, no stats, and what `backward` wants: the gradients, and what was kept of streamed rows."""
    inputs = _with_vectors(inputs)
    logits, target, reduction = inputs.logits, inputs.target, options.reduction
    acc = torch.promote_types(logits.dtype, torch.float32)
    now = needs_grad and _at_once(inputs, reduction, target.requires_grad)
    made = _empty_gradients(inputs, inplace, logits.requires_grad, target.requires_grad) if now else (None, None)
    loss: Tensor = logits.new_empty(len(logits), dtype=acc if reduction != "none" else dtype)
    kept = None
    with on_device_of(logits):
        if not _streams(inputs, options):
            loss = _step(inputs, options, NO_COTANGENTS, loss, made, summed=reduction != "none")
        elif now:
            _stream_step(inputs, options, loss, made)
        else:
            kept = logits.new_empty(len(logits), KEPT.value, dtype=acc) if needs_grad else None
            _stream_forward(inputs, options, loss, kept)
        if reduction != "none":
            loss = reduced(loss, _norm(inputs, options), 0, dtype)
    return loss, NO_STATS, [*made, kept]


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    inputs: Inputs,
    options: Options,
    kept: list[Any],
    inplace: bool,
    needs_dlogits: bool,
    needs_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logits and target that are wanted, each in its dtype: those that `forward` left, if they are
    still there."""
    found, kept_rows, kept[:2] = (kept[0], kept[1]), kept[2], (None, None)
    inputs = _with_vectors(inputs)
    logits = inputs.logits
    acc = torch.promote_types(logits.dtype, torch.float32)
    at_once = _at_once(inputs, options.reduction, needs_dtarget)  # the same bits as in forward
    with on_device_of(logits):
        if found[0] is None and found[1] is None:
            found = _empty_gradients(inputs, inplace, needs_dlogits, needs_dtarget)
            cotangents = NO_COTANGENTS if at_once else NO_COTANGENTS._replace(loss=dloss)
            if not _streams(inputs, options):
                _step(inputs, options, cotangents, None, found, summed=False)
            elif at_once:
                _stream_step(inputs, options, None, found)
            else:
                if kept_rows is None:
                    kept_rows = logits.new_empty(len(logits), KEPT.value, dtype=acc)
                    _stream_forward(inputs, options, None, kept_rows)
                _stream_backward(inputs, options, cotangents, kept_rows, found)
        dlogits, dtarget = found[0] if needs_dlogits else None, found[1] if needs_dtarget else None
        if at_once and dlogits is not None:
            scale_by(dlogits, dloss, acc, inplace)
        if at_once and dtarget is not None:
            scale_by(dtarget, dloss, acc, False)
    return dlogits, dtarget


def _with_vectors(inputs: Inputs) -> Inputs:
    """With vectors that the kernels can index."""
    weight, sample_weight = (None if x is None else x.contiguous() for x in (inputs.weight, inputs.sample_weight))
    return inputs._replace(weight=weight, sample_weight=sample_weight)


def _at_once(inputs: Inputs, reduction: str, needs_dtarget: bool) -> bool:
    """Whether the gradients are made in forward: which dtarget waits for, dlogits does too."""
    return in_forward(inputs.logits, reduction) and not (needs_dtarget and inputs.target.dtype == torch.float16)


def _empty_gradients(inputs: Inputs, inplace: bool, needs_dlogits: bool, needs_dtarget: bool) -> Gradients:
    logits, target = inputs.logits, inputs.target
    dlogits = gradient_like(logits, inplace) if needs_dlogits else None
    return dlogits, gradient_like(logits, False, target.dtype) if needs_dtarget else None


def _norm(inputs: Inputs, options: Options) -> Tensor | int | None:
    """What the mean divides by."""
    if options.reduction != "mean":
        return None
    return len(inputs.logits) if inputs.normalizer is None else inputs.normalizer


def _tile(inputs: Inputs, options: Options) -> launch.Whole | None:
    """The tile for rows that are held; None: they are streamed."""
    weighed = inputs.weight is not None or options.label_smoothing != 0
    holds = launch.Holds(smoothing=weighed, softcap=options.softcap is not None)
    lines_up = _access(inputs)["GIVEN"] > 1
    return launch.soft_target(*layout(inputs.logits), inputs.target.itemsize, lines_up, holds, device())


def _access(inputs: Inputs) -> dict[str, Any]:
    granule, odd = launch.access(*layout(inputs.logits))
    lines_up = launch.lines_up(layout(inputs.target), layout(inputs.logits), granule)
    return {"GRANULE": granule, "ODD": odd, "GIVEN": granule if lines_up else 1}


def _streams(inputs: Inputs, options: Options) -> bool:
    return inputs.logits.shape[1] > launch.FEW and _tile(inputs, options) is None


def _strides(inputs: Inputs, gradients: Gradients) -> tuple[int, ...]:
    out = (0 if gradient is None else gradient.stride(0) for gradient in gradients)
    return *inputs.logits.stride(), *inputs.target.stride(), *out


def _step(
    inputs: Inputs, options: Options, cotangents: Cotangents, loss: Tensor | None, gradients: Gradients, summed: bool
) -> Any:
    """Rows that a thread or a program holds. Returns what was written of the loss: its rows, or with `summed` sums."""
    logits, target = inputs.logits, inputs.target
    n_rows, n_cols = logits.shape
    dloss = cotangents.loss
    stride_dloss = dloss.stride(0) if dloss is not None and dloss.dim() else 0
    tensors = *inputs[:4], _norm(inputs, options), cotangents, loss, *gradients, numbers(inputs, options)
    strides = *_strides(inputs, gradients), stride_dloss
    common: dict[str, Any] = {"SUMMED": summed, **launch.OPTIONS}
    if n_cols <= launch.FEW:
        programs = launch.cdiv(n_rows, launch.ROWS)
        few_step_kernel[(programs,)](
            *tensors,
            n_rows,
            *strides,
            N_COLS=n_cols,
            ROWS=launch.ROWS,
            WIDTH=launch.vector(*layout(logits)),
            GIVEN=launch.vector(*layout(target)),
            num_warps=launch.ROWS // device().warp_size,
            **common,
        )
    else:
        tile = _tile(inputs, options)
        assert tile is not None
        programs = launch.cdiv(n_rows, tile.block_m)
        step_kernel[(programs,)](
            *tensors,
            n_rows,
            n_cols,
            *strides,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **_access(inputs),
            **common,
        )
    return loss[:programs] if loss is not None and summed else loss


def _stream_forward(inputs: Inputs, options: Options, loss: Tensor | None, kept: Tensor | None) -> None:
    logits = inputs.logits
    stream_forward_kernel[(len(logits),)](
        *inputs[:4],
        loss,
        kept,
        numbers(inputs, options),
        *logits.shape,
        *logits.stride(),
        *inputs.target.stride(),
        **_access(inputs),
        **stream(logits.itemsize, HOLDS),
    )


def _stream_step(inputs: Inputs, options: Options, loss: Tensor | None, gradients: Gradients) -> None:
    logits = inputs.logits
    stream_step_kernel[(len(logits),)](
        *inputs[:4],
        _norm(inputs, options),
        NO_COTANGENTS,
        loss,
        *gradients,
        numbers(inputs, options),
        *logits.shape,
        *_strides(inputs, gradients),
        **_access(inputs),
        **stream(logits.itemsize, HOLDS),
    )


def _stream_backward(
    inputs: Inputs, options: Options, cotangents: Cotangents, kept: Tensor, gradients: Gradients
) -> None:
    logits = inputs.logits
    num_warps, block = launch.STREAM[logits.itemsize]
    stream_backward_kernel[(len(logits), launch.cdiv(logits.shape[1], block // 2))](
        *inputs[:4],
        _norm(inputs, options),
        cotangents,
        kept,
        *gradients,
        numbers(inputs, options),
        *logits.shape,
        *_strides(inputs, gradients),
        cotangents.loss.stride(0) if cotangents.loss.dim() else 0,
        BLOCK=block // 2,
        num_warps=num_warps,
        **_access(inputs),
        **launch.OPTIONS,
    )

"""Against probabilities, rows wider than a program holds: a running maximum and sums for each thread, as streaming.py.

soft_target.py has the formula, soft_rows.py what the arguments are.

    forward_kernel     reads logits and target once
    step_kernel        reads them twice and writes the gradients; the second time from the cache, as far as that goes
    backward_kernel    reads them once and writes the gradients, from what forward_kernel kept of each row
"""

# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .common import (
    edges,
    exp,
    exp_for,
    finite_or_zero,
    load_factor,
    logit_map,
    smoothing,
    weighed_gap,
    whole_granules,
)
from .handles import cached_launch
from .soft_rows import coefficients, counting, gradient_factors, load_pair, rows_at, write_gradients, write_loss
from .streaming import lanes

KEPT = tl.constexpr(3)  # numbers that forward_kernel keeps of a row: m, d and a


@triton.jit
def sums_of_row(
    pair,
    formula,
    n_cols,  # 0 for a row that is not to be read
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    GRANULE: tl.constexpr,  # 1 for odd rows too: their bits must not depend on where in a granule they start
    GIVEN: tl.constexpr,
):
    """m, d, a, and sum_j c_j * (m - z_j)."""
    _, eps, _, extras = formula
    acc: tl.constexpr = eps.dtype
    lane = lanes(THREADS, VECTOR, UNROLL)
    m = tl.full([THREADS], float("-inf"), acc)
    d = tl.zeros([THREADS], acc)
    a = tl.zeros([THREADS], acc)
    gap = tl.zeros([THREADS], acc)
    last = n_cols // GRANULE * GRANULE
    for start in range(0, last, UNROLL * THREADS * VECTOR):
        at = start + lane
        mask = at < last
        x, t = load_pair(pair, (0, at, at, mask, mask), GRANULE, GIVEN, 1)
        z, _slope = logit_map(x, mask, extras, acc)
        c = coefficients(t.to(acc), at, mask, formula)
        m_new = tl.maximum(m, tl.max(tl.max(z, 2), 0))
        shift = finite_or_zero(m_new)
        gap += a * tl.where(m == float("-inf"), 0.0, m_new - m)
        gap += tl.sum(tl.sum(weighed_gap(shift[None, :, None], z, c), 2), 0)
        a += tl.sum(tl.sum(c, 2), 0)
        e = exp_for(z - shift[None, :, None], x.dtype)
        d = d * exp(m - shift) + tl.sum(tl.sum(e, 2), 0)
        m = m_new
    highest = tl.max(m, 0)
    gap = tl.sum(gap + a * tl.where(m == float("-inf"), 0.0, highest - m), 0)
    d = tl.sum(d * exp(m - highest), 0)  # NaN where there is no softmax: -inf - -inf
    return highest, d, tl.sum(a, 0), gap


@triton.jit
def write_block(
    start,
    pair,
    dz_ptr,
    dt_ptr,
    formula,
    factors,
    active,
    n_cols,
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """The gradients of the BLOCK columns that follow `start`, counted from the row's first whole granule."""
    skip, whole = whole_granules(pair[0], n_cols, GRANULE, ODD)
    at = start + tl.arange(0, BLOCK)
    place = skip, at, at + skip, active & (at < whole), at < whole
    x, t = load_pair(pair, place, GRANULE, GIVEN, 1)
    write_gradients(x, t, place, dz_ptr, dt_ptr, formula, factors, GRANULE, 1)
    if ODD:
        if start == 0:
            cols, mine = edges(tl.arange(0, 2 * GRANULE), n_cols, skip, whole, GRANULE)
            ends = 0, cols, cols, active & mine, mine
            x_ends, t_ends = load_pair(pair, ends, 1, 1, 1)
            write_gradients(x_ends, t_ends, ends, dz_ptr, dt_ptr, formula, factors, 1, 1)


@cached_launch
@triton.jit
def forward_kernel(
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
    GRANULE: tl.constexpr,  # as of soft_rows.step_kernel
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    eps, share = smoothing(extras, n_cols, acc)
    formula = weight_ptr, eps, share, extras
    row = tl.program_id(0).to(tl.int64)
    active = counting(sample_weight_ptr, row, n_rows)
    row_ptr = rows_at(logits_ptr, row, stride_row, GRANULE, ODD)
    pair = row_ptr, stride_col, rows_at(target_ptr, row, stride_target_row, GIVEN, ODD), stride_target_col
    width = tl.where(active, n_cols, 0)
    granule: tl.constexpr = 1 if ODD else GRANULE
    m, d, a, gap = sums_of_row(pair, formula, width, THREADS, VECTOR, UNROLL, granule, 1 if ODD else GIVEN)
    write_loss(loss_ptr, (m, d, a), gap, sample_weight_ptr, row, n_rows, active, extras, False)
    if kept_ptr is not None:
        kept_ptr += row * KEPT
        tl.store(kept_ptr, m)
        tl.store(kept_ptr + 1, d)
        tl.store(kept_ptr + 2, a)


@cached_launch
@triton.jit
def step_kernel(
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
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    eps, share = smoothing(extras, n_cols, acc)
    formula = weight_ptr, eps, share, extras
    row = tl.program_id(0).to(tl.int64)
    active = counting(sample_weight_ptr, row, n_rows)
    row_ptr = rows_at(logits_ptr, row, stride_row, GRANULE, ODD)
    pair = row_ptr, stride_col, rows_at(target_ptr, row, stride_target_row, GIVEN, ODD), stride_target_col
    width = tl.where(active, n_cols, 0)
    granule: tl.constexpr = 1 if ODD else GRANULE
    m, d, a, gap = sums_of_row(pair, formula, width, THREADS, VECTOR, UNROLL, granule, 1 if ODD else GIVEN)
    write_loss(loss_ptr, (m, d, a), gap, sample_weight_ptr, row, n_rows, active, extras, False)
    r = load_factor(cotangents, 0, norm_ptr, sample_weight_ptr, row, active, 0, acc)
    factors = gradient_factors((m, d, a), r, active, formula)
    dz_ptr = dlogits_ptr
    dt_ptr = dtarget_ptr
    if dlogits_ptr is not None:
        dz_ptr = rows_at(dlogits_ptr, row, stride_out, GRANULE, ODD)
    if dtarget_ptr is not None:
        dt_ptr = rows_at(dtarget_ptr, row, stride_dtarget, GRANULE, ODD)
    FEWER: tl.constexpr = acc == tl.float64 and extras.softcap is not None  # or it would spill
    BLOCK: tl.constexpr = (1 if FEWER else 2) * THREADS * VECTOR
    for start in range(0, n_cols, BLOCK):
        write_block(start, pair, dz_ptr, dt_ptr, formula, factors, active, n_cols, BLOCK, GRANULE, ODD, GIVEN)


@cached_launch
@triton.jit
def backward_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows, n_cols]
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # the mean's divisor, a number or [1], or None: no mean
    cotangents,  # Cotangents, of the loss alone
    kept_ptr,  # [n_rows, KEPT] of forward_kernel
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
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    acc: tl.constexpr = kept_ptr.dtype.element_ty
    eps, share = smoothing(extras, n_cols, acc)
    formula = weight_ptr, eps, share, extras
    row = tl.program_id(0).to(tl.int64)
    active = counting(sample_weight_ptr, row, n_rows)
    row_ptr = rows_at(logits_ptr, row, stride_row, GRANULE, ODD)
    pair = row_ptr, stride_col, rows_at(target_ptr, row, stride_target_row, GIVEN, ODD), stride_target_col
    kept_ptr += row * KEPT
    sums = tl.load(kept_ptr), tl.load(kept_ptr + 1), tl.load(kept_ptr + 2)
    r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, row, active, 0, acc)
    factors = gradient_factors(sums, r, active, formula)
    dz_ptr = dlogits_ptr
    dt_ptr = dtarget_ptr
    if dlogits_ptr is not None:
        dz_ptr = rows_at(dlogits_ptr, row, stride_out, GRANULE, ODD)
    if dtarget_ptr is not None:
        dt_ptr = rows_at(dtarget_ptr, row, stride_dtarget, GRANULE, ODD)
    start = tl.program_id(1) * BLOCK
    write_block(start, pair, dz_ptr, dt_ptr, formula, factors, active, n_cols, BLOCK, GRANULE, ODD, GIVEN)

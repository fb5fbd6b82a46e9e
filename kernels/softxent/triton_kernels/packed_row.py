"""A training step with one wide row of 16-bit values on chip, twice as wide as its float32 values would fit.

The row stays in registers as it was loaded, two values in each, and is unpacked anew for the maximum, for the sum and
for the gradient. There is no register left to leave the target out value by value: the thread that holds it is left
out, and what else that thread holds is loaded once more. common.py has the formula, without label smoothing.
"""

import triton
import triton.language as tl

from .common import (
    edges,
    exp,
    exp_for,
    finite_or_zero,
    first_granule,
    fixed_point,
    from_fixed_point,
    gradient_of_row,
    keep,
    larger_or_nan,
    load_factor,
    load_sample_weight,
    load_target,
    load_target_weight,
    logit_map,
    loss_of_target,
    store_stats,
    times_slope,
    whole_granules,
)


@triton.jit
def by_thread(values, THREADS: tl.constexpr, GRANULE: tl.constexpr):
    """[THREADS, the values that the thread holds] of a row: granules are dealt out to the threads in turn."""
    groups: tl.constexpr = values.shape[0] // (THREADS * GRANULE)
    values = tl.permute(tl.reshape(values, [groups, THREADS, GRANULE]), (1, 0, 2))
    return tl.reshape(values, [THREADS, groups * GRANULE])


@triton.jit
def step_kernel(
    logits_ptr,  # [n_rows, n_cols] 16-bit floating point, values of a row side by side
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents, of the loss alone
    outputs,  # Outputs, without entropy and prediction
    dlogits_ptr,  # [n_rows, n_cols] out, or None; its rows start in their granules where those of the logits do
    extras,  # Extras, without label smoothing and softcap
    n_rows,
    n_cols,
    stride_row,
    stride_out,
    stride_dloss,
    ignore_index,
    NORMS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least n_cols
    THREADS: tl.constexpr,
    GRANULE: tl.constexpr,  # values in 16 bytes
    ODD: tl.constexpr,  # whether rows start and end within a granule
    OPAQUE: tl.constexpr,  # whether `keep` can be had
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    if not ODD:  # what Triton has to know to access 16 bytes at once
        stride_row = stride_row // GRANULE * GRANULE
        stride_out = stride_out // GRANULE * GRANULE
    row = tl.program_id(0).to(tl.int64)
    target, active, valid = load_target(target_ptr, sample_weight_ptr, row, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + row * stride_row
    z_y, slope = logit_map(tl.load(row_ptr + target, mask=valid, other=0.0), None, extras, tl.float32)
    w_y = load_target_weight(weight_ptr, target, valid, tl.float32)

    skip, whole = whole_granules(row_ptr, n_cols, GRANULE, ODD)
    start_ptr = first_granule(row_ptr, skip, GRANULE)
    at = tl.arange(0, BLOCK_N)
    mask = active & (at < whole)
    x = tl.load(start_ptr + at, mask=mask, other=float("-inf"))

    # The thread of the target, and the other values that it holds.
    GROUPS: tl.constexpr = BLOCK_N // (THREADS * GRANULE)
    target_at = target - skip
    its_thread = tl.where((target_at >= 0) & (target_at < whole), target_at // GRANULE % THREADS, -1)
    others = tl.arange(0, THREADS) != its_thread
    mate = tl.arange(0, GROUPS * GRANULE)
    mate_at = (mate // GRANULE * THREADS + its_thread) * GRANULE + mate % GRANULE
    mate_mask = active & (its_thread >= 0) & (mate_at < whole) & (mate_at != target_at)
    x_mate = tl.load(start_ptr + mate_at, mask=mate_mask, other=float("-inf"))
    if ODD:
        edge_cols, in_edge = edges(tl.arange(0, 2 * GRANULE), n_cols, skip, whole, GRANULE)
        edge_mask = active & in_edge & (edge_cols != target)
        x_edge = tl.load(row_ptr + edge_cols, mask=edge_mask, other=float("-inf"))

    # Of the logits, not of z: a scale above 0, rounded or not, leaves the largest the largest.
    of_thread = tl.reduce(by_thread(x.to(tl.float32), THREADS, GRANULE), 1, larger_or_nan)
    runner_up = tl.reduce(tl.where(others, of_thread, float("-inf")), 0, larger_or_nan)
    runner_up = larger_or_nan(runner_up, tl.reduce(x_mate.to(tl.float32), 0, larger_or_nan))
    if ODD:
        runner_up = larger_or_nan(runner_up, tl.reduce(x_edge.to(tl.float32), 0, larger_or_nan))
    runner_up, _ = logit_map(runner_up, None, extras, tl.float32)
    m = tl.where(active, tl.maximum(runner_up, z_y), 0.0)
    shift = finite_or_zero(runner_up)

    if OPAQUE:
        x = keep(x)
    z, _ = logit_map(x, None, extras, tl.float32)
    e = exp_for(z - shift, dtype)
    z_mate, _ = logit_map(x_mate, None, extras, tl.float32)
    e_mate = exp_for(z_mate - shift, dtype)
    if ODD:
        z_edge, _ = logit_map(x_edge, None, extras, tl.float32)
        e_edge = exp_for(z_edge - shift, dtype)
        of_thread = tl.sum(by_thread(fixed_point(e), THREADS, GRANULE), 1)
        rest = tl.sum(tl.where(others, of_thread, 0), 0) + tl.sum(fixed_point(e_mate), 0)
        rest = from_fixed_point(rest + tl.sum(fixed_point(e_edge), 0))
    else:
        of_thread = tl.sum(by_thread(e, THREADS, GRANULE), 1)
        rest = tl.sum(tl.where(others, of_thread, 0.0), 0) + tl.sum(e_mate, 0)
    over = exp(runner_up - m)
    rest *= over
    d, log_d, loss = loss_of_target(m, rest, z_y, w_y, 0.0, extras)
    loss = tl.where(active, loss * load_sample_weight(sample_weight_ptr, row, active, tl.float32), 0.0)
    if outputs.loss is not None:
        tl.store(outputs.loss + row, loss.to(outputs.loss.dtype.element_ty))
    store_stats(outputs, row, row < n_rows, active, valid, m, d, log_d, z_y, 0.0, target)

    if dlogits_ptr is not None:
        out: tl.constexpr = dlogits_ptr.dtype.element_ty
        r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, row, active, NORMS, tl.float32)
        scale, _, _, at_target = gradient_of_row(
            r, m, rest, z_y, w_y, 0.0, 0.0, 0.0, 0.0, extras, cotangents, row, active
        )
        at_target = times_slope(at_target, slope, extras)
        scale = times_slope(tl.where(active, scale * over, 0.0), slope, extras)
        out_ptr = dlogits_ptr + row * stride_out
        if OPAQUE:
            x = keep(x)
        z, _ = logit_map(x, None, extras, tl.float32)
        dz = (scale * exp_for(z - shift, dtype)).to(out)
        tl.store(first_granule(out_ptr, skip, GRANULE) + at, dz, mask=at < whole)
        if ODD:  # read again: there is no register to keep them in
            x_edge = tl.load(row_ptr + edge_cols, mask=edge_mask, other=float("-inf"))
            z_edge, _ = logit_map(x_edge, None, extras, tl.float32)
            tl.store(out_ptr + edge_cols, (scale * exp_for(z_edge - shift, dtype)).to(out), mask=in_edge)
        tl.debug_barrier()  # the target's value goes over what another thread may have written there
        tl.store(out_ptr + target, at_target.to(out), mask=valid)

"""A training step with one wide row on chip, wider than its values would fit once they are taken apart.

The row stays in registers as it was loaded, 16-bit values two in each, and is worked on anew for the maximum, for the
sums and for the gradient, a chunk at a time: the next is not touched before what is made of the last (common.after), or
the compiler would hold them all. There is no register left to leave the target out value by value: the thread that
holds it is left out, and what else that thread holds is loaded once more. common.py has the formula.
"""

# mypy: disable-error-code="assignment, misc, var-annotated"

import triton
import triton.language as tl

from .common import (
    after,
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
    smoothing,
    store_stats,
    times_slope,
    weighed_gap,
    whole_granules,
)
from .handles import cached_launch

NOWHERE = tl.constexpr(2**30)  # a column, and some added to it


@triton.jit
def bits_of(values):
    """32 bits of each value."""
    if values.dtype == tl.float32:
        bits = values.to(tl.int32, bitcast=True)
    else:
        bits = values.to(tl.int32)
    return bits


@triton.jit
def former(a, b):
    """Of a thread's values any one, without an instruction."""
    return a


@triton.jit
def countable(values, ODD: tl.constexpr):
    """As they are added up: of odd rows in any order, so that none may be outside [0, 1]."""
    if ODD:
        values = fixed_point(values)
    return values


@triton.jit
def sum_of(by_thread, of_mates, of_edges, others, ODD: tl.constexpr):
    """Of a row but for its target: the sums of the other threads, and the values that its thread and the ends hold."""
    if ODD:
        by_thread = tl.where(others, by_thread, 0)
        n = tl.sum(by_thread, 0) + tl.sum(fixed_point(of_mates), 0) + tl.sum(fixed_point(of_edges), 0)
        total = from_fixed_point(n)
    else:
        total = tl.sum(tl.where(others, by_thread, 0.0), 0) + tl.sum(of_mates, 0)
    return total


@triton.jit
def gradient(x, cols, mask, weight_ptr, shift, scale, bend, smooth, extras, cotangents):
    """dloss/dx of logits other than the target."""
    z, slope = logit_map(x, mask, extras, tl.float32)
    e = exp_for(z - shift, x.dtype)
    dz = scale * e
    if cotangents.entropy is not None:
        dz += bend * moment_of(e, shift - z)
    if extras.label_smoothing is not None:
        if weight_ptr is None:
            dz -= smooth
        else:
            dz -= smooth * load_weights(weight_ptr, cols, mask, tl.float32)
    return times_slope(dz, slope, extras)


@cached_launch
@triton.jit
def step_kernel(
    logits_ptr,  # [n_rows, n_cols] of 16 or 32 bits, values of a row side by side
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents
    outputs,  # Outputs
    dlogits_ptr,  # [n_rows, n_cols] out, or None; its rows start in their granules where those of the logits do
    extras,  # Extras; label smoothing not of odd rows
    n_rows,
    n_cols,
    stride_row,
    stride_out,
    stride_dloss,
    ignore_index,
    NORMS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of THREADS * GRANULE values, that the row has
    MATES: tl.constexpr,  # that a thread holds of them, or more: a power of two
    THREADS: tl.constexpr,
    GRANULE: tl.constexpr,  # values in 16 bytes
    ODD: tl.constexpr,  # whether rows start and end within a granule
    OPAQUE: tl.constexpr,  # whether `after` can be had
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    if not ODD:  # what Triton has to know to access 16 bytes at once
        stride_row = stride_row // GRANULE * GRANULE
        stride_out = stride_out // GRANULE * GRANULE
    row = tl.program_id(0).to(tl.int64)
    eps, share = smoothing(extras, n_cols, tl.float32)
    target, active, valid = load_target(target_ptr, sample_weight_ptr, row, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + row * stride_row
    z_y, slope_y = logit_map(tl.load(row_ptr + target, mask=valid, other=0.0), None, extras, tl.float32)
    w_y = load_target_weight(weight_ptr, target, valid, tl.float32)

    skip, whole = whole_granules(row_ptr, n_cols, GRANULE, ODD)
    start_ptr = first_granule(row_ptr, skip, GRANULE)
    CHUNK: tl.constexpr = THREADS * GRANULE
    zero = n_cols >> 31  # which the compiler does not know
    lane = tl.arange(0, THREADS)[:, None] * GRANULE + tl.arange(0, GRANULE)[None, :]
    x = ()
    for k in tl.static_range(CHUNKS):
        at = k * CHUNK + lane
        x = x + (tl.load(start_ptr + at, mask=active & (at < whole), other=float("-inf")),)  # noqa: RUF005

    # The thread of the target, and the other values that it holds.
    target_at = target - skip
    its_thread = tl.where((target_at >= 0) & (target_at < whole), target_at // GRANULE % THREADS, -1)
    others = tl.arange(0, THREADS) != its_thread
    mate = tl.arange(0, MATES)
    mate_at = (mate // GRANULE * THREADS + its_thread) * GRANULE + mate % GRANULE
    mate_mask = (its_thread >= 0) & (mate_at < whole) & (mate_at != target_at)
    x_mate = tl.load(start_ptr + mate_at, mask=mate_mask, other=float("-inf"))
    if ODD:
        edge_cols, in_edge = edges(tl.arange(0, 2 * GRANULE), n_cols, skip, whole, GRANULE)
        edge_mask = active & in_edge & (edge_cols != target)
        x_edge = tl.load(row_ptr + edge_cols, mask=edge_mask, other=float("-inf"))

    # Of the logits, not of z: a scale above 0 and a cap, rounded or not, leave the largest the largest.
    top = tl.reduce(x[0].to(tl.float32), 1, larger_or_nan)
    for k in tl.static_range(1, CHUNKS):
        top = larger_or_nan(top, tl.reduce(x[k].to(tl.float32), 1, larger_or_nan))
    runner_up = tl.reduce(tl.where(others, top, float("-inf")), 0, larger_or_nan)
    runner_up = larger_or_nan(runner_up, tl.reduce(x_mate.to(tl.float32), 0, larger_or_nan))
    if ODD:
        runner_up = larger_or_nan(runner_up, tl.reduce(x_edge.to(tl.float32), 0, larger_or_nan))
    runner_up, _ = logit_map(runner_up.to(dtype), None, extras, tl.float32)
    m = tl.where(active, tl.maximum(runner_up, z_y), 0.0)
    shift = finite_or_zero(runner_up)

    rests = tl.zeros([THREADS], tl.int64 if ODD else tl.float32)
    moments = rests
    gaps = tl.zeros([THREADS], tl.float32)
    totals = gaps
    firsts = tl.full([THREADS], NOWHERE, tl.int32)
    kept = ()
    done = bits_of(gaps + shift)  # of every thread, as what `after` waits for
    for k in tl.static_range(CHUNKS):
        at = k * CHUNK + lane
        mask = active & (at < whole)
        here = x[k]
        if OPAQUE:
            here = after(here, done & zero)
        kept = kept + (here,)  # noqa: RUF005
        z, _ = logit_map(here, mask, extras, tl.float32)
        e = exp_for(z - shift, dtype)
        rests += tl.sum(countable(e, ODD), 1)
        done = bits_of(rests)
        if outputs.entropy is not None or cotangents.entropy is not None:
            moments += tl.sum(countable(moment_of(e, shift - z), ODD), 1)
            done ^= bits_of(moments)
        if outputs.prediction is not None:
            firsts = tl.minimum(firsts, tl.min(tl.where(z == shift, at, NOWHERE), 1))
            done ^= firsts
        if extras.label_smoothing is not None:
            if weight_ptr is None:
                gaps += tl.sum(tl.where(mask, m - z, 0.0), 1)
            else:
                w = load_weights(weight_ptr, at, mask, tl.float32)
                totals += tl.sum(w, 1)
                gaps += tl.sum(weighed_gap(m, z, w), 1)
            done ^= bits_of(gaps)
    z_mate, _ = logit_map(x_mate, mate_mask, extras, tl.float32)
    e_mate = exp_for(z_mate - shift, dtype)
    z_edge = z_mate
    e_edge = e_mate
    if ODD:
        z_edge, _ = logit_map(x_edge, edge_mask, extras, tl.float32)
        e_edge = exp_for(z_edge - shift, dtype)
    rest = sum_of(rests, e_mate, e_edge, others, ODD)
    over = exp(runner_up - m)
    moment = tl.zeros((), tl.float32)
    if outputs.entropy is not None or cotangents.entropy is not None:
        of_mates, of_edges = moment_of(e_mate, shift - z_mate), moment_of(e_edge, shift - z_edge)
        moment = sum_of(moments, of_mates, of_edges, others, ODD)
        moment = moment_of(over, moment + rest * (m - runner_up)) + moment_of(exp(z_y - m), behind(m, z_y))
    rest *= over
    best = target
    if outputs.prediction is not None:
        best = tl.min(firsts, 0) + skip  # the target too, if it is as large
        if ODD:
            best = tl.minimum(best, tl.min(tl.where(z_edge == shift, edge_cols, NOWHERE), 0))
        best = better_of(z_y, target, runner_up, best)
    total = tl.zeros((), tl.float32) + n_cols
    d, log_d, loss = loss_of_target(m, rest, z_y, w_y, eps, extras)
    if extras.label_smoothing is not None:
        if weight_ptr is not None:
            total = tl.sum(totals, 0)
        of_mates = weighed_gap(m, z_mate, load_weights(weight_ptr, mate_at, mate_mask, tl.float32))
        loss += share * (total * log_d + (sum_of(gaps, of_mates, of_mates, others, False) + weighed_gap(m, z_y, w_y)))
    loss = tl.where(active, loss * load_sample_weight(sample_weight_ptr, row, active, tl.float32), 0.0)
    if outputs.loss is not None:
        tl.store(outputs.loss + row, loss.to(outputs.loss.dtype.element_ty))
    store_stats(outputs, row, row < n_rows, active, valid, m, d, log_d, z_y, moment, best)

    if dlogits_ptr is not None:
        out: tl.constexpr = dlogits_ptr.dtype.element_ty
        r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, row, active, NORMS, tl.float32)
        scale, bend, smooth, at_target = gradient_of_row(
            r, m, rest, z_y, w_y, total, moment, eps, share, extras, cotangents, row, active
        )
        at_target = times_slope(at_target, slope_y, extras)
        if cotangents.entropy is not None:  # its gaps are counted from m, not from the runner-up
            scale += bend * (m - shift)
            bend *= over
        scale *= over
        out_ptr = dlogits_ptr + row * stride_out
        granules_ptr = first_granule(out_ptr, skip, GRANULE)
        done = bits_of(totals + scale)
        for k in tl.static_range(CHUNKS):
            at = k * CHUNK + lane
            here = kept[k]
            if OPAQUE:
                here = after(here, done & zero)
            dz = gradient(here, at, active & (at < whole), weight_ptr, shift, scale, bend, smooth, extras, cotangents)
            tl.store(granules_ptr + at, dz.to(out), mask=at < whole)
            done = bits_of(tl.reduce(dz, 1, former))
        if ODD:  # read again: there is no register to keep them in
            x_edge = tl.load(row_ptr + edge_cols, mask=edge_mask, other=float("-inf"))
            dz = gradient(x_edge, edge_cols, edge_mask, weight_ptr, shift, scale, bend, smooth, extras, cotangents)
            tl.store(out_ptr + edge_cols, dz.to(out), mask=in_edge)
        tl.debug_barrier()  # the target's value goes over what another thread may have written there
        tl.store(out_ptr + target, at_target.to(out), mask=valid)

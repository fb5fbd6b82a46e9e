"""Rows of at most launch.NARROW columns, some in one program: loss, stats and gradients. formula.py has the formula.

A row is a tuple of spans, each a tile [ROWS, SPAN] of neighbouring columns, and in each span it belongs to the same
threads: from one, of few classes, to a warp or more. What is computed once a row they compute as often as they are.
"""

# mypy: disable-error-code="assignment, misc, no-redef"

import triton
import triton.language as tl

from .arithmetic import divide, exp, exp_for, moment_of, nan_unless
from .formula import (
    Formula,
    RowSums,
    behind,
    gradient_of_row,
    load_factor,
    load_norm,
    load_sample_weight,
    load_target,
    load_target_weight,
    logit_map,
    loss_of_row,
    smoothing,
    store_stats,
    target_of,
    times_slope,
    weighed_gap,
)
from .handles import cached_launch


@triton.jit
def of_row(values):
    """A value a row [ROWS], or one for all, beside a tile."""
    if len(values.shape) == 1:
        values = values[:, None]
    return values


@triton.jit
def rows_at(ptr, rows, stride_row, WIDTH: tl.constexpr):
    """Where rows start [ROWS, 1]; WIDTH values at a time are aligned, 1: any strides."""
    if WIDTH > 1:
        stride_row = stride_row // WIDTH * WIDTH
        width: tl.constexpr = WIDTH * ptr.dtype.element_ty.primitive_bitwidth // 8
        ptr = tl.multiple_of(ptr + rows * stride_row, width)[:, None]
    else:
        ptr = (ptr + rows * stride_row)[:, None]
    return ptr


@triton.jit
def load_span(row_ptr, at, stride_col, mask, WIDTH: tl.constexpr):
    if WIDTH == 1:
        at = at.to(tl.int64) * stride_col
    return tl.load(row_ptr + at, mask=mask, other=0.0)


@triton.jit
def step_of_rows(
    rows,  # [ROWS]
    r,  # what multiplies their gradients
    batch,
    cotangents,
    extras,
    outputs,
    n_rows,
    strides,
    tile: tl.constexpr,
):
    """The loss of rows; their stats and gradients are written."""
    acc: tl.constexpr = r.dtype
    dtype: tl.constexpr = batch.logits_ptr.dtype.element_ty
    U: tl.constexpr = batch.probs_ptr is not None or extras.label_smoothing is not None
    MOMENT: tl.constexpr = outputs.entropy is not None or cotangents.entropy is not None
    N_COLS: tl.constexpr = tile.N_COLS
    SPAN: tl.constexpr = tile.SPAN
    SPANS: tl.constexpr = (N_COLS + SPAN - 1) // SPAN
    in_range = rows < n_rows
    lane = tl.arange(0, SPAN)[None, :]
    eps, even = smoothing(extras, N_COLS, acc)
    formula = Formula(batch.probs_ptr, batch.weight_ptr, eps, even, extras)
    target = target_of(batch, rows, n_rows, N_COLS, strides, formula)
    active = target.active

    # logits, and their maximum
    row_ptr = rows_at(batch.logits_ptr, rows, strides.row, tile.WIDTH)
    z = ()
    slope = ()
    for k in tl.static_range(SPANS):
        at = k * SPAN + lane
        mask = active[:, None] & (at < N_COLS)
        z_k, slope_k = logit_map(load_span(row_ptr, at, strides.col, mask, tile.WIDTH), extras, acc)
        z = z + (tl.where(mask, z_k, float("-inf")),)  # noqa: RUF005
        slope = slope + (slope_k,)  # noqa: RUF005
    m = z[0]
    for k in tl.static_range(1, SPANS):
        m = tl.maximum(m, z[k])
    m = tl.where(active, tl.max(m, 1), 0.0)

    # sums
    if batch.probs_ptr is not None:
        t_ptr = rows_at(batch.probs_ptr, rows, strides.target_row, tile.GIVEN)
    rest = tl.zeros([rows.shape[0], SPAN], acc)
    below, moment, total, gap = rest, rest, rest, rest
    best = tl.full([rows.shape[0], SPAN], N_COLS, tl.int32)
    e = ()
    u = ()
    w = ()
    for k in tl.static_range(SPANS):
        at = k * SPAN + lane
        e_k = tl.where((at == of_row(target.y)) | (at >= N_COLS), 0.0, exp_for(z[k] - of_row(m), dtype))
        rest += e_k
        e = e + (e_k,)  # noqa: RUF005
        if MOMENT:
            moment += moment_of(e_k, of_row(m) - z[k])
            below += tl.where(z[k] == of_row(m), 0.0, e_k)
        if outputs.prediction is not None:
            best = tl.minimum(best, tl.where(z[k] == of_row(m), at, N_COLS))
        if U:
            w_k = tl.where(at < N_COLS, 1.0, 0.0).to(acc) + tl.zeros_like(rest)
            if batch.weight_ptr is not None:  # a load as wide as the tile: else each would come from another thread
                w_ptr = batch.weight_ptr + tl.broadcast_to(at, rest.shape)
                w_k = tl.load(w_ptr, mask=at < N_COLS, other=0.0).to(acc)
            u_k = w_k
            if batch.probs_ptr is not None:
                mask = active[:, None] & (at < N_COLS)
                t = load_span(t_ptr, at, strides.target_col, mask, tile.GIVEN).to(acc)
                if extras.label_smoothing is not None:
                    t = (1.0 - eps) * t + even
                u_k = w_k * t
            total += u_k
            gap += weighed_gap(of_row(m), z[k], u_k)
            u = u + (u_k,)  # noqa: RUF005
            w = w + (w_k,)  # noqa: RUF005
    moment = tl.sum(moment, 1) + moment_of(exp(target.z - m), behind(m, target.z))
    row = RowSums(m, tl.sum(rest, 1), tl.sum(total, 1), moment)
    d, log_d, loss = loss_of_row(row, tl.sum(gap, 1), target, formula)
    store_stats(outputs, rows, in_range, target, row, d, log_d, tl.sum(below, 1), tl.min(best, 1))

    # gradients
    if batch.dlogits_ptr is not None or batch.dtarget_ptr is not None:
        factors = gradient_of_row(r, row, target, formula, cotangents, rows)
        smooth, of_t = of_row(factors.smooth), of_row(factors.of_t)
        tl.debug_barrier()  # they may go over the logits, of which another warp may still want the target's
        for k in tl.static_range(SPANS):
            at = k * SPAN + lane
            mask = in_range[:, None] & (at < N_COLS)
            if batch.dlogits_ptr is not None:
                dz = of_row(factors.scale) * e[k]
                if cotangents.entropy is not None:
                    dz += of_row(factors.bend) * moment_of(e[k], of_row(m) - z[k])
                if U:
                    dz -= tl.where(smooth == 0.0, 0.0, smooth * u[k])
                dz = times_slope(dz, slope[k], extras)
                if batch.target_ptr is not None:
                    dz = tl.where(at == of_row(target.y), of_row(factors.at_target), dz)
                out_ptr = rows_at(batch.dlogits_ptr, rows, strides.dlogits_row, tile.OUT) + at
                tl.store(out_ptr, dz.to(batch.dlogits_ptr.dtype.element_ty), mask=mask)
            if batch.dtarget_ptr is not None:
                dt = of_t * (of_row(log_d) + (of_row(m) - z[k]))
                if batch.weight_ptr is not None:
                    dt *= w[k]
                dt = tl.where(of_t == 0.0, 0.0, dt)
                out_ptr = rows_at(batch.dtarget_ptr, rows, strides.dtarget_row, tile.OUT) + at
                tl.store(out_ptr, dt.to(batch.dtarget_ptr.dtype.element_ty), mask=mask)
    return tl.where(active, loss * load_sample_weight(batch.sample_weight_ptr, rows, active, acc), 0.0)


@cached_launch
@triton.jit
def narrow_rows_kernel(
    batch,  # Batch
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents
    extras,  # Extras
    outputs,  # Outputs; with SUMMED the loss is one number a program
    n_rows,
    strides,  # Strides
    NORMS: tl.constexpr,
    SUMMED: tl.constexpr,
    tile: tl.constexpr,  # launch.Narrow
):
    acc: tl.constexpr = tl.float64 if batch.logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * tile.ROWS + tl.arange(0, tile.ROWS)
    r = load_factor(cotangents, strides.dloss, norm_ptr, batch.sample_weight_ptr, rows, rows < n_rows, NORMS, acc)
    loss = step_of_rows(rows, r, batch, cotangents, extras, outputs, n_rows, strides, tile)
    if outputs.loss is not None:
        if SUMMED:
            tl.store(outputs.loss + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(outputs.loss + rows, loss.to(outputs.loss.dtype.element_ty), mask=rows < n_rows)


@cached_launch
@triton.jit
def small_batch_kernel(
    batch,  # as narrow_rows_kernel, but that all is done by one program
    norm_ptr,  # [1] the mean's divisor, or None: counted here
    cotangents,  # that of the loss is one number
    extras,
    outputs,  # the loss is one number
    n_rows,
    strides,
    MEAN: tl.constexpr,
    tile: tl.constexpr,
):
    """The mean's divisor, the losses and their sum or mean, the gradients."""
    acc: tl.constexpr = tl.float64 if batch.logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = tile.ROWS
    n = tl.full((), 1.0, acc)
    if norm_ptr is not None:
        n = load_norm(norm_ptr, 0, acc)
    elif MEAN:
        n = tl.zeros((), acc)
        for start in range(0, n_rows, ROWS):
            rows = start + tl.arange(0, ROWS).to(tl.int64)
            y, active, valid = load_target(batch.target_ptr, None, rows, n_rows, tile.N_COLS, extras.ignore_index)
            n += tl.sum(tl.where(active, load_target_weight(batch.weight_ptr, y, valid, acc), 0.0), 0)
        n += nan_unless(n != 0.0, acc)
    loss = tl.zeros([ROWS], acc)
    for start in range(0, n_rows, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        r = load_sample_weight(batch.sample_weight_ptr, rows, rows < n_rows, acc)
        if cotangents.loss is not None:
            r *= tl.load(cotangents.loss).to(acc)
        loss += step_of_rows(rows, divide(r, n), batch, cotangents, extras, outputs, n_rows, strides, tile)
    if outputs.loss is not None:
        tl.store(outputs.loss, divide(tl.sum(loss, 0), n).to(outputs.loss.dtype.element_ty))

"""A training step for few classes: one thread a row, which holds all of the row's values.

A tile of 16 columns would be padding for a third at ten classes, and its reductions shuffles. Here they are additions
within a thread, in the order of the columns, so that a row's bits depend on nothing but the row. common.py has the
formula. The logits are read once; the gradient, if dlogits_ptr is not None, is written once.
"""

# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .common import (
    behind,
    divide,
    exp,
    exp_for,
    gradient_of_row,
    load_factor,
    load_norm,
    load_sample_weight,
    load_target,
    load_target_weight,
    logit_map,
    loss_of_target,
    moment_of,
    nan_unless,
    smoothing,
    store_stats,
    times_slope,
    weighed_gap,
    wide,
)
from .handles import cached_launch


@triton.jit
def unpack(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of x [ROWS, WIDTH] as a tuple. Both halves at a time, so that nothing leaves its thread."""
    if WIDTH == 1:
        columns = (tl.reshape(x, [ROWS]),)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, WIDTH // 2]), (0, 2, 1)))
        columns = unpack(left, ROWS, WIDTH // 2) + unpack(right, ROWS, WIDTH // 2)
    return columns


@triton.jit
def pack(columns, start: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] from the columns that begin at `start`: the inverse of `unpack`."""
    if WIDTH == 1:
        x = tl.reshape(columns[start], [ROWS, 1])
    else:
        left = pack(columns, start, ROWS, WIDTH // 2)
        right = pack(columns, start + WIDTH // 2, ROWS, WIDTH // 2)
        x = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [ROWS, WIDTH])
    return x


@triton.jit
def load_columns(
    ptr, rows, mask, stride_row, stride_col, N_COLS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """The columns of rows [ROWS] as a tuple, in what they are computed in; WIDTH at a time."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    vector = tl.arange(0, WIDTH)[None, :]
    # Added here: what is said of a function's argument is lost where the function is inlined.
    row_ptr = tl.multiple_of(ptr + rows * stride_row, WIDTH * dtype.primitive_bitwidth // 8)[:, None]
    values = ()
    for start in tl.static_range(0, N_COLS, WIDTH):
        at = (start + vector).to(tl.int64) * stride_col
        x = tl.load(row_ptr + at, mask=mask[:, None] & (vector >= 0), other=0.0)
        values = values + unpack(wide(x), ROWS, WIDTH)
    return values


@triton.jit
def store_columns(ptr, rows, values, mask, stride_row, N_COLS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    vector = tl.arange(0, WIDTH)[None, :]
    row_ptr = tl.multiple_of(ptr + rows * stride_row, WIDTH * dtype.primitive_bitwidth // 8)[:, None]
    for start in tl.static_range(0, N_COLS, WIDTH):
        x = pack(values, start, ROWS, WIDTH).to(dtype)
        tl.store(row_ptr + start + vector, x, mask=mask[:, None] & (vector >= 0))


@triton.jit
def load_column_weight(weight_ptr, column: tl.constexpr, dtype: tl.constexpr):
    if weight_ptr is None:
        w = tl.full((), 1.0, dtype)
    else:
        w = tl.load(weight_ptr + column).to(dtype)
    return w


@triton.jit
def rows_step(
    rows,
    target,
    active,
    valid,
    r,
    logits_ptr,
    weight_ptr,
    sample_weight_ptr,
    cotangents,
    outputs,
    dlogits_ptr,
    extras,
    n_rows,
    stride_row,
    stride_col,
    stride_out,
    acc: tl.constexpr,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The loss of rows [ROWS]; their stats and their gradient, times r, are written."""
    eps, share = smoothing(extras, N_COLS, acc)
    vector = tl.arange(0, WIDTH)[None, :]
    width: tl.constexpr = WIDTH * logits_ptr.dtype.element_ty.primitive_bitwidth // 8
    row_ptr = tl.multiple_of(logits_ptr + rows * stride_row, width)
    mask = active[:, None] & (vector >= 0)
    z = ()
    slope = ()
    for start in tl.static_range(0, N_COLS, WIDTH):
        x = tl.load(row_ptr[:, None] + (start + vector).to(tl.int64) * stride_col, mask=mask, other=0.0)
        x, dx = logit_map(x, None, extras, acc)
        z = z + unpack(x, ROWS, WIDTH)
        slope = slope + unpack(dx + tl.zeros_like(x), ROWS, WIDTH)

    m = z[0]
    z_y = tl.where(target == 0, z[0], 0.0)
    slope_y = tl.where(target == 0, slope[0], 0.0)
    for j in tl.static_range(1, N_COLS):
        m = tl.maximum(m, z[j])
        z_y = tl.where(target == j, z[j], z_y)
        slope_y = tl.where(target == j, slope[j], slope_y)
    rest = tl.zeros([ROWS], acc)
    moment = tl.zeros([ROWS], acc)
    best = tl.full([ROWS], N_COLS, tl.int32)
    e = ()
    for j in tl.static_range(N_COLS):
        e = e + (tl.where(target == j, 0.0, exp_for(z[j] - m, logits_ptr.dtype.element_ty)),)  # noqa: RUF005
        rest += e[j]
        if outputs.entropy is not None or cotangents.entropy is not None:
            moment += moment_of(e[j], m - z[j])
        if outputs.prediction is not None:
            best = tl.minimum(best, tl.where(z[j] == m, j, N_COLS))
    moment += moment_of(exp(z_y - m), behind(m, z_y))

    w_y = load_target_weight(weight_ptr, target, valid, acc)
    d, log_d, loss = loss_of_target(m, rest, z_y, w_y, eps, extras)
    total = tl.full((), N_COLS, acc)
    if extras.label_smoothing is not None:
        total = tl.zeros((), acc)
        gap = tl.zeros([ROWS], acc)
        for j in tl.static_range(N_COLS):
            w = load_column_weight(weight_ptr, j, acc)
            total += w
            gap += weighed_gap(m, z[j], w)
        loss += share * (total * log_d + gap)
    store_stats(outputs, rows, rows < n_rows, active, valid, m, d, log_d, z_y, moment, best)

    if dlogits_ptr is not None:
        scale, bend, smooth, at_target = gradient_of_row(
            r, m, rest, z_y, w_y, total, moment, eps, share, extras, cotangents, rows, active
        )
        at_target = times_slope(at_target, slope_y, extras)
        dz = ()
        for j in tl.static_range(N_COLS):
            g = scale * e[j]
            if cotangents.entropy is not None:
                g += bend * moment_of(e[j], m - z[j])
            if extras.label_smoothing is not None:
                g -= smooth * load_column_weight(weight_ptr, j, acc)
            g = tl.where(target == j, at_target, times_slope(g, slope[j], extras))
            dz = dz + (g,)  # noqa: RUF005
        store_columns(dlogits_ptr, rows, dz, rows < n_rows, stride_out, N_COLS, ROWS, WIDTH)
    return tl.where(active, loss * load_sample_weight(sample_weight_ptr, rows, active, acc), 0.0)


@cached_launch
@triton.jit
def step_kernel(
    logits_ptr,  # [n_rows, N_COLS]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [N_COLS], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents
    outputs,  # Outputs; with SUMMED the loss is one number a program
    dlogits_ptr,  # [n_rows, N_COLS] out, rows contiguous, perhaps the logits; or None
    extras,  # Extras
    n_rows,
    stride_row,
    stride_col,
    stride_out,
    stride_dloss,
    ignore_index,
    NORMS: tl.constexpr,
    SUMMED: tl.constexpr,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # values in one load or store
):
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target, active, valid = load_target(target_ptr, sample_weight_ptr, rows, n_rows, N_COLS, ignore_index)
    r = load_factor(cotangents, stride_dloss, norm_ptr, sample_weight_ptr, rows, active, NORMS, acc)
    loss = rows_step(
        rows,
        target,
        active,
        valid,
        r,
        logits_ptr,
        weight_ptr,
        sample_weight_ptr,
        cotangents,
        outputs,
        dlogits_ptr,
        extras,
        n_rows,
        stride_row,
        stride_col,
        stride_out,
        acc,
        N_COLS,
        ROWS,
        WIDTH,
    )
    if outputs.loss is not None:
        if SUMMED:
            tl.store(outputs.loss + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(outputs.loss + rows, loss.to(outputs.loss.dtype.element_ty), mask=rows < n_rows)


@cached_launch
@triton.jit
def one_launch_kernel(
    logits_ptr,  # [n_rows, N_COLS]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [N_COLS], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # [1] the mean's divisor, or None: counted here
    cotangents,  # Cotangents: that of the loss is one number
    outputs,  # Outputs: the loss is one number
    dlogits_ptr,  # [n_rows, N_COLS] out, rows contiguous, perhaps the logits; or None
    extras,  # Extras
    n_rows,
    stride_row,
    stride_col,
    stride_out,
    ignore_index,
    MEAN: tl.constexpr,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """All of a small batch in one program: the mean's divisor, the losses and their sum or mean, the gradients."""
    acc: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.full((), 1.0, acc)
    if norm_ptr is not None:
        n = load_norm(norm_ptr, 0, acc)
    elif MEAN:
        n = tl.zeros((), acc)
        for start in range(0, n_rows, ROWS):
            rows = start + tl.arange(0, ROWS).to(tl.int64)
            target, active, valid = load_target(target_ptr, None, rows, n_rows, N_COLS, ignore_index)
            n += tl.sum(tl.where(active, load_target_weight(weight_ptr, target, valid, acc), 0.0), 0)
        n += nan_unless(n != 0.0, acc)
    factor = divide(1.0, n)
    if cotangents.loss is not None:
        factor = divide(tl.load(cotangents.loss).to(acc), n)
    loss = tl.zeros([ROWS], acc)
    for start in range(0, n_rows, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        target, active, valid = load_target(target_ptr, sample_weight_ptr, rows, n_rows, N_COLS, ignore_index)
        r = factor * load_sample_weight(sample_weight_ptr, rows, active, acc)
        loss += rows_step(
            rows,
            target,
            active,
            valid,
            tl.where(active, r, 0.0),
            logits_ptr,
            weight_ptr,
            sample_weight_ptr,
            cotangents,
            outputs,
            dlogits_ptr,
            extras,
            n_rows,
            stride_row,
            stride_col,
            stride_out,
            acc,
            N_COLS,
            ROWS,
            WIDTH,
        )
    if outputs.loss is not None:
        tl.store(outputs.loss, divide(tl.sum(loss, 0), n).to(outputs.loss.dtype.element_ty))

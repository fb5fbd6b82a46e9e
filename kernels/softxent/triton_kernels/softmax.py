"""softmax and log_softmax of each row, and their gradients.

    m = max_j z_j      d = sum_j exp(z_j - m)
    p_j = exp(z_j - m) / d                                 log p_j = (z_j - m) - log d
    dz_j = p_j * (dp_j - sum_k dp_k * p_k)                 dz_j = dq_j - p_j * sum_k dq_k        for q = log p

A thread holds a row of few classes, a program rows as wide as its registers hold, which it reads once; the gradient,
which holds two matrices, those half as wide. Wider rows are streamed: read for the sum, and again to write.

What is written is contiguous. What is given may lie anywhere: where its rows line up with those that are written, both
are accessed in the same granules of 16 bytes (common.whole_granules), and elsewhere the former value by value.
"""

# mypy: disable-error-code="assignment, misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from .common import (
    edges,
    exp,
    exp_for,
    finite_or_zero,
    fixed_point,
    from_fixed_point,
    larger_or_nan,
    reciprocal,
    whole_granules,
    wide,
)
from .few_classes import load_columns, store_columns
from .handles import cached_launch
from .row_loss import device, layout, stream
from .streaming import lanes
from .whole_row import columns, load_at, max_row, places, spread, store_at, sum_in_any_order, sum_row


@triton.jit
def norm_of(d, LOG: tl.constexpr):
    """What a row is divided by, or reduced by."""
    if LOG:
        norm = tl.log(d)
    else:
        norm = reciprocal(d)
    return norm


@triton.jit
def normalized(z, e, m, norm, LOG: tl.constexpr):
    """p, or log p, of z; e = exp(z - m)."""
    if LOG:
        out = (z - m) - norm
    else:
        out = e * norm
    return out


@triton.jit
def term(dout, out, LOG: tl.constexpr):
    """What the gradient takes the sum of."""
    if not LOG:
        dout = dout * out
    return dout


@triton.jit
def gradient(dout, out, dot, dtype: tl.constexpr, LOG: tl.constexpr):
    """dz, from the sum of the terms."""
    if LOG:
        dz = dout - exp_for(out, dtype) * dot
    else:
        dz = out * (dout - dot)
    return dz


@cached_launch
@triton.jit
def few_forward_kernel(
    z_ptr,  # [n_rows, N_COLS]
    out_ptr,  # [n_rows, N_COLS] out, contiguous
    n_rows,
    stride_row,
    stride_col,
    LOG: tl.constexpr,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    GIVEN: tl.constexpr,  # values in an access to z
    WIDTH: tl.constexpr,  # values in an access to `out`
):
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    z = load_columns(z_ptr, rows, mask, stride_row, stride_col, N_COLS, ROWS, GIVEN)
    m = z[0]
    for j in tl.static_range(1, N_COLS):
        m = tl.maximum(m, z[j])
    d = tl.zeros_like(m)
    e = ()
    for j in tl.static_range(N_COLS):
        e = e + (exp_for(z[j] - m, dtype),)  # noqa: RUF005
        d += e[j]
    norm = norm_of(d, LOG)
    out = ()
    for j in tl.static_range(N_COLS):
        out = out + (normalized(z[j], e[j], m, norm, LOG),)  # noqa: RUF005
    store_columns(out_ptr, rows, out, mask, N_COLS, N_COLS, ROWS, WIDTH)


@cached_launch
@triton.jit
def few_backward_kernel(
    dout_ptr,  # [n_rows, N_COLS]
    out_ptr,  # [n_rows, N_COLS] contiguous
    dz_ptr,  # [n_rows, N_COLS] out, contiguous
    n_rows,
    stride_row,  # of dout
    stride_col,
    LOG: tl.constexpr,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    GIVEN: tl.constexpr,  # values in an access to dout
    WIDTH: tl.constexpr,  # values in an access to `out` and dz
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    dout = load_columns(dout_ptr, rows, mask, stride_row, stride_col, N_COLS, ROWS, GIVEN)
    out = load_columns(out_ptr, rows, mask, N_COLS, 1, N_COLS, ROWS, WIDTH)
    dot = tl.zeros_like(out[0])
    for j in tl.static_range(N_COLS):
        dot += term(dout[j], out[j], LOG)
    dz = ()
    for j in tl.static_range(N_COLS):
        dz = dz + (gradient(dout[j], out[j], dot, dtype, LOG),)  # noqa: RUF005
    store_columns(dz_ptr, rows, dz, mask, N_COLS, N_COLS, ROWS, WIDTH)


@cached_launch
@triton.jit
def forward_kernel(
    z_ptr,  # [n_rows, n_cols]
    out_ptr,  # [n_rows, n_cols] out, contiguous
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    LOG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least n_cols
    SPAN: tl.constexpr,  # whole_row.columns
    GRANULE: tl.constexpr,  # values in an access to `out`
    ODD: tl.constexpr,  # whether its rows start and end within a granule
    GIVEN: tl.constexpr,  # values in an access to z: GRANULE, if its rows line up with those of `out`, or 1
):
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    if not ODD:  # what Triton has to know to access granules at once
        n_cols = n_cols // GRANULE * GRANULE
        stride_row = stride_row // GIVEN * GIVEN
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M
    if BLOCK_M > 1:
        rows += tl.arange(0, BLOCK_M)
    row_ptr, out_row_ptr = z_ptr + rows * stride_row, out_ptr + rows * n_cols
    at = columns(BLOCK_M, BLOCK_N, SPAN)
    skip, mask, edge_cols, in_edge = places(out_row_ptr, rows, n_rows, n_cols, BLOCK_M, at, GRANULE, ODD)
    z = wide(load_at(row_ptr, skip, at, mask, stride_col, float("-inf"), GIVEN, BLOCK_M))
    if ODD:
        z_edge = wide(load_at(row_ptr, 0, edge_cols, in_edge, stride_col, float("-inf"), 1, BLOCK_M))
        m = spread(larger_or_nan(max_row(z, BLOCK_M, True), max_row(z_edge, BLOCK_M, True)), BLOCK_M)
        e, e_edge = exp_for(z - m, dtype), exp_for(z_edge - m, dtype)
        d = from_fixed_point(sum_row(fixed_point(e), BLOCK_M) + sum_row(fixed_point(e_edge), BLOCK_M))
        norm = norm_of(spread(d, BLOCK_M) + (m - m), LOG)  # NaN where there is no softmax: an integer is never
        store_at(out_row_ptr, 0, edge_cols, in_edge, normalized(z_edge, e_edge, m, norm, LOG), 1, BLOCK_M)
    else:
        m = spread(max_row(z, BLOCK_M, False), BLOCK_M)
        e = exp_for(z - m, dtype)
        norm = norm_of(spread(sum_row(e, BLOCK_M), BLOCK_M), LOG)
    store_at(out_row_ptr, skip, at, mask, normalized(z, e, m, norm, LOG), GRANULE, BLOCK_M)


@cached_launch
@triton.jit
def backward_kernel(
    dout_ptr,  # [n_rows, n_cols]
    out_ptr,  # [n_rows, n_cols] contiguous
    dz_ptr,  # [n_rows, n_cols] out, contiguous
    n_rows,
    n_cols,
    stride_row,  # of dout
    stride_col,
    LOG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least n_cols
    SPAN: tl.constexpr,  # whole_row.columns
    GRANULE: tl.constexpr,  # values in an access to `out` and dz
    ODD: tl.constexpr,  # whether their rows start and end within a granule
    GIVEN: tl.constexpr,  # values in an access to dout: GRANULE, if its rows line up with those, or 1
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if not ODD:  # what Triton has to know to access granules at once
        n_cols = n_cols // GRANULE * GRANULE
        stride_row = stride_row // GIVEN * GIVEN
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M
    if BLOCK_M > 1:
        rows += tl.arange(0, BLOCK_M)
    row_ptr, out_row_ptr, dz_row_ptr = dout_ptr + rows * stride_row, out_ptr + rows * n_cols, dz_ptr + rows * n_cols
    at = columns(BLOCK_M, BLOCK_N, SPAN)
    skip, mask, edge_cols, in_edge = places(out_row_ptr, rows, n_rows, n_cols, BLOCK_M, at, GRANULE, ODD)
    dout = wide(load_at(row_ptr, skip, at, mask, stride_col, 0.0, GIVEN, BLOCK_M))
    out = wide(load_at(out_row_ptr, skip, at, mask, 1, 0.0, GRANULE, BLOCK_M))
    if ODD:
        dout_edge = wide(load_at(row_ptr, 0, edge_cols, in_edge, stride_col, 0.0, 1, BLOCK_M))
        out_edge = wide(load_at(out_row_ptr, 0, edge_cols, in_edge, 1, 0.0, 1, BLOCK_M))
        dot = sum_in_any_order(term(dout, out, LOG), term(dout_edge, out_edge, LOG), BLOCK_M)
        dot = spread(dot, BLOCK_M)
        store_at(dz_row_ptr, 0, edge_cols, in_edge, gradient(dout_edge, out_edge, dot, dtype, LOG), 1, BLOCK_M)
    else:
        dot = spread(sum_row(term(dout, out, LOG), BLOCK_M), BLOCK_M)
    store_at(dz_row_ptr, skip, at, mask, gradient(dout, out, dot, dtype, LOG), GRANULE, BLOCK_M)


@cached_launch
@triton.jit
def stream_forward_kernel(
    z_ptr,  # [n_rows, n_cols]
    out_ptr,  # [n_rows, n_cols] out, contiguous
    n_cols,
    stride_row,
    stride_col,
    LOG: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # values in 16 bytes
    UNROLL: tl.constexpr,
    GRANULE: tl.constexpr,  # as of forward_kernel
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    if not ODD:  # what Triton has to know to access granules at once
        n_cols = n_cols // GRANULE * GRANULE
        stride_row = stride_row // GIVEN * GIVEN
    row = tl.program_id(0).to(tl.int64)
    row_ptr, out_row_ptr = z_ptr + row * stride_row, out_ptr + row * n_cols
    # The bits of a sum must not depend on where in a granule its row starts.
    width: tl.constexpr = 1 if ODD else GRANULE
    lane = lanes(THREADS, VECTOR, UNROLL)
    m = tl.full([THREADS], float("-inf"), acc)
    d = tl.zeros([THREADS], acc)
    last = n_cols // width * width
    for start in range(0, last, UNROLL * THREADS * VECTOR):
        at = start + lane
        z = wide(load_at(row_ptr, 0, at, at < last, stride_col, float("-inf"), 1 if ODD else GIVEN, 1))
        m_new = tl.maximum(m, tl.max(tl.max(z, 2), 0))
        shift = finite_or_zero(m_new)
        e = exp_for(z - shift[None, :, None], dtype)
        d = d * exp(m - shift) + tl.sum(tl.sum(e, 2), 0)
        m = m_new
    d *= exp(m - finite_or_zero(tl.max(m, 0)))
    m, d = tl.max(m, 0), tl.sum(d, 0)
    norm = norm_of(d + (m - m), LOG)  # NaN where there is no softmax
    skip, whole = whole_granules(out_row_ptr, n_cols, GRANULE, ODD)
    for start in range(0, whole, 4 * THREADS * VECTOR):
        at = start + tl.arange(0, 4 * THREADS * VECTOR)
        z = wide(load_at(row_ptr, skip, at, at < whole, stride_col, float("-inf"), GIVEN, 1))
        store_at(out_row_ptr, skip, at, at < whole, normalized(z, exp_for(z - m, dtype), m, norm, LOG), GRANULE, 1)
    if ODD:
        cols, mask = edges(tl.arange(0, 2 * GRANULE), n_cols, skip, whole, GRANULE)
        ends = wide(load_at(row_ptr, 0, cols, mask, stride_col, float("-inf"), 1, 1))
        store_at(out_row_ptr, 0, cols, mask, normalized(ends, exp_for(ends - m, dtype), m, norm, LOG), 1, 1)


@cached_launch
@triton.jit
def stream_backward_kernel(
    dout_ptr,  # [n_rows, n_cols]
    out_ptr,  # [n_rows, n_cols] contiguous
    dz_ptr,  # [n_rows, n_cols] out, contiguous
    n_cols,
    stride_row,  # of dout
    stride_col,
    LOG: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # values in 16 bytes
    UNROLL: tl.constexpr,
    GRANULE: tl.constexpr,  # as of backward_kernel
    ODD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if not ODD:  # what Triton has to know to access granules at once
        n_cols = n_cols // GRANULE * GRANULE
        stride_row = stride_row // GIVEN * GIVEN
    row = tl.program_id(0).to(tl.int64)
    row_ptr, out_row_ptr, dz_row_ptr = dout_ptr + row * stride_row, out_ptr + row * n_cols, dz_ptr + row * n_cols
    width: tl.constexpr = 1 if ODD else GRANULE  # as in forward
    lane = lanes(THREADS, VECTOR, UNROLL)
    dot = tl.zeros([THREADS], tl.float64 if dtype == tl.float64 else tl.float32)
    last = n_cols // width * width
    for start in range(0, last, UNROLL * THREADS * VECTOR):
        at = start + lane
        dout = wide(load_at(row_ptr, 0, at, at < last, stride_col, 0.0, 1 if ODD else GIVEN, 1))
        if not LOG:
            dout *= wide(load_at(out_row_ptr, 0, at, at < last, 1, 0.0, width, 1))
        dot += tl.sum(tl.sum(dout, 2), 0)
    dot = tl.sum(dot, 0)
    skip, whole = whole_granules(out_row_ptr, n_cols, GRANULE, ODD)
    for start in range(0, whole, 2 * THREADS * VECTOR):
        at = start + tl.arange(0, 2 * THREADS * VECTOR)
        dout = wide(load_at(row_ptr, skip, at, at < whole, stride_col, 0.0, GIVEN, 1))
        out = wide(load_at(out_row_ptr, skip, at, at < whole, 1, 0.0, GRANULE, 1))
        store_at(dz_row_ptr, skip, at, at < whole, gradient(dout, out, dot, dtype, LOG), GRANULE, 1)
    if ODD:
        cols, mask = edges(tl.arange(0, 2 * GRANULE), n_cols, skip, whole, GRANULE)
        dends = wide(load_at(row_ptr, 0, cols, mask, stride_col, 0.0, 1, 1))
        ends = wide(load_at(out_row_ptr, 0, cols, mask, 1, 0.0, 1, 1))
        store_at(dz_row_ptr, 0, cols, mask, gradient(dends, ends, dot, dtype, LOG), 1, 1)


def forward(z: Tensor, log: bool) -> Tensor:
    """softmax of each row of z [n_rows, n_cols], or its logarithm: new, contiguous, in the dtype of z."""
    out = z.new_empty(z.shape)
    _launch((few_forward_kernel, forward_kernel, stream_forward_kernel), (z, out), log)
    return out


def backward(dout: Tensor, out: Tensor, log: bool) -> Tensor:
    """The gradient of z, new and contiguous, from that of `out`, which is `forward`'s result."""
    if not out.is_contiguous() or out.data_ptr() % 16:  # as a saved-tensor hook may have brought it back
        out = out.clone(memory_format=torch.contiguous_format)
    dz = out.new_empty(out.shape)
    _launch((few_backward_kernel, backward_kernel, stream_backward_kernel), (dout, out, dz), log)
    return dz


def _launch(kernels: tuple[Any, ...], tensors: tuple[Tensor, ...], log: bool) -> None:
    """Rows in threads, in programs, or streamed. The first tensor is given, and may lie anywhere."""
    few, whole, streamed = kernels
    given = tensors[0]
    (n_rows, n_cols), itemsize = given.shape, given.itemsize
    with on_device_of(given):
        if n_cols <= launch.FEW:
            few[(launch.cdiv(n_rows, launch.ROWS),)](
                *tensors,
                n_rows,
                *given.stride(),
                LOG=log,
                N_COLS=n_cols,
                ROWS=launch.ROWS,
                GIVEN=launch.vector(*layout(given)),
                WIDTH=launch.vector(n_cols, n_cols, 1, itemsize, 0),
                num_warps=launch.ROWS // device().warp_size,
                **launch.OPTIONS,
            )
            return
        granule, odd = launch.access(n_cols, n_cols, 1, itemsize, 0)
        lines_up = launch.lines_up(layout(given), (n_cols, n_cols, 1, itemsize, 0), granule)
        options = {"LOG": log, "GRANULE": granule, "ODD": odd, "GIVEN": granule if lines_up else 1}
        tile = launch.softmax(n_cols, given.stride(1), itemsize, len(tensors) - 1, device())
        if tile is None:
            options |= stream(itemsize, launch.Holds())
            if odd and itemsize == 2 and len(tensors) == 3:  # loaded value by value, of two matrices
                options["UNROLL"] //= 2
            streamed[(n_rows,)](*tensors, n_cols, *given.stride(), **options)
        else:
            whole[(launch.cdiv(n_rows, tile.block_m),)](
                *tensors,
                n_rows,
                n_cols,
                *given.stride(),
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                SPAN=128 // itemsize,
                num_warps=tile.num_warps,
                **options,
                **launch.OPTIONS,
            )

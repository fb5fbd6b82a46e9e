"""softmax and log_softmax of each row, and their gradients.

    m = max_j z_j      d = sum_j exp(z_j - m)
    p_j = exp(z_j - m) / d                                 log p_j = (z_j - m) - log d
    dz_j = p_j * (dp_j - sum_k dp_k * p_k)                 dz_j = dq_j - p_j * sum_k dq_k        for q = log p

A program owns BLOCK_M rows and walks their columns BLOCK_N at a time, twice: once for the sums, once to write. Rows of
up to BLOCK_N columns come from cache the second time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from .common import exp, finite_or_zero, reciprocal


@triton.jit
def forward_kernel(
    z_ptr,  # [n_rows, n_cols]
    out_ptr,  # [n_rows, n_cols] out, contiguous
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    ACC: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < n_rows
    row_ptr = z_ptr + rows * stride_row
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    d = tl.zeros([BLOCK_M], ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_range[:, None] & (cols < n_cols)[None, :]
        z = tl.load(row_ptr[:, None] + cols.to(tl.int64)[None, :] * stride_col, mask=mask, other=float("-inf")).to(ACC)
        m_new = tl.maximum(m, tl.max(z, 1))
        shift = finite_or_zero(m_new)
        d = d * exp(m - shift) + tl.sum(exp(z - shift[:, None]), 1)
        m = m_new
    log_d, inverse_d = tl.log(d), reciprocal(d)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_range[:, None] & (cols < n_cols)[None, :]
        z = tl.load(row_ptr[:, None] + cols.to(tl.int64)[None, :] * stride_col, mask=mask, other=float("-inf")).to(ACC)
        if LOG:
            out = (z - m[:, None]) - log_d[:, None]
        else:
            out = exp(z - m[:, None]) * inverse_d[:, None]
        out_pos = out_ptr + rows[:, None] * n_cols + cols[None, :]
        tl.store(out_pos, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dout_ptr,  # [n_rows, n_cols]
    out_ptr,  # [n_rows, n_cols] contiguous
    dz_ptr,  # [n_rows, n_cols] out, contiguous
    n_rows,
    n_cols,
    stride_row,  # of dout
    stride_col,
    ACC: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < n_rows
    dot = tl.zeros([BLOCK_M], ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_range[:, None] & (cols < n_cols)[None, :]
        dout_pos = dout_ptr + rows[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
        dout = tl.load(dout_pos, mask=mask, other=0.0).to(ACC)
        if not LOG:
            out = tl.load(out_ptr + rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0).to(ACC)
            dout = dout * out
        dot += tl.sum(dout, 1)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_range[:, None] & (cols < n_cols)[None, :]
        dout_pos = dout_ptr + rows[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
        dout = tl.load(dout_pos, mask=mask, other=0.0).to(ACC)
        out = tl.load(out_ptr + rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0).to(ACC)
        if LOG:
            dz = dout - exp(out) * dot[:, None]
        else:
            dz = out * (dout - dot[:, None])
        dz_pos = dz_ptr + rows[:, None] * n_cols + cols[None, :]
        tl.store(dz_pos, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def forward(z: Tensor, log: bool) -> Tensor:
    """softmax of each row of z [n_rows, n_cols], or its logarithm: new, contiguous, in the dtype of z."""
    out = z.new_empty(z.shape)
    _launch(forward_kernel, (z, out), z, log)
    return out


def backward(dout: Tensor, out: Tensor, log: bool) -> Tensor:
    """The gradient of z, new and contiguous, from that of `out`, which is `forward`'s result."""
    dz = out.new_empty(out.shape)
    _launch(backward_kernel, (dout, out, dz), dout, log)
    return dz


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, ...], strided: Tensor, log: bool) -> None:
    n_rows, n_cols = strided.shape
    double = strided.dtype == torch.float64
    block_m, block_n, num_warps = launch.tile(n_cols, 8 if double else 4)
    with on_device_of(strided):
        kernel[(launch.cdiv(n_rows, block_m),)](
            *tensors,
            n_rows,
            n_cols,
            *strided.stride(),
            ACC=tl.float64 if double else tl.float32,
            LOG=log,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
            **launch.OPTIONS,
        )

"""Cross-entropy of each row of logits against its target class, and its gradient.

For one row z of n_cols logits with target class y, class weights w, and label smoothing eps, with
c_j = (1 - eps) * w_y * [j == y] + (eps / n_cols) * w_j and a = sum_j c_j (reference.py):

    m     = max_j z_j
    rest  = sum_{j != y} exp(z_j - m)
    d     = rest + exp(z_y - m)
    loss  = a * log d + sum_j c_j * (m - z_j)             log d = log1p(rest) where z_y == m
    dloss/dz_j =  a * exp(z_j - m) / d - c_j              j != y
    dloss/dz_y = -a * rest / d + (a - c_y)                the same, without the cancellation of p_y - 1

An ignored row has loss and gradient 0 and is not read. A target outside [0, n_cols) gives NaN in that row's loss and
gradient, and an assertion where Triton's debug mode is on; nothing is read out of bounds.

A program owns a tile of BLOCK_M rows and walks their columns BLOCK_N at a time, so that ten classes and a vocabulary
are the same code. Forward reads the logits once, backward reads them once and writes dlogits once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from ..normalizer import normalizer
from .common import exp, finite_or_zero, log1p, scalar


@triton.jit
def load_target(target_ptr, stride_target, rows, n_rows, n_cols, ignore_index):
    """The target classes of a tile's rows; which rows count; and which of those have a class that exists."""
    in_range = rows < n_rows
    target = tl.load(target_ptr + rows * stride_target, mask=in_range, other=0).to(tl.int64)
    active = in_range & (target != ignore_index)
    valid = active & (target >= 0) & (target < n_cols)
    tl.device_assert(valid | (active == 0), "softxent: target out of range")
    return target, active, valid


@triton.jit
def forward_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    loss_ptr,  # [n_rows] out
    max_ptr,  # [n_rows] out, or None: m
    rest_ptr,  # [n_rows] out, or None with max_ptr
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_target,
    ignore_index,
    label_smoothing: tl.float64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    acc: tl.constexpr = loss_ptr.dtype.element_ty
    eps = scalar(label_smoothing, acc)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target, active, valid = load_target(target_ptr, stride_target, rows, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + rows * stride_row
    z_y = tl.load(row_ptr + target * stride_col, mask=valid, other=float("nan")).to(acc)

    m = tl.full([BLOCK_M], float("-inf"), acc)
    rest = tl.zeros([BLOCK_M], acc)
    spread = tl.zeros([BLOCK_M], acc)  # sum_j w_j * (m - z_j)
    total = tl.zeros((), acc)  # sum_j w_j
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = active[:, None] & (cols < n_cols)[None, :]
        z = tl.load(row_ptr[:, None] + cols.to(tl.int64)[None, :] * stride_col, mask=mask, other=float("-inf")).to(acc)
        m_new = tl.maximum(m, tl.max(z, 1))
        shift = finite_or_zero(m_new)
        e = tl.where(cols[None, :] == target[:, None], 0.0, exp(z - shift[:, None]))
        rest = rest * exp(m - shift) + tl.sum(e, 1)
        if eps != 0.0:
            if weight_ptr is None:
                w = (cols < n_cols).to(acc)
            else:
                w = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(acc)
            moved = tl.where(m == float("-inf"), 0.0, m_new - m)
            gap = tl.where(mask & (w != 0.0)[None, :], w[None, :] * (shift[:, None] - z), 0.0)
            spread += total * moved + tl.sum(gap, 1)
            total += tl.sum(w, 0)
        m = m_new

    rest += m - m  # NaN where m is infinite: a row with +inf, or with nothing but -inf, has no softmax
    d = rest + exp(z_y - m)
    log_d = tl.where(z_y == m, log1p(rest), tl.log(d))
    if weight_ptr is None:
        c_y = tl.zeros([BLOCK_M], acc) + (1.0 - eps)
    else:
        c_y = (1.0 - eps) * tl.load(weight_ptr + target, mask=valid, other=float("nan")).to(acc)
    loss = tl.where(c_y == 0.0, d * 0.0, c_y * ((m - z_y) + log_d))  # d * 0: still NaN where there is no softmax
    if eps != 0.0:
        loss += (eps / n_cols) * (total * log_d + spread)
    in_range = rows < n_rows
    tl.store(loss_ptr + rows, tl.where(active, loss, 0.0), mask=in_range)
    if max_ptr is not None:
        tl.store(max_ptr + rows, tl.where(active, m, 0.0), mask=in_range)
        tl.store(rest_ptr + rows, tl.where(active, rest, 0.0), mask=in_range)


@triton.jit
def backward_kernel(
    dloss_ptr,  # [n_rows], or one number with stride_dloss = 0
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    total_ptr,  # [1] sum of the class weights, or None: n_cols
    max_ptr,  # [n_rows] m
    rest_ptr,  # [n_rows]
    dlogits_ptr,  # [n_rows, n_cols] out, contiguous
    n_rows,
    n_cols,
    stride_dloss,
    stride_row,
    stride_col,
    stride_target,
    ignore_index,
    label_smoothing: tl.float64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    acc: tl.constexpr = rest_ptr.dtype.element_ty
    eps = scalar(label_smoothing, acc)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    target, active, valid = load_target(target_ptr, stride_target, rows, n_rows, n_cols, ignore_index)
    row_ptr = logits_ptr + rows * stride_row
    mask = active[:, None] & (cols < n_cols)[None, :]
    z = tl.load(row_ptr[:, None] + cols.to(tl.int64)[None, :] * stride_col, mask=mask, other=float("-inf")).to(acc)
    z_y = tl.load(row_ptr + target * stride_col, mask=valid, other=float("nan")).to(acc)
    m = tl.load(max_ptr + rows, mask=active, other=0.0)
    rest = tl.load(rest_ptr + rows, mask=active, other=0.0)
    dloss = tl.load(dloss_ptr + rows * stride_dloss, mask=active, other=0.0).to(acc)

    total = n_cols + tl.zeros((), acc)
    w = tl.full([BLOCK_N], 1.0, acc)
    w_y = tl.full([BLOCK_M], 1.0, acc)
    if total_ptr is not None:
        total = tl.load(total_ptr).to(acc)
        w = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(acc)
    if weight_ptr is not None:
        w_y = tl.load(weight_ptr + target, mask=valid, other=0.0).to(acc)
    a = (1.0 - eps) * w_y + eps / n_cols * total
    is_target = cols[None, :] == target[:, None]
    inverse_d = 1.0 / (rest + exp(z_y - m))  # a division a row, not a value
    p = tl.where(is_target, -rest[:, None], exp(z - m[:, None])) * inverse_d[:, None]
    c = tl.where(is_target, w_y[:, None] - total, w[None, :]) * (eps / n_cols)  # without c_y's own (1 - eps) * w_y
    dlogits = tl.where(active[:, None], (a[:, None] * p - c) * dloss[:, None], 0.0)
    out = dlogits_ptr + rows[:, None] * n_cols + cols[None, :]
    tl.store(out, dlogits.to(dlogits_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :])


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    needs_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, in float32 or float64, and what `backward` needs: m and rest of each row, and the mean's divisor."""
    n_rows, n_cols = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty(n_rows, dtype=acc)
    stats = [torch.empty_like(loss), torch.empty_like(loss)] if needs_grad else []
    block_m, block_n, num_warps = launch.tile(n_cols, acc.itemsize)
    with on_device_of(logits):
        forward_kernel[(launch.cdiv(n_rows, block_m),)](
            logits,
            target,
            weight,
            loss,
            *(stats or (None, None)),
            n_rows,
            n_cols,
            *logits.stride(),
            target.stride(0),
            ignore_index,
            label_smoothing,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
            **launch.OPTIONS,
        )
    if reduction == "none":
        return loss, stats
    if reduction == "sum":
        return loss.sum(), stats
    n = normalizer(target, weight, ignore_index, acc)
    return loss.sum() / n, [*stats, n]


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    stats: list[Tensor],
) -> Tensor:
    """The gradient of the logits, as a new contiguous [n_rows, n_cols] in their dtype."""
    n_rows, n_cols = logits.shape
    m, rest, *n = stats
    if reduction == "mean":
        dloss = dloss / n[0]
    dlogits = logits.new_empty(n_rows, n_cols)
    total = weight.sum(dtype=m.dtype) if weight is not None and label_smoothing else None
    block_m, block_n, num_warps = launch.tile(n_cols, m.itemsize)
    with on_device_of(logits):
        backward_kernel[(launch.cdiv(n_rows, block_m), launch.cdiv(n_cols, block_n))](
            dloss,
            logits,
            target,
            weight,
            total,
            m,
            rest,
            dlogits,
            n_rows,
            n_cols,
            dloss.stride(0) if reduction == "none" else 0,
            *logits.stride(),
            target.stride(0),
            ignore_index,
            label_smoothing,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
            **launch.OPTIONS,
        )
    return dlogits

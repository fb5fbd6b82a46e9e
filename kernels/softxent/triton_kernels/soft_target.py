"""Cross-entropy of each row of logits against a row of probabilities, and its gradients.

For one row z of n_cols logits with target row t, class weights w and label smoothing eps, with
c_j = w_j * ((1 - eps) * t_j + eps / n_cols) and a = sum_j c_j (reference.py):

    z     = softcap * tanh(logit_scale * x / softcap)     of logits x, or what is left of that
    m     = max_j z_j
    d     = sum_j exp(z_j - m)
    lse   = m + log d
    loss  = a * log d + sum_j c_j * (m - z_j) + zeta * lse^2        a class with c_j = 0 left out, whatever its logit
    dloss/dz_j = (a + 2 * zeta * lse) * exp(z_j - m) / d - c_j
    dloss/dt_j = (1 - eps) * w_j * (log d + (m - z_j))

The target need not sum to 1, nor be positive. Forward reads logits and target once; backward reads them once and writes
dlogits, and dtarget if it is wanted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from ..options import Inputs, Options
from .common import exp, finite_or_zero, load_sample_weight, logit_map, reciprocal, scalar, smoothing, times_slope
from .row_loss import numbers


@triton.jit
def load_weight(weight_ptr, cols, n_cols, dtype: tl.constexpr):
    if weight_ptr is None:
        w = (cols < n_cols).to(dtype)
    else:
        w = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(dtype)
    return w


@triton.jit
def counting(sample_weight_ptr, rows, n_rows):
    """Which rows there are, but for those of sample weight 0: they are not read."""
    active = rows < n_rows
    if sample_weight_ptr is not None:
        active = active & (tl.load(sample_weight_ptr + rows, mask=active, other=0.0) != 0.0)
    return active


@triton.jit
def forward_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows, n_cols]
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    loss_ptr,  # [n_rows] out
    max_ptr,  # [n_rows] out, or None: m
    sum_ptr,  # [n_rows] out, or None with max_ptr: d
    a_ptr,  # [n_rows] out, or None with max_ptr
    extras,  # Extras
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    stride_target_row,
    stride_target_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    acc: tl.constexpr = loss_ptr.dtype.element_ty
    eps, share = smoothing(extras, n_cols, acc)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < n_rows
    active = counting(sample_weight_ptr, rows, n_rows)
    m = tl.full([BLOCK_M], float("-inf"), acc)
    d = tl.zeros([BLOCK_M], acc)
    a = tl.zeros([BLOCK_M], acc)
    spread = tl.zeros([BLOCK_M], acc)  # sum_j c_j * (m - z_j)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        at = cols.to(tl.int64)[None, :]
        mask = active[:, None] & (cols < n_cols)[None, :]
        x = tl.load(logits_ptr + rows[:, None] * stride_row + at * stride_col, mask=mask, other=float("-inf"))
        z, _ = logit_map(x, mask, extras, acc)
        t_pos = target_ptr + rows[:, None] * stride_target_row + at * stride_target_col
        t = tl.load(t_pos, mask=mask, other=0.0).to(acc)
        c = load_weight(weight_ptr, cols, n_cols, acc)[None, :] * ((1.0 - eps) * t + share)
        m_new = tl.maximum(m, tl.max(z, 1))
        shift = finite_or_zero(m_new)
        d = d * exp(m - shift) + tl.sum(exp(z - shift[:, None]), 1)
        moved = tl.where(m == float("-inf"), 0.0, m_new - m)
        spread += a * moved + tl.sum(tl.where(mask & (c != 0.0), c * (shift[:, None] - z), 0.0), 1)
        a += tl.sum(tl.where(mask, c, 0.0), 1)
        m = m_new
    log_d = tl.log(d)
    loss = a * log_d + spread
    if extras.z_loss is not None:
        lse = m + log_d
        loss += scalar(extras.z_loss, acc) * lse * lse
    loss = tl.where(active, loss * load_sample_weight(sample_weight_ptr, rows, active, acc), 0.0)
    tl.store(loss_ptr + rows, loss, mask=in_range)
    if max_ptr is not None:
        tl.store(max_ptr + rows, m, mask=in_range)
        tl.store(sum_ptr + rows, d, mask=in_range)
        tl.store(a_ptr + rows, a, mask=in_range)


@triton.jit
def backward_kernel(
    dloss_ptr,  # [n_rows]
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows, n_cols]
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    max_ptr,  # [n_rows] m
    sum_ptr,  # [n_rows] d
    a_ptr,  # [n_rows]
    dlogits_ptr,  # [n_rows, n_cols] out, rows contiguous; may be the logits
    dtarget_ptr,  # [n_rows, n_cols] out, contiguous, or None
    extras,  # Extras
    n_rows,
    n_cols,
    stride_out,  # of dlogits
    stride_dloss,
    stride_row,
    stride_col,
    stride_target_row,
    stride_target_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    acc: tl.constexpr = max_ptr.dtype.element_ty
    eps, share = smoothing(extras, n_cols, acc)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = cols.to(tl.int64)[None, :]
    active = counting(sample_weight_ptr, rows, n_rows)
    written = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    mask = active[:, None] & written
    x = tl.load(logits_ptr + rows[:, None] * stride_row + at * stride_col, mask=mask, other=float("-inf"))
    z, slope = logit_map(x, mask, extras, acc)
    t_pos = target_ptr + rows[:, None] * stride_target_row + at * stride_target_col
    t = tl.load(t_pos, mask=mask, other=0.0).to(acc)
    m = tl.load(max_ptr + rows, mask=active, other=0.0)[:, None]
    d = tl.load(sum_ptr + rows, mask=active, other=1.0)[:, None]
    a = tl.load(a_ptr + rows, mask=active, other=0.0)[:, None]
    dloss = tl.load(dloss_ptr + rows * stride_dloss, mask=active, other=0.0).to(acc)
    dloss = (dloss * load_sample_weight(sample_weight_ptr, rows, active, acc))[:, None]
    log_d = tl.log(d)
    w = load_weight(weight_ptr, cols, n_cols, acc)[None, :]
    c = w * ((1.0 - eps) * t + share)
    if extras.z_loss is not None:
        a += 2.0 * scalar(extras.z_loss, acc) * (m + log_d)
    dlogits = times_slope(((a * reciprocal(d)) * exp(z - m) - c) * dloss, slope, extras)
    out = rows[:, None] * n_cols + cols[None, :]
    dlogits = tl.where(active[:, None], dlogits, 0.0).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows[:, None] * stride_out + cols[None, :], dlogits, mask=written)
    if dtarget_ptr is not None:
        dtarget = (1.0 - eps) * w * (log_d + (m - z)) * dloss
        dtarget = tl.where(active[:, None], dtarget, 0.0).to(dtarget_ptr.dtype.element_ty)
        tl.store(dtarget_ptr + out, dtarget, mask=written)


def _vectors(inputs: Inputs) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in (inputs.weight, inputs.sample_weight)]


def forward(inputs: Inputs, options: Options, needs_grad: bool) -> tuple[Tensor, list[Tensor]]:
    """The loss of each row [n_rows], in float32 or float64, and what `backward` needs: m, d and a of each row."""
    logits, target = inputs.logits, inputs.target
    n_rows, n_cols = logits.shape
    loss = logits.new_empty(n_rows, dtype=torch.promote_types(logits.dtype, torch.float32))
    stats = [torch.empty_like(loss) for _ in range(3)] if needs_grad else []
    block_m, block_n, num_warps = launch.tile(n_cols, loss.itemsize, n_matrices=2)
    with on_device_of(logits):
        forward_kernel[(launch.cdiv(n_rows, block_m),)](
            logits,
            target,
            *_vectors(inputs),
            loss,
            *(stats or (None, None, None)),
            numbers(inputs, options),
            n_rows,
            n_cols,
            *logits.stride(),
            *target.stride(),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
            **launch.OPTIONS,
        )
    return loss, stats


def backward(
    dloss: Tensor,  # [n_rows]
    inputs: Inputs,
    options: Options,
    needs_dtarget: bool,
    stats: list[Tensor],
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the logits and, if wanted, of the target, new and contiguous, in the dtypes of those."""
    logits, target = inputs.logits, inputs.target
    n_rows, n_cols = logits.shape
    dlogits = logits.detach() if inplace else logits.new_empty(n_rows, n_cols)
    dtarget = target.new_empty(n_rows, n_cols) if needs_dtarget else None
    block_m, block_n, num_warps = launch.tile(n_cols, stats[0].itemsize, n_matrices=2)
    with on_device_of(logits):
        backward_kernel[(launch.cdiv(n_rows, block_m), launch.cdiv(n_cols, block_n))](
            dloss,
            logits,
            target,
            *_vectors(inputs),
            *stats,
            dlogits,
            dtarget,
            numbers(inputs, options),
            n_rows,
            n_cols,
            dlogits.stride(0),
            dloss.stride(0),
            *logits.stride(),
            *target.stride(),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
            **launch.OPTIONS,
        )
    return dlogits, dtarget

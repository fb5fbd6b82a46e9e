"""The formula in plain torch: slow, readable, right in float64. Every other implementation is tested against it.

For one row z of n_cols logits, with coefficients c_j (what the row should have predicted) and a = sum_j c_j:

    m     = max_j z_j = z_k
    rest  = sum_{j != k} exp(z_j - m)                 every exponent is <= 0
    loss  = a * log(1 + rest) + sum_j c_j * (m - z_j)
    dloss/dz_j = a * p_j - c_j,                       p_j = exp(z_j - m) / (1 + rest)
    dloss/dc_j = log(1 + rest) + (m - z_j)            = -log p_j

With class weights w and label smoothing eps, PyTorch's cross-entropy is the choice

    c_j = (1 - eps) * w_y * [j == y] + (eps / n_cols) * w_j         for a class index y; c = 0 for an ignored row
    c_j = w_j * ((1 - eps) * t_j + eps / n_cols)                    for a row of probabilities t

A term with c_j = 0 is selected out, never multiplied: 0 * inf is NaN. Leaving the largest term out of `rest` keeps
log1p exact where the model is confident: log(1 + 1e-9) is 0 in float32, log1p(1e-9) is not.

All of it may be differentiated, batched by vmap, and pushed forward: it also serves where autograd asks for more than a
gradient.

Source: torch.nn.functional.cross_entropy; log-sum-exp as in Blanchard, Higham and Higham (2021), "Accurately computing
the log-sum-exp and softmax functions", which leaves the largest term out of the sum likewise.
"""

import torch
from torch import Tensor


def coefficients(
    target: Tensor,  # [n_rows] int, or [n_rows, n_cols] floating point
    n_cols: int,
    weight: Tensor | None,  # [n_cols]
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """c, the target rows [n_rows, n_cols], in `dtype`."""
    w = torch.ones(n_cols, dtype=dtype, device=target.device) if weight is None else weight.to(dtype)
    smooth = w * (label_smoothing / n_cols)
    if target.is_floating_point():
        return (1 - label_smoothing) * w * target.to(dtype) + smooth
    y = target.long()[:, None]
    ignored = y == ignore_index
    missing = ((y < 0) | (y >= n_cols)) & ~ignored  # NaN, as from the kernels
    one_hot = (torch.arange(n_cols, device=target.device) == y).to(dtype)
    c = (1 - label_smoothing) * w[y.clamp(0, n_cols - 1)] * one_hot + smooth
    return c.masked_fill(missing, float("nan")).masked_fill(ignored, 0)


def row_loss(
    logits: Tensor,  # [n_rows, n_cols]
    target: Tensor,  # [n_rows] int, or [n_rows, n_cols] floating point
    weight: Tensor | None = None,  # [n_cols]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each row, [n_rows], in float64 for float64 logits and in float32 otherwise."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not target.is_floating_point():
        z = z.masked_fill((target.long() == ignore_index)[:, None], 0)  # before any arithmetic: it may hold NaN
    c = coefficients(target, z.shape[1], weight, ignore_index, label_smoothing, z.dtype)
    k = z.detach().argmax(1, keepdim=True)
    is_max = torch.arange(z.shape[1], device=z.device) == k
    m = z.gather(1, k)
    rest = (z - m).exp().masked_fill(is_max, 0).sum(1) + (m - m)[:, 0]  # + NaN where m is infinite
    # z_k's own gap is 0 whatever z_k is: selected out too, or autograd would add 1 and -1 to a gradient of 1e-18.
    spread = torch.where(is_max | (c == 0), 0, c * (m - z)).sum(1)
    return c.sum(1) * rest.log1p() + spread


def softmax_xent(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`row_loss` reduced as torch.nn.functional.cross_entropy does.

    The mean divides by the sum of the weights of the targets that count; by the number of rows for probabilities.
    """
    loss = row_loss(logits, target, weight, ignore_index, label_smoothing)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if target.is_floating_point():
        return loss.sum() / len(loss)
    kept = target.long() != ignore_index
    w = torch.ones_like(loss)
    if weight is not None:
        w = weight.to(loss.dtype)[target.long().clamp(0, len(weight) - 1)]
    return loss.sum() / w.masked_fill(~kept, 0).sum()


def softmax(z: Tensor) -> Tensor:
    """p_j = exp(z_j - m) / sum_k exp(z_k - m) along the last dimension."""
    e = (z - z.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def log_softmax(z: Tensor) -> Tensor:
    """log p_j = (z_j - m) - log sum_k exp(z_k - m) along the last dimension."""
    s = z - z.amax(-1, keepdim=True)
    return s - s.exp().sum(-1, keepdim=True).log()


def softmax_gradient(dp: Tensor, p: Tensor) -> Tensor:
    """dz_j = p_j * (dp_j - sum_k dp_k * p_k)"""
    return p * (dp - (dp * p).sum(-1, keepdim=True))


def log_softmax_gradient(dq: Tensor, q: Tensor) -> Tensor:
    """dz_j = dq_j - p_j * sum_k dq_k,  q = log p"""
    return dq - q.exp() * dq.sum(-1, keepdim=True)

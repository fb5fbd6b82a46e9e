"""Cross-entropy of each row of logits against a row of probabilities, in torch operations.

Same mathematics as triton_kernels/soft_target.py, from log p = log_softmax(z), some rows at a time:

    loss       = -sum_j c_j * log p_j
    dloss/dz_j = a * p_j - c_j
    dloss/dt_j = -(1 - eps) * w_j * log p_j
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .row_loss import sum_rows

CHUNK = 1 << 19  # values of log p at a time


def forward(
    logits: Tensor,  # [n_rows, n_cols] any strides
    target: Tensor,  # [n_rows, n_cols] floating point, any strides
    weight: Tensor | None,  # [n_cols]
    label_smoothing: float,
    needs_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of each row [n_rows], in float32 or float64. `backward` needs nothing more."""
    losses = [
        sum_rows(torch.where(c == 0, 0, c * log_p))[:, 0].neg_()
        for _, log_p, c in _chunks(logits, target, weight, label_smoothing)
    ]
    return torch.cat(losses), []


def backward(
    dloss: Tensor,  # [n_rows]
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    needs_dtarget: bool,
    stats: list[Tensor],
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the logits and, if wanted, of the target, in the dtypes of those."""
    dlogits = logits.detach() if inplace else logits.new_empty(logits.shape)
    dtarget = target.new_empty(target.shape) if needs_dtarget else None
    for rows, log_p, c in _chunks(logits, target, weight, label_smoothing):
        if dtarget is not None:
            w = 1 if weight is None else weight.to(log_p.dtype)
            dtarget[rows] = log_p * w * (label_smoothing - 1) * dloss[rows, None]
        a = sum_rows(c)
        dlogits[rows] = log_p.exp_().mul_(a).sub_(c).mul_(dloss[rows, None])
    return dlogits, dtarget


def _chunks(
    logits: Tensor, target: Tensor, weight: Tensor | None, eps: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their log p, and their coefficients c_j = w_j * ((1 - eps) * t_j + eps / n_cols)."""
    n_rows, n_cols = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, CHUNK // n_cols)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        c = target[rows].to(acc)
        if eps:
            c = c * (1 - eps) + eps / n_cols
        if weight is not None:
            c = c * weight.to(acc)
        yield rows, torch.log_softmax(logits[rows].to(acc), 1), c

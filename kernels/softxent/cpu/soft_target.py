"""Cross-entropy of rows of logits against rows of probabilities, in torch operations.

Same mathematics as triton_kernels/formula.py, from log p = log_softmax(z), some rows at a time, k the largest:

    lse        = z_k - log p_k
    loss       = -sum_j c_j * log p_j + zeta * lse^2
    dloss/dz_j = (a + 2 * zeta * lse) * p_j - c_j
    dloss/dt_j = -(1 - eps) * w_j * log p_j

all of it times the sample weight of the row, and over n for the mean. The gradients are made in backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..options import Inputs, Options, Stats
from .row_loss import map_, slope, sum_rows

CHUNK = 1 << 19  # values of log p at a time
MANY = 1024  # classes: torch sums the exponentials of more in a few long chains, and loses digits


def forward(
    inputs: Inputs, options: Options, dtype: torch.dtype, needs_grad: bool, inplace: bool, wanted: frozenset[str]
) -> tuple[Tensor, Stats, list[Any]]:
    """The loss in `dtype`, no stats, and that no gradient is kept for `backward`."""
    losses = []
    for _, log_p, c, lse in _chunks(inputs, options):
        loss = sum_rows(c * log_p)[:, 0].neg_()
        unclear = loss.isnan()
        if unclear.any():  # 0 * log 0, most likely, which is 0
            c, log_p = c[unclear], log_p[unclear]
            loss[unclear] = sum_rows(torch.where(c == 0, 0, c * log_p))[:, 0].neg_()
        losses.append(loss if lse is None else loss + options.z_loss * lse[:, 0] ** 2)
    loss = torch.cat(losses)
    if inputs.sample_weight is not None:
        loss = torch.where(inputs.sample_weight == 0, 0, loss * inputs.sample_weight.to(loss.dtype))
    if options.reduction != "none":
        loss = loss.sum() / _divisor(inputs, options)
    return loss.to(dtype), Stats(), [None, None]


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    dstats: Stats,
    inputs: Inputs,
    options: Options,
    kept: list[Any],
    inplace: bool,
    needs_dlogits: bool,
    needs_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logits and target that are wanted, each in its dtype."""
    logits, target, weight, sample_weight, _, _ = inputs
    dlogits = (logits.detach() if inplace else logits.new_empty(logits.shape)) if needs_dlogits else None
    dtarget = target.new_empty(target.shape) if needs_dtarget else None
    dloss = dloss.to(torch.promote_types(logits.dtype, torch.float32))
    if options.reduction != "none":
        dloss = (dloss / _divisor(inputs, options)).expand(len(logits))
    if sample_weight is not None:
        dloss = dloss * sample_weight.to(dloss.dtype)
    for rows, log_p, c, lse in _chunks(inputs, options):
        skipped = None if sample_weight is None else (sample_weight[rows] == 0)[:, None]
        r = dloss[rows, None]
        if dtarget is not None:
            w = 1 if weight is None else weight.to(log_p.dtype)
            found = log_p * w * (options.label_smoothing - 1) * r
            dtarget[rows] = found if skipped is None else found.masked_fill_(skipped, 0)
        if dlogits is None:
            continue
        a = sum_rows(c)
        if lse is not None:
            a = a + 2 * options.z_loss * lse
        found = log_p.exp_().mul_(a).sub_(c).mul_(r)
        if options.maps(inputs):
            found.mul_(slope(logits[rows].to(found.dtype), inputs, options))
        dlogits[rows] = found if skipped is None else found.masked_fill_(skipped, 0)
    return dlogits, dtarget


def _divisor(inputs: Inputs, options: Options) -> Tensor | int:
    if options.reduction == "sum":
        return 1
    return len(inputs.logits) if inputs.normalizer is None else inputs.normalizer[0]


def _chunks(inputs: Inputs, options: Options) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Rows, their log p, their coefficients c_j = w_j * ((1 - eps) * t_j + eps / n_cols), and lse for a z-loss.

    The two matrices are scratch, which the next rows are written over.
    """
    logits, target, weight = inputs[:3]
    eps = options.label_smoothing
    n_rows, n_cols = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    step = min(n_rows, max(1, CHUNK // n_cols))
    mapped = options.maps(inputs)
    scratch = logits.new_empty(3, step, n_cols, dtype=acc)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        log_p, c, z = scratch[:, : min(step, n_rows - start)]
        c.copy_(target[rows])
        if eps:
            c.mul_(1 - eps).add_(eps / n_cols)
        if weight is not None:
            c.mul_(weight.to(acc))
        if mapped or logits.dtype != acc:
            z.copy_(logits[rows])
        else:
            z = logits[rows]
        if mapped:
            map_(z, inputs, options)
        torch.log_softmax(z, 1, out=log_p)
        if n_cols > MANY:
            log_p.sub_(sum_rows(log_p.exp()).log_())
        lse = None
        if options.z_loss:
            k = z.argmax(1, keepdim=True)
            lse = z.gather(1, k) - log_p.gather(1, k)
        yield rows, log_p, c, lse

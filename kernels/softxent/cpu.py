"""The row loss in torch operations: what a CPU tensor gets, and any other device without kernels.

Same mathematics as triton_kernels/row_loss.py, arranged for what torch does fast. With p = softmax(z) and target y:

    miss       = sum_{j != y} p_j             = rest / d: 1 - p_y without the subtraction
    -log p_y   = log1p(miss / p_y)            exact at both ends
    dloss/dz_j =  a * p_j  - c_j              j != y
    dloss/dz_y = -a * miss + (a - c_y)

Forward leaves this gradient in the buffer that becomes dlogits, and the first backward pass scales it in place: one
softmax a step, and no second matrix. float16 could flush it to zero before a loss scale lifts it, so there, and in any
later backward pass on the same graph, it is computed again. Half precision goes through a float32 scratch of some rows.
"""

import math

import torch
from torch import Tensor

CHUNK = 1 << 20  # values in the rows that are worked on at a time: 4 MiB of float32


def forward(
    logits: Tensor,  # [n_rows, n_cols] any strides
    target: Tensor,  # [n_rows] int
    weight: Tensor | None,  # [n_cols]
    ignore_index: int,
    label_smoothing: float,
    needs_grad: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of each row [n_rows], and what `backward` wants: its gradient, where that is worth keeping.

    Raises IndexError for a target that is neither `ignore_index` nor in [0, n_cols).
    """
    dlogits = logits.new_empty(logits.shape) if needs_grad and logits.dtype != torch.float16 else None
    y, ignored = _classes(target, logits.shape[1], ignore_index)
    return _in_chunks(logits, y, ignored, weight, label_smoothing, dlogits, None), [dlogits, ignored]


def backward(
    dloss: Tensor,  # [n_rows]
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    stats: list[Tensor | None],
) -> Tensor:
    """dloss/dlogits times dloss, in the dtype of the logits. Takes the gradient that `forward` left, if it is there."""
    (dlogits, ignored), stats[0] = stats, None
    if dlogits is None:
        dlogits = logits.new_empty(logits.shape)
        y, ignored = _classes(target, logits.shape[1], ignore_index)
        _in_chunks(logits, y, ignored, weight, label_smoothing, dlogits, dloss)
        return dlogits
    dloss = dloss[:, None]
    if ignored is not None:  # dloss is infinite in the mean over no row at all, and 0 * inf is NaN
        dloss = dloss.masked_fill(ignored, 0)
    return dlogits.mul_(dloss)


def _in_chunks(
    logits: Tensor,
    y: Tensor,  # [n_rows] int64
    ignored: Tensor | None,  # [n_rows, 1] bool
    weight: Tensor | None,
    label_smoothing: float,
    dlogits: Tensor | None,  # [n_rows, n_cols] out
    dloss: Tensor | None,  # [n_rows], or None: 1
) -> Tensor:
    """The loss of each row; in `dlogits` its gradient times `dloss`."""
    n_rows, n_cols = logits.shape
    w = None if weight is None else weight.to(torch.promote_types(logits.dtype, torch.float32))
    step = max(1, CHUNK // n_cols)
    if n_rows <= step:
        return _rows(logits, y, ignored, w, label_smoothing, dlogits, dloss)
    tensors = (logits, y, ignored, dlogits, dloss)
    losses = []
    for start in range(0, n_rows, step):
        z, y_, ignored_, dlogits_, dloss_ = (None if t is None else t[start : start + step] for t in tensors)
        assert z is not None and y_ is not None
        losses.append(_rows(z, y_, ignored_, w, label_smoothing, dlogits_, dloss_))
    return torch.cat(losses)


def _rows(
    logits: Tensor,
    y: Tensor,
    ignored: Tensor | None,
    w: Tensor | None,
    eps: float,
    dlogits: Tensor | None,
    dloss: Tensor | None,
) -> Tensor:
    n_cols = logits.shape[1]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = torch.softmax(z, 1, out=dlogits) if dlogits is not None and dlogits.dtype == z.dtype else torch.softmax(z, 1)
    y = y[:, None]
    p_y = p.gather(1, y)
    miss = p.scatter_(1, y, 0).sum(1, keepdim=True)
    loss = _minus_log(p_y, miss, z, y)
    w_y = None if w is None else w[y]
    if w_y is not None:
        loss = torch.where(w_y == 0, 0, loss * w_y)
    if eps:
        smooth = _minus_log_sum(z, w) * (eps / n_cols)
        loss = smooth if eps == 1 else smooth.add_(loss, alpha=1 - eps)
    if ignored is not None:
        loss.masked_fill_(ignored, 0)
    if dlogits is None:
        return loss[:, 0]
    p.scatter_(1, y, miss.neg_())
    total = n_cols if w is None else w.sum()
    if w_y is not None or eps:
        p.mul_((1 - eps) * (1 if w_y is None else w_y) + eps / n_cols * total)  # a
    if eps:
        p.sub_(eps / n_cols if w is None else eps / n_cols * w)
        p.scatter_add_(1, y, torch.full_like(p_y, eps / n_cols).mul_(total))
    if dloss is not None:
        p.mul_(dloss[:, None])
    if ignored is not None:
        p.masked_fill_(ignored, 0)
    if p is not dlogits:
        dlogits.copy_(p)
    return loss[:, 0]


def _classes(target: Tensor, n_cols: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """The target as int64 classes that exist, and where it is ignored [n_rows, 1]: None where no row is."""
    y = target.long()
    low, high = (v.item() for v in torch.aminmax(y))
    if low >= 0 and high < n_cols and not low <= ignore_index <= high:
        return y, None
    ignored = y == ignore_index
    bad = ((y < 0) | (y >= n_cols)) & ~ignored
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise IndexError(
            f"target {int(y[row])} at row {row} is out of bounds for {n_cols} classes "
            f"(and is not ignore_index = {ignore_index})"
        )
    return y.masked_fill(ignored, 0), ignored[:, None]


def _minus_log(p_y: Tensor, miss: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """-log p_y [n_rows, 1]: from miss / p_y, or from the logits for rows whose p_y is subnormal, or 0."""
    largest = -math.log(8 * torch.finfo(z.dtype).tiny)
    loss = (miss / p_y).log1p_()
    if not loss.max().item() < largest:  # NaN comes here too, and leaves as NaN
        rows = (~(loss < largest))[:, 0]
        z, y = z[rows], y[rows]
        m = z.amax(1, keepdim=True)
        loss[rows] = (m - z.gather(1, y)) + (z - m).exp_().sum(1, keepdim=True).log_()
    return loss


def _minus_log_sum(z: Tensor, w: Tensor | None) -> Tensor:
    """sum_j w_j * -log p_j [n_rows, 1]; a class of weight 0 is left out, whatever its logit."""
    log_p = torch.log_softmax(z, 1)
    if w is not None:
        log_p = torch.where(w == 0, 0, log_p * w)
    return log_p.sum(1, keepdim=True).neg_()

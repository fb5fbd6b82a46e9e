"""Cross-entropy of each row of logits against its target class, in torch operations.

The mathematics of triton_kernels/common.py, where c and a are defined, arranged for what torch does fast. With
p = softmax(z) and target y:

    miss       = sum_{j != y} p_j             1 - p_y without the subtraction
    -log p_y   = log1p(miss / p_y)            exact at both ends
    dloss/dz_j =  a * p_j  - c_j              j != y
    dloss/dz_y = eps / n_cols * (sum_k w_k * p_y - w_y) - (1 - eps) * w_y * miss

Forward leaves the gradient, with the mean's 1 / n in it, in the buffer that becomes dlogits, and the first backward
pass multiplies it by the incoming gradient unless that is 1: one softmax a step (two under label smoothing), and no
second matrix. It is computed again in any later backward pass on the same graph, and for float16, which could flush it
to zero before a loss scale lifts it, and for bfloat16 where each row has a factor of its own. Half precision goes
through a float32 scratch of some rows.
"""

import math

import torch
from torch import Tensor

from ..normalizer import normalizer

CHUNK = 1 << 19  # values in the scratch: 2 MiB of float32
FEW = 64  # classes


def forward(
    logits: Tensor,  # [n_rows, n_cols] any strides
    target: Tensor,  # [n_rows] int
    weight: Tensor | None,  # [n_cols]
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
    needs_grad: bool,
    inplace: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss in `dtype`, and what `backward` wants: its gradient, where that is worth keeping.

    Raises IndexError for a target that is neither `ignore_index` nor in [0, n_cols).
    """
    y, ignored = _classes(target, logits.shape[1], ignore_index)
    factor = _factor(target, ignored, weight, ignore_index, reduction, logits)
    now = needs_grad and _survives_a_factor(logits, reduction)
    dlogits = _gradient_like(logits, inplace) if now else None
    loss = _in_chunks(logits, y, ignored, weight, label_smoothing, dlogits, factor)
    if reduction != "none":
        loss = loss.sum()
    return (loss if factor is None else loss * factor).to(dtype), [dlogits, ignored]


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    kept: list[Tensor | None],
    inplace: bool,
) -> Tensor:
    """The gradient of the logits, in their dtype: that which `forward` left, if it is still there."""
    (dlogits, ignored), kept[0] = kept, None
    dloss = dloss.to(torch.promote_types(logits.dtype, torch.float32))
    if dlogits is None:
        y, ignored = _classes(target, logits.shape[1], ignore_index)
        factor = _factor(target, ignored, weight, ignore_index, reduction, logits)
        dlogits = _gradient_like(logits, inplace)
        if not _survives_a_factor(logits, reduction):
            both = dloss if factor is None else dloss * factor
            _in_chunks(logits, y, ignored, weight, label_smoothing, dlogits, both)
            return dlogits
        _in_chunks(logits, y, ignored, weight, label_smoothing, dlogits, factor)  # the first pass's, bit for bit
    if dloss.dim() == 0:
        scale = dloss.item()
        # Ignored rows are 0 already, and stay so: 0 * inf is NaN.
        return dlogits if scale == 1 else _rows_times(dlogits, dloss, None if math.isfinite(scale) else ignored)
    return _rows_times(dlogits, dloss[:, None], ignored)


def _gradient_like(logits: Tensor, inplace: bool) -> Tensor:
    return logits.detach() if inplace else logits.new_empty(logits.shape)


def _survives_a_factor(logits: Tensor, reduction: str) -> bool:
    """Whether the gradient may be rounded to the dtype of the logits before the incoming gradient multiplies it."""
    return logits.itemsize >= 4 or (logits.dtype == torch.bfloat16 and reduction != "none")


def _factor(
    target: Tensor, ignored: Tensor | None, weight: Tensor | None, ignore_index: int, reduction: str, logits: Tensor
) -> Tensor | float | None:
    """1 / n for the mean; None where there is none."""
    if reduction != "mean":
        return None
    if ignored is None and weight is None:
        return 1 / len(target)
    acc = torch.promote_types(logits.dtype, torch.float32)
    return 1 / normalizer(target, weight, ignore_index, acc).to(acc)


def _rows_times(dlogits: Tensor, scale: Tensor, ignored: Tensor | None) -> Tensor:
    return dlogits.mul_(scale if ignored is None else torch.where(ignored[:, None], 0, scale))


def _in_chunks(
    logits: Tensor,
    y: Tensor,  # [n_rows] int64
    ignored: Tensor | None,  # [n_rows] bool
    weight: Tensor | None,
    eps: float,
    dlogits: Tensor | None,  # [n_rows, n_cols] out; may be the logits
    scale: Tensor | float | None,  # of the gradient: [n_rows], a number, or None: 1
) -> Tensor:
    """The loss of each row, unscaled, and its gradient times `scale` in `dlogits`."""
    n_rows, n_cols = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    w = None if weight is None else weight.to(acc)
    if dlogits is not None and dlogits.dtype == acc and dlogits.data_ptr() != logits.data_ptr():
        step, scratch = n_rows, dlogits
    else:
        step = min(n_rows, max(1, CHUNK // n_cols))
        scratch = logits.new_empty(step, n_cols, dtype=acc)
    if n_rows <= step:
        return _rows(logits, y, ignored, w, eps, dlogits, scale, scratch)
    losses = []
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        z = logits[part]
        losses.append(
            _rows(
                z,
                y[part],
                None if ignored is None else ignored[part],
                w,
                eps,
                None if dlogits is None else dlogits[part],
                scale[part] if isinstance(scale, Tensor) and scale.dim() else scale,
                scratch[: len(z)],
            )
        )
    return torch.cat(losses)


def _rows(
    logits: Tensor,
    y: Tensor,
    ignored: Tensor | None,
    w: Tensor | None,
    eps: float,
    dlogits: Tensor | None,
    scale: Tensor | float | None,
    p: Tensor,  # scratch in the dtype of the computation, or dlogits itself
) -> Tensor:
    n_cols = logits.shape[1]
    torch.softmax(logits if logits.dtype == p.dtype else p.copy_(logits), 1, out=p)
    y = y[:, None]
    p_y = p.gather(1, y)
    miss = sum_rows(p.scatter_(1, y, 0))
    loss = _minus_log(p_y, miss, logits, y)
    w_y = None if w is None else w[y]
    if w_y is not None:
        loss = torch.where(w_y == 0, miss * 0, loss * w_y)  # miss * 0: still NaN where there is no softmax
    if eps:
        smooth = _minus_log_sum(logits, w, p.dtype) * (eps / n_cols)
        loss = smooth if eps == 1 else smooth.add_(loss, alpha=1 - eps)
    if ignored is not None:
        loss.masked_fill_(ignored[:, None], 0)
    if dlogits is None:
        return loss[:, 0]
    # torch's softmax of a long row sums to 1 only to some 50 roundings.
    factor: Tensor | float = 1.0 if n_cols <= FEW else (p_y + miss).reciprocal_()
    if eps:
        share, hard = eps / n_cols, (1 - eps) * (1 if w_y is None else w_y)
        total = n_cols if w is None else w.sum()
        at_target = factor * (p_y * (share * total) - miss * hard) - share * (1 if w_y is None else w_y)
        p.mul_(factor * (hard + share * total))  # a
        p.sub_(share if w is None else share * w)
        p.scatter_(1, y, at_target)
        factor = 1.0
    else:
        p.scatter_(1, y, miss.neg_())
        factor = factor if w_y is None else factor * w_y
    if scale is not None:
        factor = factor * (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)
    if isinstance(factor, Tensor) or factor != 1:
        p.mul_(factor)
    if ignored is not None:
        p.masked_fill_(ignored[:, None], 0)
    if p is not dlogits:
        dlogits.copy_(p)
    return loss[:, 0]


def _classes(target: Tensor, n_cols: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """The target as int64 classes that exist, and where it is ignored: None where no row is."""
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
    return y.masked_fill(ignored, 0), ignored


def _minus_log(p_y: Tensor, miss: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y [n_rows, 1]: from miss / p_y, or from the logits for rows whose p_y is subnormal, or 0."""
    largest = -math.log(8 * torch.finfo(p_y.dtype).tiny)
    loss = (miss / p_y).log1p_()
    if not loss.max().item() < largest:  # NaN comes here too, and leaves as NaN
        rows = (~(loss < largest))[:, 0]
        z, y = logits[rows].to(p_y.dtype), y[rows]
        m = z.amax(1, keepdim=True)
        loss[rows] = (m - z.gather(1, y)) + sum_rows((z - m).exp_()).log_()
    return loss


def _minus_log_sum(logits: Tensor, w: Tensor | None, acc: torch.dtype) -> Tensor:
    """sum_j w_j * -log p_j [n_rows, 1]; a class of weight 0 is left out, whatever its logit."""
    sums = []
    for z in logits.split(max(1, CHUNK // logits.shape[1])):
        log_p = torch.log_softmax(z.to(acc), 1)
        sums.append(sum_rows(log_p if w is None else torch.where(w == 0, 0, log_p * w)))
    return torch.cat(sums).neg_()


def sum_rows(values: Tensor) -> Tensor:
    """Of each row [n_rows, 1]. One row alone is summed as two are: torch would split it among the threads, and a row's
    bits would depend on its batch."""
    return values.sum(1, keepdim=True) if len(values) > 1 else values.expand(2, -1).sum(1, keepdim=True)[:1]

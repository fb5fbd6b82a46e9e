"""Cross-entropy of rows of logits against rows of probabilities, in torch operations.

The mathematics of triton_kernels/formula.py, with one exponential a value, some rows at a time, m the largest:

    d          = sum_j exp(z_j - m)
    loss       = a * log d - sum_j c_j * (z_j - m) + zeta * lse^2          lse = m + log d
    dloss/dz_j = (a + 2 * zeta * lse) * exp(z_j - m) / d - c_j
    dloss/dt_j = -(1 - eps) * w_j * ((z_j - m) - log d)

all of it times the sample weight of the row, and over n for the mean. Forward leaves the gradients for backward to
multiply by the incoming one, as row_loss.py does, and where it cannot they are made in backward.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import Inputs, Options, Stats
from . import row_loss
from .row_loss import CHUNK, map_, slope, sum_rows

Gradients = tuple[Tensor | None, Tensor | None]  # of logits and target, those that are wanted


def forward(
    inputs: Inputs, options: Options, dtype: torch.dtype, needs_grad: bool, inplace: bool, wanted: frozenset[str]
) -> tuple[Tensor, Stats, list[Any]]:
    """The loss in `dtype`, no stats, and what `scaled` wants: the gradients, where they are worth keeping."""
    logits, target, v = inputs.logits, inputs.target, inputs.sample_weight
    made: Gradients = (None, None)
    if needs_grad and _at_once(inputs, options, target.requires_grad):
        made = _empty(inputs, inplace, logits.requires_grad or not target.requires_grad, target.requires_grad)
    divisor = _divisor(inputs, options)
    loss = _in_chunks(inputs, options, float(1 / divisor), made)
    if options.reduction != "none":
        loss = loss.sum() / divisor
    copied = options.reduction == "none"  # a view may not be edited
    return loss.to(dtype, copy=copied), Stats(), [*made, None if v is None else v == 0]


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    dstats: Stats,
    inputs: Inputs,
    options: Options,
    kept: list[Any],
    inplace: bool,
    needs_dlogits: bool,
    needs_dtarget: bool,
) -> Gradients:
    """The gradients of logits and target that are wanted, each in its dtype, made anew."""
    made = _empty(inputs, inplace, needs_dlogits, needs_dtarget)
    scale = float(1 / _divisor(inputs, options))
    if _at_once(inputs, options, needs_dtarget):  # the bits of `forward`
        _in_chunks(inputs, options, scale, made)
        v = inputs.sample_weight
        return scaled(dloss, [*made, None if v is None else v == 0], inplace)
    dloss = dloss.to(torch.promote_types(inputs.logits.dtype, torch.float32))
    _in_chunks(inputs, options, (dloss * scale).expand(len(inputs.logits)), made)
    return made


def scaled(dloss: Tensor, kept: list[Any], inplace: bool) -> Gradients:
    """The gradients that `forward` left, times the incoming one."""
    (dlogits, dtarget, skipped), kept[:2] = kept, (None, None)
    dlogits, dtarget = (
        None if x is None else row_loss.scaled(dloss, [x, None, skipped], inplace)[0] for x in (dlogits, dtarget)
    )
    return dlogits, dtarget


def _at_once(inputs: Inputs, options: Options, needs_dtarget: bool) -> bool:
    """Whether the gradients are made in forward, and rounded before the incoming one multiplies them."""
    halves = inputs.logits.dtype, inputs.target.dtype if needs_dtarget else None
    return options.reduction != "none" and torch.float16 not in halves


def _empty(inputs: Inputs, inplace: bool, needs_dlogits: bool, needs_dtarget: bool) -> Gradients:
    logits, target = inputs.logits, inputs.target
    dlogits = (logits.detach() if inplace else logits.new_empty(logits.shape)) if needs_dlogits else None
    return dlogits, target.new_empty(target.shape) if needs_dtarget else None


def _divisor(inputs: Inputs, options: Options) -> Tensor | int:
    if options.reduction != "mean":
        return 1
    return len(inputs.logits) if inputs.normalizer is None else inputs.normalizer[0]


def _in_chunks(inputs: Inputs, options: Options, scale: Tensor | float, gradients: Gradients) -> Tensor:
    """The loss of each row, with its sample weight, and the gradients, times `scale` besides: [n_rows] or a number."""
    logits, target, weight, v = inputs[:4]
    n_rows, n_cols = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    if weight is not None:
        inputs = inputs._replace(weight=weight.to(acc))
    if v is not None:
        scale = scale * v.to(acc)
    if isinstance(scale, Tensor):
        scale = scale[:, None]
    step = max(1, CHUNK // n_cols)
    dlogits = gradients[0]
    direct = dlogits is not None and dlogits.dtype == acc and dlogits.data_ptr() != logits.data_ptr()
    as_it_is = target.dtype == acc and weight is None and not options.label_smoothing
    spared = False, direct, as_it_is
    scratch = [None if x else logits.new_empty(min(step, n_rows), n_cols, dtype=acc) for x in spared]
    if n_rows <= step:
        loss = _step(inputs, options, scale, gradients, scratch)
    else:
        losses = []
        for start in range(0, n_rows, step):
            rows = slice(start, start + step)
            some = inputs._replace(logits=logits[rows], target=target[rows])
            of_some = scale[rows] if isinstance(scale, Tensor) else scale
            made = [None if x is None else x[rows] for x in gradients]
            room = [None if x is None else x[: len(some.logits)] for x in scratch]
            losses.append(_step(some, options, of_some, made, room))
        loss = torch.cat(losses)
    loss = loss[:, 0]
    if v is not None:
        loss = loss * v.to(acc)
        for x in (loss, *gradients):
            if x is not None:
                x[v == 0] = 0
    return loss


def _step(
    inputs: Inputs,
    options: Options,
    scale: Tensor | float,  # [n_rows, 1] or a number
    gradients: Sequence[Tensor | None],
    scratch: Sequence[Tensor | None],  # in the dtype of the computation; in the place of e dlogits, of c the target
) -> Tensor:
    """The loss [n_rows, 1] and the gradients of some rows."""
    (logits, target, weight), (dlogits, dtarget), (behind, e, c) = inputs[:3], gradients, scratch
    eps, zeta = options.label_smoothing, options.z_loss
    e = dlogits if e is None else e
    assert behind is not None and e is not None
    z = logits
    if options.maps(inputs):
        z = map_(behind.copy_(logits), inputs, options)
    elif logits.dtype != behind.dtype:
        z = behind.copy_(logits)
    c = target if c is None else c.copy_(target)
    if eps:
        c.mul_(1 - eps).add_(eps / c.shape[1])
    if weight is not None:
        c.mul_(weight)
    m = z.amax(1, keepdim=True)
    torch.sub(z, m, out=behind)
    dot = sum_rows(torch.mul(c, behind, out=e))
    if math.isnan(dot.sum()):  # 0 * log 0, most likely, which is 0
        dot = sum_rows(e.masked_fill_(c == 0, 0))
    torch.exp(behind, out=e)  # exp2 takes half as long, but has other bits in the last values of a tensor
    d, a = sum_rows(e), sum_rows(c)
    log_d = d.log()
    loss = a * log_d - dot
    if zeta:
        lse = m + log_d
        loss += zeta * lse**2
        a += 2 * zeta * lse
    if dtarget is not None:
        log_p = behind.sub_(log_d)
        if weight is not None:
            log_p.mul_(weight)
        torch.mul(log_p, (eps - 1) * scale, out=dtarget)
    if dlogits is not None:
        if isinstance(scale, Tensor):
            e.mul_(a / d).sub_(c).mul_(scale)
        else:
            e.mul_(scale * a / d).sub_(c, alpha=scale)
        if options.maps(inputs):
            e.mul_(slope(logits.to(e.dtype), inputs, options))
        if e.data_ptr() != dlogits.data_ptr():
            dlogits.copy_(e)
    return loss

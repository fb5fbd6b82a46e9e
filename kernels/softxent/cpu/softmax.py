"""softmax and log_softmax of very long rows of float32, in torch operations, of which torch's own drift:

p = softmax(z) / sum(softmax(z))            q = (z - m) - log sum(exp(z - m)), m the largest
dz = p * (dp - sum(dp * p))                 dz = dq - exp(q) * sum(dq)

Some rows at a time, which stay in the cache from one operation to the next.
"""

import torch
from torch import Tensor

from .row_loss import CHUNK, sum_rows


def forward(z: Tensor, log: bool) -> Tensor:
    """Of rows [n_rows, n_cols]."""
    step = max(1, CHUNK // z.shape[1])
    out = z.new_empty(z.shape)
    scratch = z.new_empty(min(step, len(z)), z.shape[1]) if log else out
    for some, of_some in zip(z.split(step), out.split(step), strict=True):
        if log:
            torch.sub(some, some.amax(1, keepdim=True), out=of_some)
            of_some.sub_(sum_rows(torch.exp(of_some, out=scratch[: len(some)])).log_())
        else:
            torch.softmax(some, 1, out=of_some)
            of_some.div_(sum_rows(of_some))
    return out


def backward(dout: Tensor, out: Tensor, log: bool) -> Tensor:
    """The gradient of z."""
    step = max(1, CHUNK // out.shape[1])
    dz = out.new_empty(out.shape)
    for some, q, of_some in zip(dout.split(step), out.split(step), dz.split(step), strict=True):
        if log:
            torch.exp(q, out=of_some).mul_(-sum_rows(some)).add_(some)
        else:
            torch.mul(some, q, out=of_some)
            torch.sub(some, sum_rows(of_some), out=of_some).mul_(q)
    return dz

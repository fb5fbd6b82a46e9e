"""softmax and log_softmax of very long rows of float32, in torch operations, of which torch's own drift:

p = softmax(z) / sum(softmax(z))            q = log_softmax(z) - log sum(exp(log_softmax(z)))
dz = p * (dp - sum(dp * p))                 dz = dq - exp(q) * sum(dq)
"""

import torch
from torch import Tensor

from .row_loss import sum_rows


def forward(z: Tensor, log: bool) -> Tensor:
    """Of rows [n_rows, n_cols]."""
    if log:
        q = torch.log_softmax(z, 1)
        return q.sub_(sum_rows(q.exp()).log_())
    p = torch.softmax(z, 1)
    return p.div_(sum_rows(p))


def backward(dout: Tensor, out: Tensor, log: bool) -> Tensor:
    """The gradient of z."""
    if log:
        return out.exp().mul_(-sum_rows(dout)).add_(dout)
    dz = dout * out
    return torch.sub(dout, sum_rows(dz), out=dz).mul_(out)

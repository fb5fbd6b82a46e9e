"""The loss of each row as a differentiable operation: row_loss(logits, target) -> loss [n_rows].

Two implementations, chosen by `dispatch`: torch operations (cpu.py) and the Triton kernels. Each gives

    forward(logits, target, *options, needs_grad) -> loss [n_rows], stats
    backward(dloss [n_rows], logits, target, *options, stats) -> dlogits

and may change `stats`, a list, in `backward`. The caller's logits are never written, and any number of backward passes
on one graph gives the same gradient. Under `create_graph` the gradient is that of the reference formula in torch
operations, so that it can be differentiated again.
"""

from typing import Any

import torch
from torch import Tensor

from . import cpu, dispatch, reference


def row_loss(
    logits: Tensor,  # [n_rows, n_cols] any strides
    target: Tensor,  # [n_rows] int
    weight: Tensor | None,  # [n_cols]
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The loss of each row [n_rows], 0 for an ignored one: float64 for float64 logits, float32 otherwise."""
    return RowLoss.apply(logits, target, weight, ignore_index, label_smoothing)  # type: ignore[no-any-return,no-untyped-call]


def _implementation(logits: Tensor) -> Any:
    return dispatch.kernel_module("row_loss") if dispatch.uses_kernels(logits) else cpu


class RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        options = weight, ignore_index, label_smoothing
        if len(logits) == 0:
            loss, stats = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32)), []
        else:
            loss, stats = _implementation(logits).forward(logits, target, *options, needs_grad)
        if needs_grad:
            ctx.save_for_backward(logits, target, weight)
            ctx.stats, ctx.options = stats, (ignore_index, label_smoothing)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = grad_outputs
        logits, target, weight = ctx.saved_tensors
        if len(logits) == 0:
            dlogits = torch.zeros_like(logits)
        elif torch.is_grad_enabled():
            loss = reference.row_loss(logits, target, weight, *ctx.options)
            (dlogits,) = torch.autograd.grad(loss, logits, dloss, create_graph=True)
        else:
            dlogits = _implementation(logits).backward(dloss, logits, target, weight, *ctx.options, ctx.stats)
        return dlogits, None, None, None, None

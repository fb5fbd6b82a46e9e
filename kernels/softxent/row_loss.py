"""The loss of rows of logits, reduced, as one differentiable operation: row_loss(logits, target) -> loss.

Two implementations, chosen by `dispatch`: torch operations (cpu/) and the Triton kernels. Each gives

    forward(logits, target, weight, ignore_index, label_smoothing, reduction, dtype, needs_grad) -> loss, kept
    backward(dloss, logits, target, weight, ignore_index, label_smoothing, reduction, kept) -> dlogits

and may change `kept`, a list, in `backward`: a gradient that is made in forward is given away once. The reduction is
inside the operation, so that autograd keeps one node. The caller's logits are never written, and any number of backward
passes on one graph gives the same gradient. Where a backward pass is itself recorded or batched, the gradient is that
of the reference formula, which torch can treat so. What `kept` holds is not seen by saved-tensor hooks, such as those
that offload.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import implementation
from .transforms import in_higher_order_backward


def row_loss(
    logits: Tensor,  # [n_rows, n_cols] any strides
    target: Tensor,  # [n_rows] int
    weight: Tensor | None,  # [n_cols]
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:
    """The loss in `dtype`: of each row [n_rows], 0 for an ignored one, or their sum or mean."""
    options = ignore_index, label_smoothing, reduction
    needs_grad = torch.is_grad_enabled() and logits.requires_grad  # inside the Function it cannot be known
    return RowLoss.apply(logits, target, weight, dtype, needs_grad, *options)  # type: ignore[no-any-return]


class RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype,
        needs_grad: bool,
        *options: Any,
    ) -> Tensor:
        if len(logits) == 0:
            loss, kept = _loss_of_nothing(logits, *options).to(dtype), []
        else:
            module = implementation(logits, "row_loss")
            loss, kept = module.forward(logits, target, weight, *options, dtype, needs_grad)
        if needs_grad:
            ctx.save_for_backward(logits, target, weight)
            ctx.kept, ctx.options = kept, options
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight = ctx.saved_tensors
        (dloss,) = grad_outputs
        if len(logits) == 0:
            dlogits = torch.zeros_like(logits)
        elif in_higher_order_backward(dloss):
            record = torch.is_grad_enabled()
            with torch.enable_grad():
                z = logits.view_as(logits)  # an alias, or the hooks of the logits would run here as well
                loss = reference.softmax_xent(z, target, weight, *ctx.options)
            (dlogits,) = torch.autograd.grad(loss, z, dloss.to(loss.dtype), create_graph=record)
        else:
            module = implementation(logits, "row_loss")
            dlogits = module.backward(dloss, logits, target, weight, *ctx.options, ctx.kept)
        return dlogits, *[None] * 7


def _loss_of_nothing(logits: Tensor, ignore_index: int, label_smoothing: float, reduction: str) -> Tensor:
    rows = logits.new_zeros(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()

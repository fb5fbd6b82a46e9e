"""The loss of rows of logits, reduced, as one differentiable operation: row_loss(logits, target) -> loss.

Two implementations, chosen by `dispatch`: torch operations (cpu/) and the Triton kernels. Each gives

    forward(logits, target, weight, ignore_index, label_smoothing, reduction, dtype, needs_grad, inplace)
        -> loss, kept
    backward(dloss, logits, target, weight, ignore_index, label_smoothing, reduction, kept, inplace)
        -> dlogits

and may change `kept`, a list, in `backward`: a gradient that is made in forward is given away once. The reduction is
inside the operation, so that autograd keeps one node. The caller's logits are never written, and any number of backward
passes on one graph gives the same gradient; but with `inplace` the gradient goes over the logits, in the pass that
makes it, and is had once. Where a backward pass is itself recorded or batched, the gradient is that
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
    inplace: bool = False,
) -> Tensor:
    """The loss in `dtype`: of each row [n_rows], 0 for an ignored one, or their sum or mean."""
    options = ignore_index, label_smoothing, reduction
    needs_grad = torch.is_grad_enabled() and logits.requires_grad  # inside the Function it cannot be known
    return RowLoss.apply(logits, target, weight, dtype, needs_grad, inplace, *options)  # type: ignore[no-any-return]


class RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype,
        needs_grad: bool,
        inplace: bool,
        *options: Any,
    ) -> Tensor:
        if len(logits) == 0:
            loss, kept = _loss_of_nothing(logits, *options).to(dtype), []
        else:
            module = implementation(logits, "row_loss")
            loss, kept = module.forward(logits, target, weight, *options, dtype, needs_grad, inplace)
        if needs_grad:
            written = inplace and len(logits) > 0 and kept[0] is not None
            if written:
                torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(None if written else logits, target, weight)
            ctx.kept, ctx.options, ctx.inplace = kept, options, inplace
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = grad_outputs
        if ctx.inplace:
            if ctx.kept is None:
                raise RuntimeError("a second backward pass after inplace=True: the logits are gone. Leave it out")
            if in_higher_order_backward(dloss):
                raise RuntimeError("a recorded or batched backward pass after inplace=True: leave it out")
        logits, target, weight = ctx.saved_tensors
        if logits is None:
            logits = ctx.kept[0]
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
            dlogits = module.backward(dloss, logits, target, weight, *ctx.options, ctx.kept, ctx.inplace)
        if ctx.inplace:
            ctx.kept = None
            torch.autograd.graph.increment_version(dlogits)
        return dlogits, *[None] * 8


def _loss_of_nothing(logits: Tensor, ignore_index: int, label_smoothing: float, reduction: str) -> Tensor:
    rows = logits.new_zeros(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()

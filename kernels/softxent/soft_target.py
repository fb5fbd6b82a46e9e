"""The loss of rows of logits against rows of probabilities, differentiable in both.

The two implementations, chosen by `dispatch`, give

    forward(logits, target, weight, label_smoothing, needs_grad) -> loss [n_rows], stats
    backward(dloss [n_rows], logits, target, weight, label_smoothing, needs_dtarget, stats) -> dlogits, dtarget
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import implementation
from .transforms import in_higher_order_backward


def soft_target_loss(
    logits: Tensor,  # [n_rows, n_cols] any strides
    target: Tensor,  # [n_rows, n_cols] floating point, any strides
    weight: Tensor | None,  # [n_cols]
    label_smoothing: float,
) -> Tensor:
    """The loss of each row [n_rows]: float64 for float64 logits, float32 otherwise."""
    needs_grad = torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad)
    return SoftTargetLoss.apply(logits, target, weight, label_smoothing, needs_grad)  # type: ignore[no-any-return]


class SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        label_smoothing: float,
        needs_grad: bool,
    ) -> Tensor:
        loss = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.stats = []
        if logits.numel():
            module = implementation(logits, "soft_target")
            loss, ctx.stats = module.forward(logits, target, weight, label_smoothing, needs_grad)
        ctx.save_for_backward(logits, target, weight)
        ctx.label_smoothing = label_smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = grad_outputs
        logits, target, weight = ctx.saved_tensors
        needs_dtarget = ctx.needs_input_grad[1]
        if logits.numel() == 0:
            return torch.zeros_like(logits), torch.zeros_like(target), None, None, None
        if in_higher_order_backward(dloss):
            record = torch.is_grad_enabled()
            with torch.enable_grad():
                z, t = logits.view_as(logits), target.view_as(target)  # aliases, or their hooks would run here as well
                loss = reference.row_loss(z, t, weight, label_smoothing=ctx.label_smoothing)
            inputs = [x for x in (z, t) if x.requires_grad]
            grads = iter(torch.autograd.grad(loss, inputs, dloss, create_graph=record))
            return *(next(grads) if x.requires_grad else None for x in (z, t)), None, None, None
        module = implementation(logits, "soft_target")
        grads = module.backward(dloss, logits, target, weight, ctx.label_smoothing, needs_dtarget, ctx.stats)
        return *grads, None, None, None

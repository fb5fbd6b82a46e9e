"""The loss of rows of logits against rows of probabilities, differentiable in both.

The two implementations, chosen by `dispatch`, give

    forward(logits, target, weight, label_smoothing, needs_grad) -> loss [n_rows], stats
    backward(dloss [n_rows], logits, target, weight, label_smoothing, needs_dtarget, stats, inplace) -> dlogits, dtarget

With `inplace` the gradient is written over the logits, in backward.
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
    inplace: bool = False,
) -> Tensor:
    """The loss of each row [n_rows]: float64 for float64 logits, float32 otherwise."""
    needs_grad = torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad)
    return SoftTargetLoss.apply(logits, target, weight, label_smoothing, needs_grad, inplace)  # type: ignore[no-any-return]


class SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        label_smoothing: float,
        needs_grad: bool,
        inplace: bool,
    ) -> Tensor:
        loss = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.stats = []
        if logits.numel():
            module = implementation(logits, "soft_target")
            loss, ctx.stats = module.forward(logits, target, weight, label_smoothing, needs_grad)
        ctx.save_for_backward(logits, target, weight)
        ctx.label_smoothing, ctx.inplace = label_smoothing, inplace
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = grad_outputs
        if ctx.inplace:
            if ctx.stats is None:
                raise RuntimeError("a second backward pass after inplace=True: the logits are gone. Leave it out")
            if in_higher_order_backward(dloss):
                raise RuntimeError("a recorded or batched backward pass after inplace=True: leave it out")
        logits, target, weight = ctx.saved_tensors
        needs_dtarget = ctx.needs_input_grad[1]
        if logits.numel() == 0:
            return torch.zeros_like(logits), torch.zeros_like(target), *[None] * 4
        if in_higher_order_backward(dloss):
            record = torch.is_grad_enabled()
            with torch.enable_grad():
                z, t = logits.view_as(logits), target.view_as(target)  # aliases, or their hooks would run here as well
                loss = reference.row_loss(z, t, weight, label_smoothing=ctx.label_smoothing)
            inputs = [x for x in (z, t) if x.requires_grad]
            grads = iter(torch.autograd.grad(loss, inputs, dloss, create_graph=record))
            return *(next(grads) if x.requires_grad else None for x in (z, t)), *[None] * 4
        module = implementation(logits, "soft_target")
        eps, inplace = ctx.label_smoothing, ctx.inplace
        dlogits, dtarget = module.backward(dloss, logits, target, weight, eps, needs_dtarget, ctx.stats, inplace)
        if inplace:
            ctx.stats = None
            torch.autograd.graph.increment_version(dlogits)
        return dlogits, dtarget, *[None] * 4

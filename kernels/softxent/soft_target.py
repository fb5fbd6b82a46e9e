"""The loss of rows of logits against rows of probabilities, differentiable in both.

The two implementations, chosen by `dispatch`, give

    forward(inputs, options, needs_grad) -> loss [n_rows], stats
    backward(dloss [n_rows], inputs, options, needs_dtarget, stats, inplace) -> dlogits, dtarget

With `inplace` the gradient is written over the logits, in backward. Sample weights and the reduction are left to the
caller.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import implementation
from .options import Inputs, Options
from .transforms import in_higher_order_backward


def soft_target_loss(inputs: Inputs, options: Options, inplace: bool = False) -> Tensor:
    """The loss of each row [n_rows]: float64 for float64 logits, float32 otherwise."""
    logits, target = inputs.logits, inputs.target
    needs_grad = torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad)
    return SoftTargetLoss.apply(*inputs, options, needs_grad, inplace)  # type: ignore[no-any-return]


class SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = Inputs(*arguments[:6])
        options, needs_grad, inplace = arguments[6:]
        logits = inputs.logits
        loss = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.stats = []
        if logits.numel():
            loss, ctx.stats = implementation(logits, "soft_target").forward(inputs, options, needs_grad)
        ctx.save_for_backward(*inputs)
        ctx.options, ctx.inplace = options, inplace
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = grad_outputs
        if ctx.inplace:
            if ctx.stats is None:
                raise RuntimeError("a second backward pass after inplace=True: the logits are gone. Leave it out")
            if in_higher_order_backward(dloss):
                raise RuntimeError("a recorded or batched backward pass after inplace=True: leave it out")
        inputs, options = Inputs(*ctx.saved_tensors), ctx.options
        logits, target = inputs.logits, inputs.target
        needs_dtarget = ctx.needs_input_grad[1]
        if logits.numel() == 0:
            return torch.zeros_like(logits), torch.zeros_like(target), *[None] * 7
        if in_higher_order_backward(dloss):
            record = torch.is_grad_enabled()
            with torch.enable_grad():
                z, t = logits.view_as(logits), target.view_as(target)  # aliases, or their hooks would run here as well
                loss = reference.row_loss(inputs._replace(logits=z, target=t), options)
            wanted = [x for x in (z, t) if x.requires_grad]
            grads = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=record))
            return *(next(grads) if x.requires_grad else None for x in (z, t)), *[None] * 7
        module = implementation(logits, "soft_target")
        dlogits, dtarget = module.backward(dloss, inputs, options, needs_dtarget, ctx.stats, ctx.inplace)
        if ctx.inplace:
            ctx.stats = None
            torch.autograd.graph.increment_version(dlogits)
        return dlogits, dtarget, *[None] * 7

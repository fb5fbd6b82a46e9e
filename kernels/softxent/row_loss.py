"""The loss of rows of logits, reduced, as one differentiable operation: row_loss(inputs, options) -> loss, stats.

Two implementations, chosen by `dispatch`: torch operations (cpu/) and the Triton kernels. Each gives

    forward(inputs, options, dtype, needs_grad, inplace, wanted) -> loss, stats, kept

    scaled(dloss, kept, inplace) -> dlogits, dtarget      those that forward has left in `kept`, times dloss; given once

    backward(dloss, dstats, inputs, options, kept, inplace, needs_dlogits, needs_dtarget) -> dlogits, dtarget      anew

The first backward pass does not look at the logits where forward has left their gradient: the caller may have edited
them since. A later one does, and autograd raises then. The reduction is inside the operation, so that autograd keeps
one node. The caller's logits are never written, and any number of backward
passes on one graph gives the same gradient; but with `inplace` the gradient goes over the logits, in the pass that
makes it, and is had once. Where a stat has an incoming gradient, that of the logits is made anew, in backward. Where a
backward pass is itself recorded or batched, the gradient is that of the reference formula, which torch can treat so.
What `kept` holds is not seen by saved-tensor hooks, such as those that offload.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import implementation
from .options import DIFFERENTIABLE, NO_STATS, Inputs, Options, Stats, empty_stats
from .transforms import in_higher_order_backward

NOTHING: frozenset[str] = frozenset()
CHUNK = 1 << 24  # values at a time


def row_loss(
    inputs: Inputs,
    options: Options,
    dtype: torch.dtype,
    inplace: bool = False,
    wanted: frozenset[str] = NOTHING,
) -> tuple[Tensor, Stats]:
    """The loss in `dtype`: of each row [n_rows], 0 for an ignored one, or their sum or mean; and the stats wanted."""
    learned = inputs.logits, inputs.target, inputs.logit_scale
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned)):
        return _forward(implementation(*learned[:2]), inputs, options, dtype, False, False, wanted)[:2]
    out = RowLoss.apply(*learned, (inputs, options, dtype, inplace, wanted))
    return (out[0], Stats(*out[1:])) if wanted else (out, NO_STATS)


def _forward(
    module: Any, inputs: Inputs, options: Options, dtype: torch.dtype, *how: Any
) -> tuple[Tensor, Stats, list[Any]]:
    """how: needs_grad, inplace, wanted."""
    if inputs.target.numel() == 0:
        return loss_of_nothing(inputs, options).to(dtype), empty_stats(how[2], inputs.logits), []
    found: tuple[Tensor, Stats, list[Any]] = module.forward(inputs, options, dtype, *how)
    return found


class RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        inputs, options, dtype, inplace, wanted = arguments[3]
        inputs = inputs._replace(logits=arguments[0], target=arguments[1], logit_scale=arguments[2])
        logits = inputs.logits
        ctx.module = implementation(logits, inputs.target)
        loss, stats, kept = _forward(ctx.module, inputs, options, dtype, True, inplace, wanted)
        written = inplace and bool(kept) and kept[0] is not None
        if written:
            torch.autograd.graph.increment_version(logits)
            ctx.version = logits._version
        ctx.save_for_backward(None if written else logits, *inputs[1:], *options.tensors)
        ctx.kept, ctx.options, ctx.inplace = kept, options, inplace
        if not wanted:
            return loss
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        dloss, dstats = grad_outputs[0], Stats(*grad_outputs[1:4])
        given = [x for x in grad_outputs[:4] if x is not None]
        higher_order = bool(given) and any(in_higher_order_backward(x) for x in given)
        if ctx.inplace:
            if ctx.kept is None:
                raise RuntimeError("a second backward pass after inplace=True: the logits are gone. Leave it out")
            if higher_order:
                raise RuntimeError("a recorded or batched backward pass after inplace=True: leave it out")
        made = any(x is not None for x in ctx.kept[:2])
        if made and ctx.inplace and ctx.kept[0]._version != ctx.version:
            raise RuntimeError("the logits, which hold their gradient after inplace=True, were written to since")
        if made and not higher_order and len(given) == 1 and dloss is not None and not ctx.needs_input_grad[2]:
            dlogits, dtarget = ctx.module.scaled(dloss, ctx.kept, ctx.inplace)
            if ctx.inplace:
                ctx.kept = None
                torch.autograd.graph.increment_version(dlogits)
            return dlogits, dtarget, None, None
        inputs = Inputs(*ctx.saved_tensors[:6])
        if inputs.logits is None:
            inputs = inputs._replace(logits=ctx.kept[0])
        logits, scale, options = inputs.logits, inputs.logit_scale, ctx.options
        if higher_order and inputs.target.numel():
            dlogits, dtarget, dscale = gradients_by_reference(dloss, dstats, inputs, options)
            return dlogits, dtarget, dscale, None
        dtarget = None
        if inputs.target.numel() == 0 or not given:
            dlogits = torch.zeros_like(logits)
            dtarget = torch.zeros_like(inputs.target) if ctx.needs_input_grad[1] else None
        else:
            kept = ctx.kept
            if dloss is None:  # no gradient of a loss that may be undefined, or divided by nothing
                dloss = logits.new_zeros((), dtype=given[0].dtype).expand(len(logits))
                inputs, options = inputs._replace(normalizer=None), options._replace(reduction="none")
                kept = [None, *kept[1:]]
            needs_dlogits = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
            dlogits, dtarget = ctx.module.backward(
                dloss, dstats, inputs, options, kept, ctx.inplace, needs_dlogits, ctx.needs_input_grad[1]
            )
        if ctx.inplace:
            ctx.kept = None
            torch.autograd.graph.increment_version(logits)
        dscale = None
        if ctx.needs_input_grad[2]:
            assert scale is not None
            dscale = _gradient_of_scale(dlogits, logits, scale)
        return dlogits, dtarget, dscale, None


def _gradient_of_scale(dlogits: Tensor, logits: Tensor, scale: Tensor) -> Tensor:
    """dloss/ds = sum dloss/dx * x / s, since z depends on x and s by their product; a masked class is left out."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    total = torch.zeros((), dtype=acc, device=logits.device)
    step = max(1, CHUNK // max(1, logits.shape[1]))
    for start in range(0, len(logits), step):
        x = logits[start : start + step].to(acc)
        total = total + torch.where(x.isfinite(), x, 0).mul_(dlogits[start : start + step]).sum()
    return (total / scale).to(scale.dtype)


def gradients_by_reference(
    dloss: Tensor | None, dstats: Stats, inputs: Inputs, options: Options
) -> tuple[Tensor | None, ...]:
    """Of the logits, the target and the scale, by torch operations, which may be recorded or batched."""
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        z, t, s = (  # aliases, or their hooks would run here as well
            None if x is None else x.view_as(x) for x in (inputs.logits, inputs.target, inputs.logit_scale)
        )
        assert z is not None and t is not None
        inputs = inputs._replace(logits=z, target=t, logit_scale=s)
        pairs = []
        if dloss is not None:
            pairs.append((reference.softmax_xent(inputs, options), dloss))
        if any(x is not None for x in dstats):
            stats = reference.row_stats(inputs, options)
            pairs += [(getattr(stats, name), getattr(dstats, name)) for name in DIFFERENTIABLE]
            pairs = [(y, dy) for y, dy in pairs if dy is not None]
    outputs, grads = [y for y, _ in pairs], [dy.to(y.dtype) for y, dy in pairs]
    leaves = [x for x in (z, t, s) if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=record))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in (z, t, s))


def loss_of_nothing(inputs: Inputs, options: Options) -> Tensor:
    rows = inputs.logits.new_zeros(len(inputs.logits), dtype=torch.promote_types(inputs.logits.dtype, torch.float32))
    if options.reduction == "none":
        return rows
    if options.reduction == "mean" and inputs.normalizer is not None:
        return rows.sum() / inputs.normalizer[0]
    return rows.sum() if options.reduction == "sum" else rows.sum() / 0

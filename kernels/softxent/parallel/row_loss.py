"""The loss of rows whose classes are spread over ranks, as one differentiable operation.

    row_loss(inputs, options, shard, wanted, inplace) -> loss [n_rows], stats, w_y [n_rows] or None

Forward reads the shard's logits once, and has the one collective. Backward reads them again, knowing m and d over all
classes, and writes their gradient: 3 B in all, and no collective. Every rank has to run it, or none; the loss is the
same on each, and its gradient is that of one loss, not of their sum.

A logit scale that requires a gradient is the exception: backward gathers one number of each rank.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..options import Inputs, Options, Stats
from ..row_loss import NOTHING, _gradient_of_scale
from ..transforms import in_higher_order_backward
from .shards import Row, Shard, exchange, fields_of, implementation


def row_loss(
    inputs: Inputs, options: Options, shard: Shard, wanted: Collection[str] = NOTHING, inplace: bool = False
) -> tuple[Tensor, Stats, Tensor | None]:
    """In the dtype of the computation, not times the sample weight, which only says which rows count. The logits, and
    what lies beside them, may have more columns than the shard: padding, which is not read and has gradient 0."""
    loss, counts, *stats = VocabRowLoss.apply(*inputs[:4], inputs.logit_scale, (options, shard, wanted, inplace))
    return loss, Stats(*stats), counts


class VocabRowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        logits, target, weight, sample_weight, scale, (options, shard, wanted, inplace) = arguments
        whole = Inputs(logits, target, weight, sample_weight, None, scale)
        inputs = of_shard(whole, shard)
        module, fields = implementation(logits), fields_of(inputs, options, wanted)
        gathered, _ = exchange(module.sums(inputs, options, shard, fields), shard)
        loss, stats, row = module.combine(gathered, inputs, options, shard, fields, wanted)
        ctx.save_for_backward(*arguments[:5], *row, *options.tensors)
        ctx.module, ctx.options, ctx.shard, ctx.inplace, ctx.done = module, options, shard, inplace, False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in (row.w_y, stats.prediction) if x is not None))
        return loss, row.w_y, *stats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        given = grad_outputs[0], *grad_outputs[2:5]
        if any(x is not None and in_higher_order_backward(x) for x in given):
            raise RuntimeError(
                "no recorded or batched backward pass of a loss whose classes are spread over ranks: it would need "
                "collectives of its own. Leave out create_graph, or gather the logits"
            )
        if ctx.done:
            raise RuntimeError("a second backward pass after inplace=True: the logits are gone. Leave it out")
        logits, target, weight, sample_weight, scale, *row = ctx.saved_tensors[: 5 + len(Row._fields)]
        wants = ctx.needs_input_grad
        inputs = Inputs(logits, target, weight, sample_weight, None, scale)
        dlogits = dtarget = dscale = None
        if wants[0] or wants[4]:
            dlogits = logits.detach() if ctx.inplace else ctx.module.gradient_like(logits, logits.dtype)
        if wants[1]:
            dtarget = ctx.module.gradient_like(logits, target.dtype)
        dloss = None if given[0] is None else given[0].contiguous()
        dstats = Stats(*given[1:])
        n_cols = ctx.shard.n_cols
        parts = (None if x is None else x[:, :n_cols] for x in (dlogits, dtarget))
        ctx.module.gradient(Row(*row), dloss, dstats, of_shard(inputs, ctx.shard), ctx.options, ctx.shard, *parts)
        for x in (dlogits, dtarget):
            if x is not None and x.shape[1] > n_cols:
                x[:, n_cols:].zero_()
        if wants[4]:
            assert dlogits is not None
            dscale = _sum_of_ranks(_gradient_of_scale(dlogits[:, :n_cols], logits[:, :n_cols], scale), ctx.shard)
        if ctx.inplace:
            ctx.done = True
            torch.autograd.graph.increment_version(logits)
        return dlogits if wants[0] else None, dtarget, None, None, dscale, None


def of_shard(inputs: Inputs, shard: Shard) -> Inputs:
    """Without padding."""
    n_cols = shard.n_cols
    if inputs.logits.shape[1] == n_cols:
        return inputs
    target, weight = inputs.target, inputs.weight
    return inputs._replace(
        logits=inputs.logits[:, :n_cols],
        target=target[:, :n_cols] if target.is_floating_point() else target,
        weight=None if weight is None else weight[:n_cols],
    )


def _sum_of_ranks(x: Tensor, shard: Shard) -> Tensor:
    """In the order of ranks."""
    return exchange(x.reshape(1, 1), shard)[0].sum(0).reshape(x.shape)

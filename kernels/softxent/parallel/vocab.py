"""The public operation on logits whose classes are spread over the ranks of a process group; call.py has the rest."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..functional import STATS, LossAndStats, loss_and_stats


def vocab_parallel_softmax_xent(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    group: Any,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    inplace: bool = False,
) -> Tensor:
    """`fused_softmax_xent` of logits whose classes are spread over the ranks of a process group: tensor parallelism.

    Every rank of the group calls it alike, for the same rows, and has the same loss, to the bit, and the gradient of
    its own logits. One collective in forward, an all-gather of 3 to 6 float32 a row and rank (8 with all stats); none
    in backward. Logits are read twice and written once in a step: the gradient has to wait for what the others say.

    Args:
        local_logits: this rank's classes: (N, C_local), (C_local) or (N, C_local, d1, ..., dK). C_local may differ from
            rank to rank, and be 0.
        target: class indices in [0, vocab_size), counted over all ranks, or `ignore_index`: the same on every rank. Or
            class probabilities in the shape of `local_logits`: those of its classes.
        weight: (C_local), the weights of this rank's classes.
        group: the ranks among whom the classes are spread (mesh.get_group("tp")); None for all.
        vocab_start: the class that is this rank's first. Default: ranks hold one slice after another. The slices of
            all ranks, in whatever order, have to make up [0, vocab_size).
        vocab_size: the number of classes. Logits of classes from there on are padding: not read, of gradient 0. In one
            group, classes of one vocab_size are spread in one way. Default: the sum of all C_local, which every call
            then has to ask the others for: one small collective more, for which a GPU's host waits.
        sample_weight, normalizer: as for `fused_softmax_xent`, the same on every rank. Each may require a gradient.
        logit_scale: likewise; for its gradient, backward gathers one number of each rank.
        inplace: write the gradient over the logits, in backward. Until then nothing else may write to them.
        the others: as for `fused_softmax_xent`, the same on every rank.

    The gradient is that of the loss once, however many ranks have it: do not divide it by their number, and sum none of
    it over the group. A mean counts the rows that all ranks of the group see; rows that are spread over another group,
    of data parallelism, have a count of their own there, which goes into `normalizer`.

    Raises as `fused_softmax_xent`, with class indices checked after the collective; and, on every rank of the group,
    ValueError for slices that do not make up the classes, and RuntimeError where the ranks' calls differ, naming the
    rank. That is looked at once for each group and set of shapes, with some collectives of its own; what a later call
    of the same shapes does otherwise on one rank, such as failing, the others wait for, as for a rank that died.
    Differentiable once: not with create_graph, not under torch.func transforms. torch.compile leaves it to eager mode.
    """
    from .call import vocab_parallel

    loss: Tensor = vocab_parallel(
        local_logits,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        sample_weight,
        normalizer,
        loss_dtype,
        inplace,
        True,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
    )[0]
    return loss


def vocab_parallel_softmax_xent_with_stats(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    group: Any,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    stats: Iterable[str] = STATS,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
) -> LossAndStats:
    """`vocab_parallel_softmax_xent`, and the stats of `fused_softmax_xent_with_stats`, over all classes, on every rank.

    Each has the shape of class indices; `prediction` counts classes over all ranks. Of probabilities they cost nothing
    beside the loss. Gradients of stats are made with that of the loss. Raises as both.
    """
    from .call import vocab_parallel

    loss, found, wanted = vocab_parallel(
        local_logits,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        sample_weight,
        normalizer,
        loss_dtype,
        False,
        True,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        stats=stats,
    )
    return loss_and_stats(loss, found, target, wanted)

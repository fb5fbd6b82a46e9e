"""The public operation on logits whose classes are spread over the ranks of a process group."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import INTEGRAL, check_stats
from ..dispatch import on_device_of
from ..functional import STATS, Call, LossAndStats, as_vector, call_of, loss_and_stats, reduced
from ..options import Inputs, Options, Stats, is_given
from ..transforms import in_transform, is_traced
from .agreement import agree, group_of
from .row_loss import row_loss
from .shards import Shard

NUMBERS = ("label_smoothing", "z_loss", "softcap", "logit_scale")


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


@torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator]
def vocab_parallel(
    *arguments: Any,  # of call_of
    group: Any,
    vocab_start: int | None,
    vocab_size: int | None,
    stats: Iterable[str] = (),
) -> tuple[Tensor, Stats, tuple[str, ...]]:
    group = group_of(group)
    wanted: tuple[str, ...] = ()
    call, error = None, None
    try:  # so that a rank with wrong arguments tells the others, who would wait for it
        check_slice(vocab_start, vocab_size)
        wanted = check_stats(stats, STATS, arguments[1], False)
        call = call_of(*arguments)
        check_call(call)
    except (TypeError, ValueError, RuntimeError, IndexError) as raised:
        error = raised
    if call is None or error is not None:
        agree(group, (), {}, 0, None, None, {}, error)
        raise AssertionError("agree() raises a given error")
    inputs = call.inputs
    names, same = said(call, wanted)
    replicated = {"target": None if inputs.target.is_floating_point() else inputs.target}
    replicated["sample_weight"] = inputs.sample_weight
    n_local = inputs.logits.shape[1]
    device = inputs.logits.device
    with on_device_of(inputs.logits):
        shard = agree(group, names, same, n_local, vocab_start, vocab_size, replicated, None, device)
    if shard.n_classes == 0 and inputs.target.numel() > 0:
        raise IndexError(f"no class to choose from: none of the {dist.get_world_size(group)} ranks holds one")
    loss, found = loss_of_shard(inputs, call.options, shard, wanted, call.inplace)
    loss = loss.to(call.loss_dtype)
    return loss.reshape(call.shape) if call.options.reduction == "none" else loss, found, wanted


def loss_of_shard(
    inputs: Inputs, options: Options, shard: Shard, wanted: Collection[str], inplace: bool = False
) -> tuple[Tensor, Stats]:
    """The loss, of each row or reduced, in the dtype of the computation, and the stats."""
    v, n = inputs.sample_weight, inputs.normalizer
    learned = torch.is_grad_enabled() and v is not None and v.requires_grad  # then a row of weight 0 is read, too
    names = frozenset("prediction" if name == "correct" else name for name in wanted)
    rows = inputs._replace(sample_weight=None if learned or v is None else v.detach())
    loss, stats, counts = row_loss(rows, options, shard, names, inplace)
    if learned and v is not None:
        found = {name: x for name, x in stats._asdict().items() if x is not None}
        stats = Stats(**{name: x.masked_fill(v == 0, -1 * (name == "prediction")) for name, x in found.items()})
    if options.reduction == "mean" and n is None:
        n = as_divisor(inputs, options, counts)
    return reduced(loss, inputs._replace(normalizer=n), options), stats


def as_divisor(inputs: Inputs, options: Options, counts: Tensor | None) -> Tensor:
    """[1] what the mean divides by. counts: w_y of rows."""
    n: Tensor | float
    if inputs.target.is_floating_point():
        n = len(inputs.target)
    elif counts is None:
        n = torch.count_nonzero(inputs.target.long() != options.ignore_index)
    else:
        n = counts.sum()
        n = torch.where(n == 0, float("nan"), n)
    return as_vector(n, inputs.logits)


def check_slice(vocab_start: int | None, vocab_size: int | None) -> None:
    for name, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, INTEGRAL)):
            raise TypeError(f"{name} must be an int or None, not {type(value).__name__}")
        if value is not None and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def check_call(call: Call) -> None:
    inputs = call.inputs
    if in_transform(*inputs):
        raise RuntimeError("logits spread over ranks do not go with torch.func transforms or forward-mode AD")
    if is_traced(*inputs):
        raise RuntimeError("logits spread over ranks need data: no meta or fake tensors, no make_fx")
    if inputs.weight is not None and inputs.weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("no gradient with respect to weight: pass weight.detach()")


def said(call: Call, wanted: tuple[str, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What has to be the same on every rank: what decides whether ranks still understand each other, and all of it. A
    number that changes, as a schedule does, is no new call."""
    inputs, options = call.inputs, call.options
    numbers = options._asdict() | ({} if inputs.logit_scale is None else {"logit_scale": inputs.logit_scale})
    given = tuple(name for name in NUMBERS if is_given(numbers[name], 1.0 if name == "logit_scale" else 0.0))
    names = {
        "the shape of rows": tuple(call.shape),
        "the dtype of local_logits": inputs.logits.dtype,
        "the device of local_logits": inputs.logits.device.type,
        "the dtype of target": inputs.target.dtype,
        "weight given": inputs.weight is not None,
        "sample_weight given": inputs.sample_weight is not None,
        "normalizer given": inputs.normalizer is not None,
        "the gradient of logit_scale": inputs.logit_scale is not None and inputs.logit_scale.requires_grad,
        "ignore_index": options.ignore_index,
        "reduction": options.reduction,
        "loss_dtype": call.loss_dtype,
        "stats": tuple(sorted(wanted)),
    }
    values = {name: "a tensor" if isinstance(numbers[name], Tensor) else numbers[name] for name in given}
    return (*names.values(), given), names | {"options": values}

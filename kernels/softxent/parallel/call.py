"""A call on logits whose classes are spread over ranks: checked, agreed on, and its losses reduced.

Imported when it is first called: `torch.compiler.disable` imports all of the compiler.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import INTEGRAL, check_stats
from ..dispatch import on_device_of
from ..functional import STATS, Call, as_vector, call_of, reduced
from ..options import Inputs, Options, Stats, is_given
from ..transforms import in_transform, is_traced
from .agreement import agree, group_of
from .row_loss import row_loss
from .shards import Shard

NUMBERS = ("label_smoothing", "z_loss", "softcap", "logit_scale")


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
        stats = stats.without(v == 0)
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

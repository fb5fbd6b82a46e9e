"""The public operations from hidden states: arguments checked, and turned into rows for linear_rows.py."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linear_rows
from .checks import (
    DTYPES,
    INDEX_DTYPES,
    INTEGRAL,
    check_label_smoothing,
    check_logit_scale,
    check_normalizer,
    check_options,
    check_sample_weight,
    check_softcap,
    check_stats,
    check_tensors,
    check_z_loss,
    is_dtensor,
)
from .functional import STATS, Call, LossAndStats, as_vector, reduced
from .linear_rows import OF_WIDEST, Gradients, Head, How
from .normalizer import normalizer as sum_of_weights
from .options import Inputs, Options, Stats
from .transforms import in_transform


def fused_linear_softmax_xent(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    shift: bool = False,
    valid_rows: int | None = None,
    max_logits_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    input_gradient: str = "all_reduce",
) -> Tensor:
    """`fused_softmax_xent` of the logits input @ linear_weight.T + linear_bias, of which only a chunk exists at a time.

    Args:
        input: hidden states, (..., H): float64, float32, bfloat16 or float16.
        linear_weight: (C, H), in the dtype of `input`; or float32 with half precision, or any but float64 under
            autocast.
        target: class indices (...), or class probabilities (..., C), which are floating point.
        linear_bias: (C).
        weight: (C), a weight for each class, without a gradient.
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, normalizer: as for `fused_softmax_xent`.
        sample_weight: as there, in the shape of class indices.
        loss_dtype: of the result; default: float32, float64 for float64.
        shift: position t of `input`, (..., T, H), predicts the target of t + 1. Targets and sample weights are given
            for all T positions, the first are not used, and results are (..., T - 1). `input` is not copied.
        valid_rows: how many rows are neither ignored nor of sample weight 0, or a bound of that, which the host knows
            without asking the GPU: the others are left out of the products. A number that is too small makes the loss
            and the gradients NaN; on a CPU, where rows are counted and left out in any case, it raises.
        max_logits_bytes: bounds all that is allocated for a chunk: its logits, in float32, and everything beside them.
            Default: the bytes of `linear_weight`, or 32 MiB if that is more. Less is slower.
        accum_dtype: in which the gradient of linear_weight is summed over chunks: the dtype of linear_weight, the
            default, or float32, which takes a matrix of that dtype more and is rounded once instead of once a chunk.
        group: the ranks among whom the classes are spread, of torch.distributed; None: this process has them all
            (group.WORLD is all ranks). Each calls it alike, for the same rows, and passes what concerns the classes,
            (C) above, of its own alone.
        vocab_start, vocab_size: as for `vocab_parallel_softmax_xent`, with a group.
        input_gradient: how the ranks' gradients of `input` are summed: "all_reduce", each is given the sum;
            "reduce_scatter": each passes a part of the rows as `input`, along its first dimension, parts of one size in
            the order of ranks; all are gathered, and kept until backward, and its gradient is that of its own (sequence
            parallelism). The target and the results are of all rows. "partial": not at all, that is left to the caller.

    The sum or mean makes its gradients in forward and keeps them for backward: three products in all. reduction="none",
    float16, and stats that may be differentiated make the logits again in backward: four. A tensor that requires no
    gradient costs no product and no memory. Logits of half precision are float32: on a GPU accumulated and kept so, on
    a CPU computed so. Differentiable any number of times; double backward, torch.func and forward-mode AD go by plain
    torch operations on all of the logits. Nothing of the caller's is written.

    `linear_weight` is all that is applied: of a layer with adapters, hooks or quantised weights pass the weight that it
    amounts to. Under FSDP2 call this in the forward of the module that owns the weight, where it is whole.

    With a group no rank has logits beyond two chunks, which share max_logits_bytes. Each chunk has one collective, that
    of `vocab_parallel_softmax_xent`, under the product of the next; backward has that of the input's gradient. A mean
    with class weights, and a logit_scale that learns, have one more, of a number. The same bits on every rank; as
    there, differentiable once, not under torch.func, and eager under torch.compile.

    DTensors say all that themselves: linear_weight Shard(0) on one dimension of the mesh, linear_bias likewise; input
    Replicate there, or sharded by rows, which is sequence parallelism; on other dimensions input and target may be
    sharded by rows. Results are DTensors, placed as those of `fused_softmax_xent` of such logits.

    Raises as `fused_softmax_xent`; RuntimeError for shapes that do not chain and for one DTensor alone, ValueError for
    max_logits_bytes below what one row needs, and, on a CPU, for valid_rows below their number. With a group, as
    `vocab_parallel_softmax_xent`.
    """
    loss, _ = _linear(
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        sample_weight=sample_weight,
        normalizer=normalizer,
        loss_dtype=loss_dtype,
        shift=shift,
        asked=Asked(valid_rows, max_logits_bytes, accum_dtype),
        place=Place(group, vocab_start, vocab_size, input_gradient),
        names=(),
    )
    return loss


def fused_linear_softmax_xent_with_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    stats: Iterable[str] = STATS,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    shift: bool = False,
    valid_rows: int | None = None,
    max_logits_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    input_gradient: str = "all_reduce",
) -> LossAndStats:
    """`fused_linear_softmax_xent`, and the stats of `fused_softmax_xent_with_stats`, in the shape of class indices.

    With `prediction` and `correct` alone it is three products; lse, entropy and target_logprob, which may be
    differentiated, make it four.
    """
    wanted: tuple[str, ...] = ()
    failed = None
    try:
        wanted = check_stats(stats, STATS, target, False)
    except (TypeError, ValueError, RuntimeError) as error:
        if group is None:
            raise
        failed = error  # told to the other ranks
    names = tuple(dict.fromkeys("prediction" if name == "correct" else name for name in wanted))
    loss, found = _linear(
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        sample_weight=sample_weight,
        normalizer=normalizer,
        loss_dtype=loss_dtype,
        shift=shift,
        asked=Asked(valid_rows, max_logits_bytes, accum_dtype),
        place=Place(group, vocab_start, vocab_size, input_gradient),
        names=names,
        failed=failed,
    )
    prediction, correct = found.prediction, None
    if "correct" in wanted:
        assert prediction is not None
        y = target[..., 1:] if shift else target
        if is_dtensor(prediction) and not is_dtensor(y):
            y = type(prediction).from_local(y, prediction.device_mesh, prediction.placements)  # type: ignore[attr-defined]
        correct = (prediction == y) & (prediction >= 0)
    prediction = prediction if "prediction" in wanted else None
    return LossAndStats(loss, found.lse, found.entropy, found.target_logprob, prediction, correct)


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    linear_bias: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    valid_rows: int | None = None,
    max_logits_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    input_gradient: str = "all_reduce",
) -> tuple[Tensor, Tensor]:
    """log p[target] and the entropy -sum_j p_j log p_j of each token.

    p = softmax(logit_scale * (input @ linear_weight.T + linear_bias)), after a softcap if there is one.

    Args:
        target: class indices (...); `ignore_index` gives 0 and 0.
        ids: in the place of target (..., K): the log-probabilities of K classes of each token. An id that is
            `ignore_index` gives 0, and a token without another has entropy 0.
        the others: as for `fused_linear_softmax_xent`.

    Returns (logprobs, entropy) in nats: (...) or (..., K), and (...); float32, or float64 for float64. Both are
    differentiable. No loss is made, and the logits are made again in backward: four products.
    """
    if (target is None) == (ids is None):
        raise TypeError("pass either target, the class of each token, or ids, several classes of each")
    if ids is not None and shift:
        raise ValueError("shift is for target: pass input[..., :-1, :] with ids")
    names: tuple[str, ...] = ("entropy",) if ids is not None else ("target_logprob", "entropy")
    loss, stats = _linear(
        input=input,
        linear_weight=linear_weight,
        target=target if ids is None else ids,
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        reduction="none",
        logit_scale=logit_scale,
        softcap=softcap,
        shift=shift,
        asked=Asked(valid_rows, max_logits_bytes, accum_dtype),
        place=Place(group, vocab_start, vocab_size, input_gradient),
        names=names,
        several=ids is not None,
    )
    assert stats.entropy is not None
    logprobs = loss if ids is not None else stats.target_logprob
    assert logprobs is not None
    return logprobs, stats.entropy


def check_head(head: nn.Module, called: bool = False) -> None:
    """Whether the layer is a product with its weight and nothing else. called: it is called, and what has been put in
    the place of its forward, as Accelerate does, comes to F.linear."""
    hooks = [h for name in ("_forward_hooks", "_forward_pre_hooks") for h in getattr(head, name)]
    replaced = "forward" in vars(head) and not called
    if type(head).forward is nn.Linear.forward and not hooks and not replaced:  # type: ignore[comparison-overlap]
        return
    also = " with forward hooks" if hooks else " with another forward" if replaced else ""
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    raise RuntimeError(
        f"the linear layer is {kind}{also}: it may do more than a product with its "
        "weight, which is all that is applied here. Merge adapters into the weight or keep them off this layer, or "
        "call the layer and give its logits to fused_softmax_xent"
    )


class Asked(NamedTuple):
    """What the caller asks of the chunks: the public functions say what each is."""

    valid_rows: int | None
    max_logits_bytes: int | None
    accum_dtype: torch.dtype | None


class Place(NamedTuple):
    """Where the classes are: the public functions say what each is. By default all are here."""

    group: Any = None
    vocab_start: int | None = None
    vocab_size: int | None = None
    input_gradient: str = "all_reduce"


class Rows(NamedTuple):
    """A checked call."""

    head: Head
    call: Call  # its logits are there for their shape; its shape is that of all targets
    how: How


def _linear(
    *, names: tuple[str, ...], shift: bool, place: Place, failed: Exception | None = None, **arguments: Any
) -> tuple[Tensor, Stats]:
    """failed: what is wrong already."""
    if is_dtensor(arguments["linear_weight"]) and is_dtensor(arguments["input"]):
        from .parallel.dtensor_linear import dtensor_linear

        _check_is_default(place, "is for plain tensors: DTensors say it themselves")
        found: tuple[Tensor, Stats] = dtensor_linear(partial(_linear, names=names), shift=shift, **arguments)
        return found
    if place.group is None:
        _check_is_default(place, "is for classes that are spread over a group: pass the group")
        rows = _rows(shift=shift, **arguments)
        loss, stats = _of_rows(rows.head, rows.call.inputs, rows.call.options, rows.how, names)
    else:
        from .parallel.linear import of_group

        def prepare(ranks: int) -> Rows:
            if failed is not None:
                raise failed
            return _rows(shift=shift, ranks=ranks, **arguments)

        rows, loss, stats = of_group(prepare, names, place)
    call = rows.call
    loss = loss.to(call.loss_dtype)
    each = loss if call.options.reduction == "none" else None
    whole = [_in_shape(found, call.shape, shift) for found in (each, *stats)]
    return loss if whole[0] is None else whole[0], Stats(*whole[1:])


def _check_is_default(place: Place, reason: str) -> None:
    for name, given in place._asdict().items():
        if given != Place._field_defaults[name]:
            raise ValueError(f"{name} {reason}")


def _rows(
    *,
    input: Tensor,
    linear_weight: Tensor,
    target: Any,
    linear_bias: Tensor | None,
    weight: Tensor | None = None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None,
    logit_scale: float | Tensor,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    shift: bool,
    asked: Asked,
    several: bool = False,
    ranks: int | None = None,
) -> Rows:
    """ranks: those with a part of the rows each, where the classes are spread over a group."""
    if several and ranks is not None:
        raise ValueError("several ids of each token do not go with a group: pass target")
    _check_linear(input, linear_weight, target, linear_bias, shift)
    how = _how(input, linear_weight, *asked, OF_WIDEST if ranks is not None else None)
    shape, n_cols = input.shape[:-1], len(linear_weight)
    if ranks not in (None, 1):
        if input.dim() < 2:
            raise RuntimeError(f"parts of the rows are input (N, ..., H), got {tuple(input.shape)}")
        shape = torch.Size([shape[0] * ranks, *shape[1:]])
    _check_target(shape, target, n_cols, several, shift)
    acc = torch.promote_types(input.dtype, torch.float32)
    y = target.reshape(math.prod(shape), *target.shape[len(shape) :])
    logits = input.new_zeros((), dtype=acc).expand(math.prod(shape), n_cols)  # for those who ask of which shape
    check_tensors(logits, y[:, :1].reshape(-1) if several else y, weight, ranks is not None)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("no gradient with respect to weight: pass weight.detach()")
    check_options(y, ignore_index, reduction, loss_dtype)
    eps, zeta = check_label_smoothing(label_smoothing, input), check_z_loss(z_loss, input)
    cap, scale = check_softcap(softcap, input), check_logit_scale(logit_scale, input)
    divisor = check_normalizer(normalizer, reduction, input)
    if sample_weight is not None:
        sample_weight = check_sample_weight(sample_weight, input, input, shape).reshape(-1)
    ignore_index = int(ignore_index)

    soft = y.is_floating_point()
    if shift and y.numel():
        y, sample_weight = _shifted(y, sample_weight, shape, ignore_index, acc)
        if soft:
            predicting = math.prod(shape) // shape[-1] * (shape[-1] - 1)
            divisor = predicting if divisor is None and reduction == "mean" else divisor
            known = predicting if how.valid_rows is None else how.valid_rows
            how = how._replace(valid_rows=min(known, predicting))
    x = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    inputs = Inputs(logits[: y.shape[0]], y, weight, sample_weight, None, scale if isinstance(scale, Tensor) else None)
    if reduction == "mean" and divisor is None and ranks is None:
        divisor = y.shape[0] if soft else sum_of_weights(y, weight, ignore_index, acc)
    if divisor is not None:
        inputs = inputs._replace(normalizer=as_vector(divisor, logits))
    options = Options(ignore_index, reduction, eps, zeta, cap, 1.0 if isinstance(scale, Tensor) else scale)
    call = Call(inputs, options, shape, loss_dtype or acc, False)
    return Rows(Head(x, linear_weight, linear_bias), call, how)


def _of_rows(head: Head, inputs: Inputs, options: Options, how: How, names: tuple[str, ...]) -> tuple[Tensor, Stats]:
    if in_transform(*head, *inputs[1:]):
        loss, stats = linear_rows.plain_loss(head, inputs, options)
        return loss, Stats(**{name: getattr(stats, name) for name in names})
    grad = torch.is_grad_enabled()
    v, n = inputs.sample_weight, inputs.normalizer
    if grad and any(x is not None and x.requires_grad for x in (v, n)):
        bare = inputs._replace(sample_weight=None, normalizer=None)
        loss, stats = _of_rows(head, bare, options._replace(reduction="none"), how._replace(valid_rows=None), names)
        if v is not None:
            stats = stats.without(v == 0)
        return reduced(loss, inputs, options), stats
    wanted = (grad and x is not None and x.requires_grad for x in (*head, inputs.target, inputs.logit_scale))
    return linear_rows.linear_loss(head, inputs, options, how, names, Gradients(*wanted))


def _how(
    input: Tensor,
    linear_weight: Tensor,
    valid_rows: int | None,
    max_logits_bytes: int | None,
    accum_dtype: torch.dtype | None,
    default_bytes: int | None,
) -> How:
    for name, value in (("valid_rows", valid_rows), ("max_logits_bytes", max_logits_bytes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (*INTEGRAL, torch.SymInt))):
            raise TypeError(f"{name} must be an int, which the host knows, not {type(value).__name__}")
    if valid_rows is not None and valid_rows < 0:
        raise ValueError(f"valid_rows must be at least 0, got {valid_rows}")
    accumulator = linear_weight.dtype if accum_dtype is None else accum_dtype
    if accumulator not in (linear_weight.dtype, torch.float32) or accumulator.itemsize < linear_weight.itemsize:
        raise RuntimeError(
            f"accum_dtype must be {linear_weight.dtype}, as linear_weight, or float32, got {accum_dtype}"
        )
    device = input.device.type
    cast = device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64
    operand = torch.get_autocast_dtype(device) if cast else input.dtype
    allowed = [input.dtype] if input.dtype == torch.float64 else [input.dtype, torch.float32]
    if linear_weight.dtype not in (DTYPES[1:] if cast else allowed):
        raise RuntimeError(
            f"linear_weight must have the dtype of input, {input.dtype}, or be float32 with half precision, "
            f"got {linear_weight.dtype}"
        )
    if max_logits_bytes is None:
        max_logits_bytes = default_bytes or linear_rows.default_bytes(len(linear_weight), linear_weight)
    return How(max_logits_bytes, valid_rows, accumulator, operand)


def _check_linear(input: Tensor, linear_weight: Tensor, target: Any, linear_bias: Tensor | None, shift: bool) -> None:
    named = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
    for name, x in named.items():
        if isinstance(x, nn.Module):
            check_head(x)
            raise TypeError(f"{name} must be a Tensor, not {type(x).__name__}: pass its weight, and its bias")
        if not isinstance(x, Tensor) and not (x is None and name == "linear_bias"):
            raise TypeError(f"{name} must be a Tensor, not {type(x).__name__}")
        if is_dtensor(x):
            raise RuntimeError(
                f"{name} is a DTensor, but not both of input and linear_weight are. Under FSDP2 call it in the forward "
                "of the module that owns the weight, where it is whole. For classes that are spread over ranks make "
                "input a DTensor of the weight's mesh, or pass to_local() of both and the group"
            )
        if x is not None and x.device != input.device:
            raise RuntimeError(f"input is on {input.device} but {name} is on {x.device}")
    for name in ("input", "linear_weight", "linear_bias"):
        if (x := named[name]) is not None and x.dtype not in DTYPES:
            raise NotImplementedError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if linear_weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise RuntimeError(
            f"input (..., H) and linear_weight (C, H) do not chain: {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"linear_bias must have shape ({len(linear_weight)},), one for each class, got {tuple(linear_bias.shape)}"
        )
    if shift and input.dim() < 2:
        raise RuntimeError(f"shift=True is for input (..., T, H), got {tuple(input.shape)}")


def _check_target(of_rows: torch.Size, target: Tensor, n_cols: int, several: bool, shift: bool) -> None:
    shape = tuple(of_rows)
    if several:
        if target.dtype not in INDEX_DTYPES or target.shape[:-1] != shape or target.dim() == 0:
            raise RuntimeError(
                f"ids must be integers of shape {(*shape, 'K')}, got {target.dtype} {tuple(target.shape)}"
            )
        if target.shape[-1] == 0:
            raise RuntimeError(f"ids must hold a class for each token, got shape {tuple(target.shape)}")
        return
    expected = (*shape, n_cols) if target.is_floating_point() else shape
    if target.shape != expected:
        kind = "probabilities" if target.is_floating_point() else "class indices"
        error = ValueError if shape and target.dim() and len(target) != shape[0] else RuntimeError
        hint = ". With shift=True pass those of all T positions" if shift else ""
        raise error(f"expected {kind} of shape {expected} for input {(*shape, 'H')}: got {tuple(target.shape)}{hint}")


def _shifted(
    y: Tensor, sample_weight: Tensor | None, shape: torch.Size, ignore_index: int, acc: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """What each row but the very last predicts. The last of other sequences are ignored, or have weight 0."""
    y = y[1:]
    sample_weight = None if sample_weight is None else sample_weight[1:]
    last = torch.arange(1, y.shape[0] + 1, device=y.device) % shape[-1] == 0
    if not y.is_floating_point():
        y = y.long()
        return y.masked_fill(last, ignore_index), sample_weight
    if sample_weight is None:
        sample_weight = y.new_ones(y.shape[0], dtype=acc)
    return y, sample_weight.masked_fill(last, 0)


def _in_shape(rows: Tensor | None, shape: torch.Size, shift: bool) -> Tensor | None:
    """Of rows [n_rows, ...], or without the very last where that predicts nothing."""
    if rows is None or not shift:
        return None if rows is None else rows.reshape((*shape, *rows.shape[1:]))
    missing = math.prod(shape) - rows.shape[0]
    return F.pad(rows, (0, missing)).view(shape)[..., :-1]

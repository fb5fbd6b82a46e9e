"""The rows' losses as registered operators, for torch.compile: opaque to it, with shapes and gradients of their own.

Entered only while compiling: in eager mode a registered operator costs more host time than an autograd.Function. The
reduction is left to torch operations, which the compiler fuses with what surrounds them.

Numbers come as a float64 tensor on the CPU: a float argument of an operator is compiled in, and a schedule would
compile again at every step.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import implementation
from .options import Inputs, Options, Stats

NEUTRAL = float("inf")  # in the place of no softcap


def row_loss_and_stats(inputs: Inputs, options: Options, names: list[str]) -> list[Tensor]:
    """The loss of each row [n_rows], and the stats of those names."""
    logits, target, weight, sample_weight, _, logit_scale = inputs
    tensors = logits, target, weight, sample_weight, logit_scale
    return list(row_loss(*tensors, options.ignore_index, _numbers(options), " ".join(names)))


def soft_loss(inputs: Inputs, options: Options) -> Tensor:
    """The loss of each row [n_rows] against probabilities."""
    logits, target, weight, sample_weight, _, logit_scale = inputs
    loss: Tensor = soft_target_loss(logits, target, weight, sample_weight, logit_scale, _numbers(options))
    return loss


def _numbers(options: Options) -> Tensor:
    softcap = NEUTRAL if options.softcap is None else options.softcap
    numbers = options.label_smoothing, options.z_loss, softcap, options.logit_scale
    return torch.stack([torch.ones((), dtype=torch.float64) * number for number in numbers])


def _options(numbers: Tensor, ignore_index: int = -100) -> Options:
    label_smoothing, z_loss, softcap, logit_scale = numbers.tolist()
    return Options(ignore_index, "none", label_smoothing, z_loss, None if softcap == NEUTRAL else softcap, logit_scale)


def _acc(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


@torch.library.custom_op("softxent::row_loss", mutates_args=())
def row_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    ignore_index: int,
    numbers: Tensor,
    stats: str,
) -> list[Tensor]:
    """The loss of each row against its class index, and the stats of these names. Nothing else is kept of a row: which
    kernel takes it depends on where it lies in memory, which is not known while compiling."""
    if len(logits) == 0:
        return _room(logits, stats)
    inputs = Inputs(logits, target, weight, sample_weight, None, logit_scale)
    wanted = frozenset(stats.split())
    module = implementation(logits, target)
    loss, found, _ = module.forward(inputs, _options(numbers, ignore_index), _acc(logits), False, False, wanted)
    return [loss, *(getattr(found, name) for name in stats.split())]


@row_loss.register_fake
def _(
    logits: Tensor,
    target: Any,
    weight: Any,
    sample_weight: Any,
    logit_scale: Any,
    ignore_index: int,
    numbers: Tensor,
    stats: str,
) -> list[Tensor]:
    return _room(logits, stats)


def _room(logits: Tensor, stats: str) -> list[Tensor]:
    dtypes = [torch.int64 if name == "prediction" else _acc(logits) for name in stats.split()]
    return [logits.new_empty(logits.shape[0], dtype=dtype) for dtype in (_acc(logits), *dtypes)]


@torch.library.custom_op("softxent::row_loss_backward", mutates_args=())
def row_loss_backward(
    dloss: Tensor,
    dstats: list[Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    ignore_index: int,
    numbers: Tensor,
    stats: str,
) -> Tensor:
    """The gradient of the logits, contiguous. dstats: those of the stats of these names."""
    if len(logits) == 0:
        return logits.new_zeros(logits.shape)
    inputs = Inputs(logits, target, weight, sample_weight, None, logit_scale)
    given = Stats(**dict(zip(stats.split(), dstats, strict=True)))
    options = _options(numbers, ignore_index)
    module = implementation(logits, target)
    gradient, _ = module.backward(dloss, given, inputs, options, [None, None, None], False, True, False)
    return gradient.contiguous()  # type: ignore[no-any-return]


@row_loss_backward.register_fake
def _(dloss: Tensor, dstats: Any, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep_row_loss(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.ignore_index, numbers, ctx.stats = inputs
    ctx.save_for_backward(*tensors, numbers)


def _row_loss_gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *tensors, numbers = ctx.saved_tensors
    pairs = [(name, grad) for name, grad in zip(ctx.stats.split(), grads[1:], strict=True) if name != "prediction"]
    pairs = [(name, grad) for name, grad in pairs if grad is not None]
    names, dstats = " ".join(name for name, _ in pairs), [grad for _, grad in pairs]
    dloss = grads[0]
    if dloss is None:
        dloss = tensors[0].new_zeros(tensors[0].shape[0], dtype=_acc(tensors[0]))
    row_backward = torch.ops.softxent.row_loss_backward
    dlogits = row_backward(dloss, dstats, *tensors, ctx.ignore_index, numbers, names)
    return dlogits, *[None] * 7


row_loss.register_autograd(_row_loss_gradient, setup_context=_keep_row_loss)


@torch.library.custom_op("softxent::soft_target_loss", mutates_args=())
def soft_target_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    numbers: Tensor,
) -> Tensor:
    """The loss of each row against its row of probabilities."""
    if len(logits) == 0:
        return logits.new_zeros(0, dtype=_acc(logits))
    inputs = Inputs(logits, target, weight, sample_weight, None, logit_scale)
    module = implementation(logits, target)
    loss, *_ = module.forward(inputs, _options(numbers), _acc(logits), False, False, frozenset())
    return loss  # type: ignore[no-any-return]


@soft_target_loss.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=_acc(logits))


@torch.library.custom_op("softxent::soft_target_backward", mutates_args=())
def soft_target_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    numbers: Tensor,
    needs_dtarget: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the logits and of the target, contiguous; of the target an empty one if it is not wanted."""
    if len(logits) == 0:
        return logits.new_zeros(logits.shape), target.new_zeros(target.shape if needs_dtarget else 0)
    module = implementation(logits, target)
    inputs = Inputs(logits, target, weight, sample_weight, None, logit_scale)
    dlogits, dtarget = module.backward(
        dloss, Stats(), inputs, _options(numbers), [None, None, None], False, True, needs_dtarget
    )
    return dlogits.contiguous(), target.new_empty(0) if dtarget is None else dtarget.contiguous()


@soft_target_backward.register_fake
def _(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Any,
    sample_weight: Any,
    logit_scale: Any,
    numbers: Any,
    needs_dtarget: bool,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), target.new_empty(target.shape if needs_dtarget else 0)


def _keep_soft_target(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _soft_target_gradient(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    needs_dtarget = ctx.needs_input_grad[1]
    dlogits, dtarget = torch.ops.softxent.soft_target_backward(dloss, *ctx.saved_tensors, needs_dtarget)
    return dlogits, dtarget if needs_dtarget else None, None, None, None, None


soft_target_loss.register_autograd(_soft_target_gradient, setup_context=_keep_soft_target)

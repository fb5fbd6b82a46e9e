"""The rows' losses as registered operators, for torch.compile: opaque to it, with shapes and gradients of their own.

Entered only while compiling: in eager mode a registered operator costs more host time than an autograd.Function. The
reduction is left to torch operations, which the compiler fuses with what surrounds them.

The label smoothing is a 0-d float64 tensor on the CPU, or None for 0: a float argument of an operator is compiled in,
and a schedule would compile again at every step.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import implementation, uses_kernels


def _acc(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _float(label_smoothing: Tensor | None) -> float:
    return 0.0 if label_smoothing is None else label_smoothing.item()


def _row_stats(logits: Tensor, count: int) -> list[Tensor]:
    """Numbers that the kernels keep of each row; torch operations keep none."""
    n_rows = logits.shape[0] if uses_kernels(logits) else 0
    return [logits.new_empty(n_rows, dtype=_acc(logits)) for _ in range(count)]


@torch.library.custom_op("softxent::row_loss", mutates_args=())
def row_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: Tensor | None
) -> Tensor:
    """The loss of each row against its class index. Nothing is kept of a row: which kernel takes it depends on where it
    lies in memory, which is not known while compiling."""
    acc = _acc(logits)
    if len(logits) == 0:
        return logits.new_zeros(0, dtype=acc)
    options = ignore_index, _float(label_smoothing), "none", acc, False, False
    return implementation(logits, "row_loss").forward(logits, target, weight, *options)[0]  # type: ignore[no-any-return]


@row_loss.register_fake
def _(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: Tensor | None
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=_acc(logits))


@torch.library.custom_op("softxent::row_loss_backward", mutates_args=())
def row_loss_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: Tensor | None,
) -> Tensor:
    """The gradient of the logits, contiguous."""
    if len(logits) == 0:
        return logits.new_zeros(logits.shape)
    options = ignore_index, _float(label_smoothing), "none"
    kept = [None] * (3 if uses_kernels(logits) else 2)
    gradient = implementation(logits, "row_loss").backward(dloss, logits, target, weight, *options, kept, False)
    return gradient.contiguous()  # type: ignore[no-any-return]


@row_loss_backward.register_fake
def _(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep_row_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, weight, ctx.ignore_index, label_smoothing = inputs
    ctx.save_for_backward(logits, target, weight, label_smoothing)


def _row_loss_gradient(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    logits, target, weight, label_smoothing = ctx.saved_tensors
    options = ctx.ignore_index, label_smoothing
    dlogits = torch.ops.softxent.row_loss_backward(dloss, logits, target, weight, *options)
    return dlogits, None, None, None, None


row_loss.register_autograd(_row_loss_gradient, setup_context=_keep_row_loss)


@torch.library.custom_op("softxent::soft_target_loss", mutates_args=())
def soft_target_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row against its row of probabilities; m, d and a of each row, where the kernels ran."""
    if len(logits) == 0:
        return logits.new_zeros(0, dtype=_acc(logits)), *_row_stats(logits, 3)  # type: ignore[return-value]
    kept = uses_kernels(logits)
    loss, stats = implementation(logits, "soft_target").forward(logits, target, weight, _float(label_smoothing), kept)
    return loss, *(stats if kept else _row_stats(logits, 3))  # type: ignore[return-value]


@soft_target_loss.register_fake
def _(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], dtype=_acc(logits)), *_row_stats(logits, 3)  # type: ignore[return-value]


@torch.library.custom_op("softxent::soft_target_backward", mutates_args=())
def soft_target_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: Tensor | None,
    needs_dtarget: bool,
    m: Tensor,
    d: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the logits and of the target, contiguous; of the target an empty one if it is not wanted."""
    if len(logits) == 0:
        return logits.new_zeros(logits.shape), target.new_zeros(target.shape if needs_dtarget else 0)
    module = implementation(logits, "soft_target")
    eps = _float(label_smoothing)
    dlogits, dtarget = module.backward(dloss, logits, target, weight, eps, needs_dtarget, [m, d, a], False)
    return dlogits, target.new_empty(0) if dtarget is None else dtarget


@soft_target_backward.register_fake
def _(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: Tensor | None,
    needs_dtarget: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), target.new_empty(target.shape if needs_dtarget else 0)


def _keep_soft_target(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _soft_target_gradient(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, stats = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    needs_dtarget = ctx.needs_input_grad[1]
    dlogits, dtarget = torch.ops.softxent.soft_target_backward(dloss, *inputs, needs_dtarget, *stats)
    return dlogits, dtarget if needs_dtarget else None, None, None


soft_target_loss.register_autograd(_soft_target_gradient, setup_context=_keep_soft_target)

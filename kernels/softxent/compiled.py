"""The rows' loss as registered operators, for who looks on: torch.compile, make_fx, a FakeTensorMode, the meta device.

    row_loss            the loss, and the stats wanted
    row_loss_           the same, and the gradient of the logits over the logits
    row_loss_backward_  the gradient of the logits over the logits, and that of probabilities

What is written over is a clone that `Traced` makes. Inductor leaves it out where nobody reads the logits afterwards:
so a compiled step needs no matrix of its own, and where forward makes the gradient it reads and writes once, as the
eager one does. Entered only where it has to be: an operator costs more host time than an autograd.Function.

Numbers come as tensors [] on the device of the logits, where the kernels load them. A float argument of an operator is
compiled in: a schedule would compile again at every step, and a CUDA graph would replay what it was captured with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import implementation, uses_kernels
from .normalizer import normalizer as sum_of_weights
from .normalizer import widest
from .options import DIFFERENTIABLE, Inputs, Options, Stats, empty_stats, is_given
from .row_loss import gradients_by_reference, loss_of_nothing
from .transforms import in_higher_order_backward

NUMBERS = ("label_smoothing", "z_loss", "softcap", "logit_scale")


def row_loss(inputs: Inputs, options: Options, wanted: frozenset[str]) -> tuple[Tensor, Stats]:
    """As row_loss.row_loss, in the dtype of the computation."""
    logits, target = inputs.logits, inputs.target
    given, tensors = numbers_of(options, inputs)
    names = [name for name in Stats._fields if name in wanted]
    differentiated = torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad)
    # A gradient that is kept is all that is kept: a second derivative, or one of a stat, has to read the logits.
    at_once = (
        differentiated
        and torch.compiler.is_compiling()
        and options.reduction != "none"
        and logits.dtype != torch.float16
        and not target.requires_grad
        and not any(name in DIFFERENTIABLE for name in names)
    )
    settings = options.ignore_index, options.reduction, given, " ".join(names), at_once
    loss, *stats = Traced.apply(settings, *inputs[:5], *tensors)
    return loss, Stats(**dict(zip(names, stats, strict=True)))


def numbers_of(options: Options, inputs: Inputs) -> tuple[str, list[Tensor]]:
    """The names of the numbers that may change anything, and these as tensors [] on the device of the logits."""
    numbers = options._asdict() | ({} if inputs.logit_scale is None else {"logit_scale": inputs.logit_scale})
    given = [name for name in NUMBERS if is_given(numbers[name], 1.0 if name == "logit_scale" else 0.0)]
    return " ".join(given), [_as_tensor(numbers[name], inputs.logits) for name in given]


def with_numbers(inputs: Inputs, options: Options, given: str, numbers: Sequence[Tensor]) -> tuple[Inputs, Options]:
    """Numbers as the implementation wants them: the kernels tensors, torch operations on a CPU numbers."""
    values: dict[str, Any] = dict(zip(given.split(), numbers, strict=True))
    if inputs.logits.device.type == "cpu" and not uses_kernels(inputs.logits):
        values = {name: value.item() for name, value in values.items()}
    if isinstance(values.get("logit_scale"), Tensor):
        inputs = inputs._replace(logit_scale=values.pop("logit_scale"))
    return inputs, options._replace(**values)


def _as_tensor(number: float | Tensor, logits: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().to(logits.device)
    one = torch.ones((), dtype=widest(logits.device), device=logits.device)
    return one * number  # new_full's would be compiled in


class Traced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Any, logits: Tensor, *rest: Any) -> Any:
        *arguments, at_once = settings
        tensors = *rest[:4], list(rest[4:])
        if at_once:
            over = logits.detach().clone(memory_format=torch.contiguous_format)
            out = torch.ops.softxent.row_loss_(over, *tensors, *arguments[:-1], bool(arguments[-1]))
            out = out if arguments[-1] else out[:1]
            ctx.save_for_backward(over)
        else:
            out = tuple(torch.ops.softxent.row_loss(logits, *tensors, *arguments))
            ctx.save_for_backward(logits, *rest)
        ctx.settings = settings
        ctx.mark_non_differentiable(*(x for x in out if x.dtype == torch.int64))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ignore_index, reduction, given, names, at_once = ctx.settings
        dloss = grads[0]
        if at_once:
            (made,) = ctx.saved_tensors
            return None, torch.where(made == 0, made, made * dloss), *[None] * (4 + len(given.split()))
        logits, target, *rest = ctx.saved_tensors
        weight, _, normalizer = rest[:3]
        pairs = [(name, dx) for name, dx in zip(names.split(), grads[1:], strict=True) if name in DIFFERENTIABLE]
        if pairs and reduction != "none":  # 0 of a loss that nobody differentiates: it may be divided by nothing
            if reduction == "mean":
                n = sum_of_weights(target, weight, ignore_index, dloss.dtype) if normalizer is None else normalizer[0]
                dloss = torch.where(dloss == 0, 0, dloss / n)
            dloss, reduction = dloss.expand(logits.shape[0]), "none"
        arguments: Any = (target, *rest[:3], list(rest[3:]), ignore_index, reduction, given)
        if not torch.compiler.is_compiling() and in_higher_order_backward(dloss):
            inputs, options = _unpacked(logits, *arguments)
            dlogits, dtarget, _ = gradients_by_reference(dloss, Stats(**dict(pairs)), inputs, options)
        else:
            dlogits = logits.detach().clone(memory_format=torch.contiguous_format)
            stats = " ".join(name for name, _ in pairs)
            dstats, needs_dtarget = [dx for _, dx in pairs], ctx.needs_input_grad[2]
            backward = torch.ops.softxent.row_loss_backward_
            dtarget = backward(dlogits, dloss, dstats, *arguments, stats, needs_dtarget)
            dtarget = dtarget if needs_dtarget else None
        return None, dlogits, dtarget, *[None] * (3 + len(given.split()))


def _unpacked(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    numbers: list[Tensor],
    ignore_index: int,
    reduction: str,
    given: str,
) -> tuple[Inputs, Options]:
    inputs = Inputs(logits, target, weight, sample_weight, normalizer)
    return with_numbers(inputs, Options(ignore_index, reduction), given, numbers)


def _room(logits: Tensor, reduction: str, stats: str) -> list[Tensor]:
    acc = torch.promote_types(logits.dtype, torch.float32)
    shape = logits.shape[:1] if reduction == "none" else ()
    room = empty_stats(frozenset(stats.split()), logits)
    return [logits.new_empty(shape, dtype=acc), *(getattr(room, name) for name in stats.split())]


def _forward(logits: Tensor, arguments: tuple[Any, ...], stats: str, over: bool) -> list[Tensor]:
    inputs, options = _unpacked(logits, *arguments)
    if logits.numel() == 0:
        return [loss_of_nothing(inputs, options), *_room(logits, options.reduction, stats)[1:]]
    acc, wanted = torch.promote_types(logits.dtype, torch.float32), frozenset(stats.split())
    module = implementation(logits, inputs.target)
    loss, found, _ = module.forward(inputs, options, acc, over, over, wanted)
    return [loss, *(getattr(found, name) for name in stats.split())]


@torch.library.custom_op("softxent::row_loss", mutates_args=())
def functional_row_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    numbers: list[Tensor],
    ignore_index: int,
    reduction: str,
    given: str,
    stats: str,
) -> list[Tensor]:
    """The loss, of each row or reduced, and the stats of these names. numbers: those of the names in `given`."""
    rest = target, weight, sample_weight, normalizer, numbers, ignore_index, reduction, given
    return _forward(logits, rest, stats, over=False)


@torch.library.custom_op("softxent::row_loss_", mutates_args=("logits",))
def inplace_row_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    numbers: list[Tensor],
    ignore_index: int,
    reduction: str,
    given: str,
    predicts: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, which is reduced, and the prediction, empty if it is not wanted; and the gradient over the logits,
    which are contiguous. Two tensors: what mutates cannot be functionalized with a list."""
    rest = target, weight, sample_weight, normalizer, numbers, ignore_index, reduction, given
    loss, *prediction = _forward(logits, rest, "prediction" * predicts, over=True)
    return loss, prediction[0] if predicts else target.new_empty(0, dtype=torch.int64)


@functional_row_loss.register_fake
def _(logits: Tensor, *rest: Any) -> list[Tensor]:
    return _room(logits, rest[6], rest[8])


@inplace_row_loss.register_fake
def _(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    loss, *prediction = _room(logits, rest[5], "prediction" * rest[7])
    return loss, prediction[0] if rest[7] else target.new_empty(0, dtype=torch.int64)


@torch.library.custom_op("softxent::row_loss_backward_", mutates_args=("logits",))
def inplace_backward(
    logits: Tensor,
    dloss: Tensor,
    dstats: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    numbers: list[Tensor],
    ignore_index: int,
    reduction: str,
    given: str,
    stats: str,
    needs_dtarget: bool,
) -> Tensor:
    """The gradient of the logits over the logits, which are contiguous; returns that of probabilities, or an empty one.
    dstats: incoming ones of the stats of these names."""
    inputs, options = _unpacked(
        logits, target, weight, sample_weight, normalizer, numbers, ignore_index, reduction, given
    )
    if logits.numel() == 0:
        return target.new_zeros(target.shape if needs_dtarget else 0)
    incoming = Stats(**dict(zip(stats.split(), dstats, strict=True)))
    module = implementation(logits, target)
    _, dtarget = module.backward(dloss, incoming, inputs, options, [None, None, None], True, True, needs_dtarget)
    return target.new_empty(0) if dtarget is None else dtarget.contiguous()  # type: ignore[no-any-return]


@inplace_backward.register_fake
def _(logits: Tensor, dloss: Tensor, dstats: Any, target: Tensor, *rest: Any) -> Tensor:
    return target.new_empty(target.shape if rest[-1] else 0)

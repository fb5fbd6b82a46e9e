"""The public operations: PyTorch's arguments checked and turned into rows, the loss in PyTorch's shape and dtype."""

import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import compiled, reference
from .checks import (
    check_inplace,
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
    legacy_reduction,
)
from .normalizer import normalizer as sum_of_weights
from .options import Inputs, Options, Stats, empty_stats
from .row_loss import NOTHING, row_loss
from .transforms import in_transform, is_traced

STATS = ("lse", "entropy", "target_logprob", "prediction", "correct")


class LossAndStats(NamedTuple):
    """The loss, and of each row, in the shape of class indices, what was asked for; None for the rest."""

    loss: Tensor
    lse: Tensor | None
    entropy: Tensor | None
    target_logprob: Tensor | None
    prediction: Tensor | None
    correct: Tensor | None


def fused_softmax_xent(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    inplace: bool = False,
) -> Tensor:
    """Cross-entropy between softmax(input) and the target, in nats: torch.nn.functional.cross_entropy, fused.

        loss_i = -(1 - eps) * w[y_i] * log p_i[y_i] - eps / C * sum_j w_j * log p_i[j],    p_i = softmax(z_i)
        loss_i = -sum_j w_j * ((1 - eps) * t_i[j] + eps / C) * log p_i[j]                  for probabilities t_i
        loss_i = (loss_i + z_loss * w[y_i] * lse_i^2) * sample_weight_i,                   lse_i = log sum_j exp z_i[j]
        z_i    = softcap * tanh(logit_scale * input_i / softcap)

    Args:
        input: logits, (N, C), (C) or (N, C, d1, ..., dK): float64, float32, bfloat16 or float16. (N, C) is read in
            place through any strides, and K more dimensions where the classes come last in memory (channels_last);
            else they are copied to (N * d1 * ..., C) once. A DTensor, its rows or its classes sharded, gives a DTensor
            (docs/parallel.md).
        target: class indices in [0, C) or `ignore_index`, in the shape of `input` without its class dimension:
            int64, int32 or uint8. Or class probabilities, floating point, in the shape of `input`: they need not sum
            to 1, and get a gradient if they require one.
        weight: (C), a weight for each class.
        size_average, reduce: deprecated in PyTorch; they override `reduction` there and here.
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their logits, and do not count in
            the mean. For class indices only.
        reduction: "none" for the loss of each row in the shape of `input` without its class dimension; "sum"; or
            "mean", which divides the sum by that of the targets' weights, or by the number of rows for probabilities,
            and is NaN where there is nothing to divide by.
        label_smoothing: eps in [0, 1]. It and the numbers below may be tensors of one: on the CPU their value is taken,
            on the device of the logits the kernels load it, unchecked, so that a CUDA graph sees every change.
        z_loss: at least 0; holds lse near 0 (Chowdhery et al., 2022, "PaLM": 1e-4). A row's counts as often as the
            row does in the mean: w[y_i] times; once for probabilities.
        softcap: above 0, or None: bounds the logits smoothly (Gemma Team, 2024, "Gemma 2": 30). A logit of -inf
            becomes -softcap, and is a class like others.
        logit_scale: above 0, a number or a tensor of one: the inverse of a temperature. A tensor that is not above 0
            gives NaN. One that requires a gradient gets it (Radford et al., 2021, "CLIP"), for class indices by one
            more pass over logits and gradient, for probabilities and while compiling by plain torch operations.
        sample_weight: floating point, integer or bool, in the shape of class indices: multiplies the loss of each row,
            z-loss included. The mean's divisor does not change. A row of weight 0 is not read, as an ignored one. If it
            requires a gradient, all rows are read, and the gradient of the logits waits for backward.
        normalizer: a number, or a tensor of one: what the mean divides by instead, such as the number of tokens in all
            micro-batches of an accumulated gradient. 0 and NaN are divided by like other numbers: the loss is infinite
            or NaN.
        loss_dtype: of the result; default: the dtype of `input`, and float32 under autocast. float32 for logits of
            half precision saves the rounding of the loss, about 1e-3 of it.
        inplace: write the gradient over the logits, which saves a matrix of their size. They must be the result of an
            operation, not a leaf, and nothing may read them after this call; what autograd itself has kept of them for
            another operation's backward pass raises there. One backward pass, no second derivative, no transform.
            torch.compile breaks its graph here, and raises with fullgraph=True. Where `input` has to be copied, the
            copy is written over; where it is a view, autograd gives it a new grad_fn, so that hooks and
            torch.autograd.grad need one taken before. Without gradients it does nothing.

    Logits of half precision are computed, summed and divided in float32, and rounded once at the end. The gradient
    for class indices is exact where the model is confident: 1 - p[y] is summed from its own terms, never subtracted.
    Differentiable any number of times; under torch.func transforms, forward-mode AD and `create_graph`, plain torch
    operations of the same formula (reference.py) serve. Numbers are arguments of the kernels: a schedule of them
    compiles nothing anew.

    Raises PyTorch's exceptions: ValueError for the batch size, the reduction, and a normalizer without a mean,
    RuntimeError for other shapes, dtypes, devices, numbers out of range, and `ignore_index` with probabilities,
    IndexError (CPU) for a target out of range, NotImplementedError for logits that are not floating point. On a GPU a
    target out of range gives NaN in that row's loss and gradient.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    arguments = (
        input,
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
    )
    if is_dtensor(input):
        return _of_dtensor(arguments, ()).loss
    compute = loss_alone
    if (
        inplace
        and torch.compiler.is_dynamo_compiling()
        and torch.is_grad_enabled()
        and getattr(input, "requires_grad", False)
    ):
        from .eager import loss_alone as compute  # here Dynamo breaks its graph
    return compute(*arguments)


def fused_softmax_xent_with_stats(
    input: Tensor,
    target: Tensor,
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
    inplace: bool = False,
) -> LossAndStats:
    """`fused_softmax_xent`, and what else the same pass over the logits can tell of each row.

        lse             log sum_j exp z_j                   differentiable; float32, or float64 for float64 logits
        entropy         -sum_j p_j log p_j, in nats         likewise; 0 * log 0 = 0
        target_logprob  log p_y                             likewise; for class indices, without weights and smoothing
        prediction      argmax_j z_j, the first of equals   int64
        correct         prediction == target                bool; for class indices

    Args:
        stats: the names of those wanted; the others are neither computed nor written, and None in the result. For
            probabilities `target_logprob` and `correct` are not defined, and lse, entropy and prediction cost a second
            pass over the logits.
        the others: as for `fused_softmax_xent`; not `inplace`.

    Each has the shape of class indices, and is of the logits after `logit_scale` and `softcap`. A row that is ignored,
    or whose sample weight is 0, has 0, prediction -1 and False; one without a softmax (NaN, +inf, nothing but -inf),
    or on a GPU with a target out of range, has NaN, -1 and False. Where only the loss is differentiated, a training
    step reads and writes what it does without stats, but that the widest rows are read twice for entropy and prediction
    (docs/kernels.md). An incoming gradient of a stat has the logits read again in backward: where no gradient of the
    loss is wanted, reduction="none" spares its making in forward.

    Raises as `fused_softmax_xent`; ValueError for an unknown stat, RuntimeError for one that is not defined, and for
    `inplace`.
    """
    wanted = check_stats(stats, STATS, target, inplace)
    arguments = (
        input,
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
    )
    if is_dtensor(input):
        return _of_dtensor(arguments, wanted)
    return loss_and_stats(*loss_of(call_of(*arguments), wanted), target, wanted)


def _of_dtensor(arguments: Any, wanted: tuple[str, ...]) -> LossAndStats:
    from .parallel.dtensor import dtensor_loss

    found: LossAndStats = dtensor_loss(*arguments, wanted)
    return found


def loss_and_stats(loss: Tensor, found: Stats, target: Tensor, wanted: Collection[str]) -> LossAndStats:
    """The stats in the shape of class indices."""
    shape = target.shape
    if target.is_floating_point():
        shape = target.shape[1:] if target.dim() == 1 else target.shape[:1] + target.shape[2:]
    rows = Stats(*(None if x is None else x.reshape(shape) for x in found))
    correct = None
    if "correct" in wanted:
        assert rows.prediction is not None
        correct = (rows.prediction == target) & (rows.prediction >= 0)
    prediction = rows.prediction if "prediction" in wanted else None
    return LossAndStats(loss, rows.lse, rows.entropy, rows.target_logprob, prediction, correct)


class Call(NamedTuple):
    """A call as rows, checked."""

    inputs: Inputs
    options: Options
    shape: torch.Size  # of class indices
    loss_dtype: torch.dtype
    inplace: bool


def loss_alone(*arguments: Any) -> Tensor:
    """arguments: of call_of."""
    return loss_of(call_of(*arguments), ())[0]


def loss_of(call: Call, wanted: tuple[str, ...]) -> tuple[Tensor, Stats]:
    """The loss in PyTorch's shape, and the stats of rows."""
    loss, stats = _of_rows(call.inputs, call.options, call.loss_dtype, call.inplace, wanted)
    return loss.reshape(call.shape) if call.options.reduction == "none" else loss, stats


def call_of(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float | Tensor,
    sample_weight: Tensor | None,
    normalizer: float | Tensor | None,
    loss_dtype: torch.dtype | None,
    inplace: bool,
    shard: bool = False,
) -> Call:
    """shard: whether the classes are some of all, or none."""
    n_cols = check_tensors(input, target, weight, shard)
    check_options(target, ignore_index, reduction, loss_dtype)
    eps, zeta = check_label_smoothing(label_smoothing, input), check_z_loss(z_loss, input)
    cap, scale = check_softcap(softcap, input), check_logit_scale(logit_scale, input)
    divisor = check_normalizer(normalizer, reduction, input)
    if not isinstance(ignore_index, int):  # numpy's
        ignore_index = int(ignore_index)
    class_dim = 0 if input.dim() == 1 else 1
    shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    logits = _rows(input, class_dim, n_cols)
    inplace = inplace and torch.is_grad_enabled() and input.requires_grad
    if inplace:
        read = {"target": target, "sample_weight": sample_weight, "normalizer": normalizer}
        read |= {"label_smoothing": eps, "z_loss": zeta, "softcap": cap}
        check_inplace(input, logits, weight, logit_scale, **read)
    soft = target.is_floating_point()
    y = _rows(target, class_dim, n_cols) if soft else target if target.dim() == 1 else target.reshape(-1)
    if loss_dtype is None:
        autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)
        loss_dtype = torch.promote_types(input.dtype, torch.float32 if autocast else y.dtype if soft else input.dtype)
    if sample_weight is not None:
        sample_weight = check_sample_weight(sample_weight, input, target, shape).reshape(-1)
    inputs = Inputs(logits, y, weight, sample_weight, None, scale if isinstance(scale, Tensor) else None)
    options = Options(ignore_index, reduction, eps, zeta, cap, 1.0 if isinstance(scale, Tensor) else scale)
    if divisor is not None:
        inputs = inputs._replace(normalizer=as_vector(divisor, logits))
    return Call(inputs, options, shape, loss_dtype, inplace)


def _of_rows(
    inputs: Inputs, options: Options, loss_dtype: torch.dtype, inplace: bool, wanted: tuple[str, ...]
) -> tuple[Tensor, Stats]:
    kernel_stats = frozenset("prediction" if name == "correct" else name for name in wanted)
    soft = inputs.target.is_floating_point()
    grad = torch.is_grad_enabled()
    traced = is_traced(*inputs)
    by_reference = in_transform(*inputs)
    for tensor in (inputs.weight if soft else None, inputs.logit_scale if soft or traced else None):
        by_reference = by_reference or (grad and tensor is not None and tensor.requires_grad)
    if inputs.logits.shape[1] and by_reference:
        loss = reference.softmax_xent(inputs, options).to(loss_dtype)
        of_rows = reference.row_stats(inputs, options)._asdict() if wanted else {}
        return loss, Stats(**{name: of_rows[name] for name in kernel_stats})
    if grad and any(x is not None and x.requires_grad for x in (inputs.sample_weight, inputs.normalizer)):
        loss, stats = _of_rows(
            inputs._replace(sample_weight=None, normalizer=None),
            options._replace(reduction="none"),
            torch.promote_types(inputs.logits.dtype, torch.float32),
            inplace,
            wanted,
        )
        if inputs.sample_weight is not None:
            stats = stats.without(inputs.sample_weight == 0)
        return reduced(loss, inputs, options).to(loss_dtype), stats
    if traced:
        loss, stats = compiled.row_loss(inputs, options, kernel_stats if not soft else NOTHING)
        if soft and wanted:
            stats = compiled.row_loss(_without_target(inputs), _without_loss(options), kernel_stats)[1]
        return loss.to(loss_dtype), stats
    if not soft:
        return row_loss(inputs, options, loss_dtype, inplace, kernel_stats)
    loss, stats = row_loss(inputs, options, loss_dtype, inplace)
    if not wanted:
        return loss, stats
    if inputs.logits.shape[1] == 0:
        none = {name: -1 if name == "prediction" else float("nan") for name in kernel_stats}
        stats = empty_stats(kernel_stats, inputs.logits)
        return loss, Stats(**{name: getattr(stats, name).fill_(value) for name, value in none.items()})
    rows = _without_target(inputs), _without_loss(options)
    return loss, row_loss(*rows, torch.promote_types(loss.dtype, torch.float32), False, kernel_stats)[1]


def _without_target(inputs: Inputs) -> Inputs:
    """For the stats of rows with probabilities, whose loss is had otherwise: class 0 for all."""
    return inputs._replace(target=inputs.logits.new_zeros(len(inputs.logits), dtype=torch.int64), weight=None)


def _without_loss(options: Options) -> Options:
    return options._replace(ignore_index=-100, reduction="none", label_smoothing=0.0, z_loss=0.0)


def reduced(loss: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """Losses of rows, times their sample weights, reduced."""
    if inputs.sample_weight is not None:
        loss = loss * inputs.sample_weight.to(loss.dtype)
    if options.reduction == "none":
        return loss
    n: Tensor | int = 1
    if options.reduction == "mean":
        if inputs.normalizer is not None:
            n = inputs.normalizer[0]
        elif inputs.target.is_floating_point():
            n = len(inputs.target) if inputs.logits.shape[1] else 0  # as torch: nothing to average without classes
        else:
            n = sum_of_weights(inputs.target, inputs.weight, options.ignore_index, loss.dtype)
    return loss.sum() / n


def as_vector(value: float | Tensor, logits: Tensor) -> Tensor:
    """[1] in the dtype that the logits are computed in."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.to(acc).reshape(1)
    if torch.compiler.is_compiling():
        return torch.ones(1, dtype=acc, device=logits.device) * value  # new_full's number would be compiled in
    return logits.new_full((1,), value, dtype=acc)


def _rows(tensor: Tensor, class_dim: int, n_cols: int) -> Tensor:
    """[n_rows, n_cols]: the tensor itself, or its classes moved to the end, in a copy where no view will do."""
    if tensor.dim() == 2:
        return tensor
    moved = tensor.movedim(class_dim, -1)
    return moved.reshape(math.prod(moved.shape[:-1]), n_cols)

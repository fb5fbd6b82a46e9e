"""The loss of rows, reduced, and its gradients: which kernels run, in which order.

    the mean's divisor       mean.norm_kernel, if it has to be counted
    losses, and gradients    narrow_rows to launch.NARROW columns, wide_row beyond
    their sum or mean        mean.reduce_kernel
    in backward              mean.scale_kernel, which has nothing to do where the incoming gradient is 1

The gradients are written while the rows are on chip, in forward: a step reads the logits once and writes dlogits once.
Not so for reduction="none", where each row has a factor of its own, and for float16, which could flush a small gradient
to zero before a loss scale lifts it: they read the logits again in backward. A batch of few rows and few classes takes
one launch in forward.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from ..options import NO_STATS, Inputs, Options, Stats, empty_stats, is_given
from . import mean, narrow_rows, wide_row
from .formula import Batch, Cotangents, Extras, Outputs, Strides

SUMMING: dict[str, Any] = {"BLOCK": launch.SUM, "num_warps": launch.SUM_WARPS, **launch.OPTIONS}
NO_COTANGENTS = Cotangents(None, None, None, None)
NO_OUTPUTS = Outputs(None, *NO_STATS)

Gradients = tuple[Tensor | None, Tensor | None]  # of logits and target, those that are wanted


def forward(
    inputs: Inputs, options: Options, dtype: torch.dtype, needs_grad: bool, inplace: bool, wanted: frozenset[str]
) -> tuple[Tensor, Stats, list[Any]]:
    """The loss in `dtype`, the stats, and what `backward` wants: the gradients, and parts of the mean's divisor."""
    inputs = indexable(inputs)
    logits, target, reduction = inputs.logits, inputs.target, options.reduction
    acc = torch.promote_types(logits.dtype, torch.float32)
    needs_dtarget = target.requires_grad
    made: Gradients = (None, None)
    if needs_grad and _at_once(inputs, reduction, needs_dtarget):
        made = _empty_gradients(inputs, inplace, logits.requires_grad or not needs_dtarget, needs_dtarget)
    stats = empty_stats(wanted, logits) if wanted else NO_STATS
    with on_device_of(logits):
        if _is_small(logits, reduction):
            loss = logits.new_empty((), dtype=dtype)
            _small_batch(inputs, options, NO_COTANGENTS, Outputs(loss, *stats), made)
            return loss, stats, [*made, None]
        norm = _norm(inputs, options)
        loss = logits.new_empty(len(logits), dtype=acc if reduction != "none" else dtype)
        summed = launch_rows(inputs, options, norm, NO_COTANGENTS, Outputs(loss, *stats), made)
        if reduction != "none":
            loss = reduced(loss[:summed], norm, _norms(norm, inputs), dtype)
    return loss, stats, [*made, norm]


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    dstats: Stats,
    inputs: Inputs,
    options: Options,
    kept: list[Any],
    inplace: bool,
    needs_dlogits: bool,
    needs_dtarget: bool,
) -> Gradients:
    """The gradients that are wanted, each in the dtype of what it is of, made anew."""
    made, norm, kept[:2] = (kept[0], kept[1]), kept[2], (None, None)
    inputs = indexable(inputs)
    logits, reduction = inputs.logits, options.reduction
    at_once = all(x is None for x in dstats) and _at_once(inputs, reduction, needs_dtarget)  # the bits of forward
    cotangents = NO_COTANGENTS
    if not at_once:
        cotangents = Cotangents(dloss, *(None if x is None else x.contiguous() for x in dstats[:3]))
    with on_device_of(logits):
        if made[0] is None and made[1] is None:
            made = _empty_gradients(inputs, inplace, needs_dlogits, needs_dtarget)
        if _is_small(logits, reduction):
            _small_batch(inputs, options, cotangents, NO_OUTPUTS, made)
        else:
            if norm is None or reduction != "mean":  # of stats alone there is no mean
                norm = _norm(inputs, options)
            launch_rows(inputs, options, norm, cotangents, NO_OUTPUTS, made)
    made = made[0] if needs_dlogits else None, made[1] if needs_dtarget else None
    return scaled(dloss, [*made], inplace) if at_once else made


def scaled(dloss: Tensor, kept: list[Any], inplace: bool) -> Gradients:
    """The gradients that `forward` left, times the incoming one."""
    made, kept[:2] = (kept[0], kept[1]), (None, None)
    for gradient, over_logits in zip(made, (inplace, False), strict=True):
        if gradient is not None:
            with on_device_of(gradient):
                scale_by(gradient, dloss, over_logits)
    return made


def indexable(inputs: Inputs) -> Inputs:
    """With vectors that the kernels can index."""
    target = inputs.target if inputs.target.is_floating_point() else inputs.target.contiguous()
    weight, sample_weight = (None if x is None else x.contiguous() for x in (inputs.weight, inputs.sample_weight))
    return inputs._replace(target=target, weight=weight, sample_weight=sample_weight)


def _is_small(logits: Tensor, reduction: str) -> bool:
    rows, cols = launch.SMALL
    return logits.shape[0] <= rows and logits.shape[1] <= cols and reduction != "none"


def _at_once(inputs: Inputs, reduction: str, needs_dtarget: bool) -> bool:
    """Whether the gradients are made in forward: which dtarget waits for, dlogits does too."""
    halves = inputs.logits.dtype, inputs.target.dtype if needs_dtarget else None
    return reduction != "none" and torch.float16 not in halves


def layout(rows: Tensor) -> launch.Layout:
    return rows.shape[1], *rows.stride(), rows.itemsize, rows.data_ptr()  # type: ignore[return-value]


def _empty_gradients(inputs: Inputs, inplace: bool, needs_dlogits: bool, needs_dtarget: bool) -> Gradients:
    logits, target = inputs.logits, inputs.target
    dlogits = logits.detach() if inplace else gradient_like(logits, logits.dtype) if needs_dlogits else None
    return dlogits, gradient_like(logits, target.dtype) if needs_dtarget else None


def gradient_like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [n_rows, n_cols], contiguous if that will do: wide rows lie in their granules as those of the logits."""
    n_rows, n_cols = logits.shape
    granule, odd = launch.access(*layout(logits))
    lead = logits.data_ptr() % 16 // logits.itemsize if odd else 0
    stride = n_cols + (logits.stride(0) - n_cols) % granule
    if n_cols <= launch.NARROW or (lead == 0 and stride == n_cols):
        return logits.new_empty(n_rows, n_cols, dtype=dtype)
    return logits.new_empty(lead + n_rows * stride, dtype=dtype)[lead:].view(n_rows, stride)[:, :n_cols]


def _norm(inputs: Inputs, options: Options) -> Tensor | int | None:
    """What the mean divides by: a number, a given one [1], or the sum of the weights of the targets that count, in
    parts."""
    if options.reduction != "mean":
        return None
    if inputs.normalizer is not None:
        return inputs.normalizer
    n_rows, n_cols = inputs.logits.shape
    if inputs.target.is_floating_point():
        return n_rows
    acc = torch.promote_types(inputs.logits.dtype, torch.float32)
    norm = inputs.logits.new_empty(launch.summing(n_rows), dtype=acc)
    ignore_index = options.ignore_index
    mean.norm_kernel[(len(norm),)](inputs.target, inputs.weight, norm, n_rows, n_cols, ignore_index, **SUMMING)
    return norm


def _norms(norm: Tensor | int | None, inputs: Inputs) -> int:
    """The kernels' NORMS."""
    return len(norm) if isinstance(norm, Tensor) and norm is not inputs.normalizer else 0


def extras_of(inputs: Inputs, options: Options) -> Extras:
    """Numbers as they are, but for float64 logits as tensors, since a kernel's number is a float32."""
    values: list[Any] = [
        options.label_smoothing if is_given(options.label_smoothing) else None,
        options.z_loss if is_given(options.z_loss) else None,
        options.softcap,
        None if options.logit_scale == 1 else options.logit_scale,
    ]
    if inputs.logits.dtype == torch.float64:
        values = [inputs.logits.new_full((), x) if isinstance(x, float) else x for x in values]
    if inputs.logit_scale is not None:
        values[3] = inputs.logit_scale
    return Extras(*values, options.ignore_index)  # type: ignore[call-arg]


def batch_of(inputs: Inputs, gradients: Gradients) -> Batch:
    logits, target, weight, sample_weight, *_ = inputs
    target, probs = (None, target) if _is_soft(inputs) else (target, None)
    return Batch(logits, target, probs, weight, sample_weight, *gradients)


def strides_of(inputs: Inputs, gradients: Gradients, dloss: Tensor | None) -> Strides:
    return Strides(
        *inputs.logits.stride(),  # type: ignore[call-arg]
        *(inputs.target.stride() if _is_soft(inputs) else (0, 0)),
        *(0 if x is None else x.stride(0) for x in gradients),
        0 if dloss is None or dloss.dim() == 0 else dloss.stride(0),
    )


def launch_rows(
    inputs: Inputs,
    options: Options,
    norm: Tensor | int | None,
    cotangents: Cotangents,
    outputs: Outputs,
    gradients: Gradients,
) -> int:
    """Returns how many numbers were written of the loss: one a row, or, where it is reduced, of narrow rows one a
    program."""
    n_rows, n_cols = inputs.logits.shape
    batch, strides = batch_of(inputs, gradients), strides_of(inputs, gradients, cotangents.loss)
    extras, norms = extras_of(inputs, options), _norms(norm, inputs)
    plain = _is_plain(options, outputs.entropy, outputs.prediction, cotangents.entropy)
    if n_cols > launch.NARROW:
        step = any(x is not None for x in gradients)
        tile, how = wide_tile(inputs, gradients, n_cols, plain, step)
        wide_row.wide_row_kernel[(n_rows,)](
            batch, norm, cotangents, extras, outputs, n_cols, strides, NORMS=norms, tile=tile, **how
        )
        return n_rows
    narrow, how = _narrow_tile(inputs, gradients, plain)
    programs = launch.cdiv(n_rows, narrow.ROWS)
    summed = options.reduction != "none"
    narrow_rows.narrow_rows_kernel[(programs,)](
        batch, norm, cotangents, extras, outputs, n_rows, strides, NORMS=norms, SUMMED=summed, tile=narrow, **how
    )
    return programs if summed else n_rows


def wide_tile(
    inputs: Inputs, gradients: Gradients, n_classes: int, plain: bool, step: bool
) -> tuple[launch.Wide, dict[str, Any]]:
    """How wide rows, or a shard's of so many classes, are gone through, and Triton's options."""
    logits, target = inputs.logits, inputs.target
    n_cols, soft = logits.shape[1], _is_soft(inputs)
    if n_classes > launch.MOST:
        raise RuntimeError(f"{n_classes} classes: the kernels take {launch.MOST} at most")
    granule, odd = launch.access(*layout(logits))
    if not all(x is None or launch.lines_up(layout(x), layout(logits), granule) for x in gradients):
        granule, odd = 1, False
    given = granule
    if soft and not launch.lines_up(layout(target), layout(logits), granule):
        given = 1
    row_bytes = n_cols * (logits.itemsize + (target.itemsize if soft else 0))
    threads, unroll, held = launch.wide(row_bytes, logits.itemsize, odd, soft, plain, step)
    unroll *= 16 // logits.itemsize // granule
    held = min(held, launch.cdiv(n_cols, threads * unroll * granule))
    tile = launch.Wide(threads, unroll, held, granule, given, odd)
    return tile, {"num_warps": threads // warp_size(), **launch.OPTIONS}


def _narrow_tile(inputs: Inputs, gradients: Gradients, plain: bool) -> tuple[launch.Narrow, dict[str, Any]]:
    """The same of narrow rows."""
    logits = inputs.logits
    n_cols, width = logits.shape[1], launch.vector(*layout(logits))
    given = launch.vector(*layout(inputs.target)) if _is_soft(inputs) else 1
    out = min((launch.vector(*layout(x)) for x in gradients if x is not None), default=1)
    rows, span, warps = launch.narrow(n_cols, logits.itemsize, width, plain, warp_size())
    return launch.Narrow(n_cols, rows, span, width, given, out), {"num_warps": warps, **launch.OPTIONS}


def _is_plain(options: Options, *summed: Tensor | None) -> bool:
    """Whether a thread sums nothing but exponentials."""
    return not is_given(options.label_smoothing) and options.softcap is None and all(x is None for x in summed)


def _is_soft(inputs: Inputs) -> bool:
    """Whether there is a target of probabilities: of the loss there always is some target."""
    return inputs.target is not None and inputs.target.is_floating_point()


def _small_batch(
    inputs: Inputs, options: Options, cotangents: Cotangents, outputs: Outputs, gradients: Gradients
) -> None:
    mean_of = options.reduction == "mean"
    norm: Any = inputs.normalizer if mean_of else None
    if mean_of and norm is None and inputs.target.is_floating_point():
        norm = len(inputs.logits)
    plain = _is_plain(options, outputs.entropy, outputs.prediction, cotangents.entropy)
    tile, how = _narrow_tile(inputs, gradients, plain)
    narrow_rows.small_batch_kernel[(1,)](
        batch_of(inputs, gradients),
        norm,
        cotangents,
        extras_of(inputs, options),
        outputs,
        len(inputs.logits),
        strides_of(inputs, gradients, cotangents.loss),
        MEAN=mean_of,
        tile=tile,
        **how,
    )


def warp_size() -> int:
    """Threads of a warp on the current GPU."""
    return 32 if triton.knobs.runtime.interpret else _warp_size(triton.runtime.driver.active.get_current_device())


@cache  # for each: one machine may have two kinds
def _warp_size(gpu: int) -> int:
    size: int = triton.runtime.driver.active.get_current_target().warp_size
    return size


def reduced(loss: Tensor, norm: Tensor | int | None, norms: int, dtype: torch.dtype) -> Tensor:
    """The sum of the losses, divided by the norm. norms: the kernel's NORMS."""
    if (programs := launch.summing(len(loss))) > 1:
        parts = loss.new_empty(programs)
        mean.reduce_kernel[(programs,)](loss, None, parts, len(loss), NORMS=1, **SUMMING)
        loss = parts
    out = loss.new_empty((), dtype=dtype)
    mean.reduce_kernel[(1,)](loss, norm, out, len(loss), NORMS=norms, **SUMMING)
    return out


def scale_by(gradient: Tensor, dloss: Tensor, inplace: bool) -> None:
    """gradient *= dloss. What lies before and between the rows is scaled too, as one long row, unless it is somebody
    else's."""
    n_rows, n_cols = gradient.shape
    stride = gradient.stride(0)
    if not inplace or stride == n_cols:
        before = 0 if inplace else int(gradient.storage_offset())
        n_rows, n_cols, stride = 1, before + (n_rows - 1) * stride + n_cols, 0
        gradient = gradient.as_strided((n_cols,), (1,), gradient.storage_offset() - before)
    granule = 16 // gradient.itemsize
    programs = min(launch.SCALERS, n_rows * launch.cdiv(n_cols, launch.SCALE))
    mean.scale_kernel[(programs,)](
        gradient,
        dloss,
        n_rows,
        n_cols,
        stride,
        DOUBLE=gradient.dtype == torch.float64,
        BLOCK=launch.SCALE,
        ALIGNED=stride % granule == 0 and gradient.data_ptr() % 16 == 0,
        **launch.OPTIONS,
    )

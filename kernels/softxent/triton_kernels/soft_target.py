"""Cross-entropy of rows of logits against rows of probabilities, reduced, and its gradients.

For one row x of n_cols logits with target row t, class weights w, label smoothing eps, z-loss zeta, and a factor r (its
sample weight, over n for the mean, times the incoming gradient), with c_j = w_j * ((1 - eps) * t_j + eps / n_cols) and
a = sum_j c_j (reference.py):

    z     = softcap * tanh(logit_scale * x / softcap)     or what is left of that
    m     = max_j z_j
    d     = sum_j exp(z_j - m)
    lse   = m + log d
    loss  = a * log d + sum_j c_j * (m - z_j) + zeta * lse^2        a class with c_j = 0 left out, whatever its logit
    dloss/dz_j = r * ((a + 2 * zeta * lse) * exp(z_j - m) / d - c_j)
    dloss/dt_j = r * (1 - eps) * w_j * (log d + (m - z_j))

The target need not sum to 1, nor be positive. As for class indices (row_loss.py) the gradients are written while a row
is on chip, in forward, but for reduction="none" and float16: a step reads logits and target once, and writes each
gradient once. A thread holds a row of few classes, a program rows as wide as its registers hold (soft_rows.py); wider
rows are streamed, read for the sums and again for the gradients (soft_streams.py). Of sample weight 0 none is read.

Logits and dlogits are accessed in the same granules of 16 bytes (common.whole_granules), the target in as many values
at a time where its rows line up with those, and elsewhere value by value.
"""

from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from ..options import Inputs, Options, Stats
from . import soft_rows, soft_streams
from .common import Cotangents
from .row_loss import (
    NO_COTANGENTS,
    NO_STATS,
    device,
    gradient_like,
    in_forward,
    layout,
    numbers,
    reduced,
    scale_by,
    stream,
)

Gradients = tuple[Tensor | None, Tensor | None]  # of logits and target, those that are wanted


def forward(
    inputs: Inputs, options: Options, dtype: torch.dtype, needs_grad: bool, inplace: bool, wanted: frozenset[str]
) -> tuple[Tensor, Stats, list[Any]]:
    """The loss in `dtype`, no stats, and what `backward` wants: the gradients, and what was kept of streamed rows."""
    inputs = _with_vectors(inputs)
    logits, target, reduction = inputs.logits, inputs.target, options.reduction
    acc = torch.promote_types(logits.dtype, torch.float32)
    now = needs_grad and _at_once(inputs, reduction, target.requires_grad)
    made = _empty_gradients(inputs, inplace, logits.requires_grad, target.requires_grad) if now else (None, None)
    loss: Tensor = logits.new_empty(len(logits), dtype=acc if reduction != "none" else dtype)
    kept = None
    with on_device_of(logits):
        if not _streams(inputs, options):
            loss = _step(inputs, options, NO_COTANGENTS, loss, made, summed=reduction != "none")
        elif now:
            _stream_step(inputs, options, loss, made)
        else:
            kept = logits.new_empty(len(logits), soft_streams.KEPT.value, dtype=acc) if needs_grad else None
            _stream_forward(inputs, options, loss, kept)
        if reduction != "none":
            loss = reduced(loss, _norm(inputs, options), 0, dtype)
    return loss, NO_STATS, [*made, kept]


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    inputs: Inputs,
    options: Options,
    kept: list[Any],
    inplace: bool,
    needs_dlogits: bool,
    needs_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logits and target that are wanted, each in its dtype: those that `forward` left, if they are
    still there."""
    found, kept_rows, kept[:2] = (kept[0], kept[1]), kept[2], (None, None)
    inputs = _with_vectors(inputs)
    logits = inputs.logits
    acc = torch.promote_types(logits.dtype, torch.float32)
    at_once = _at_once(inputs, options.reduction, needs_dtarget)  # the same bits as in forward
    with on_device_of(logits):
        if found[0] is None and found[1] is None:
            found = _empty_gradients(inputs, inplace, needs_dlogits, needs_dtarget)
            cotangents = NO_COTANGENTS if at_once else NO_COTANGENTS._replace(loss=dloss)
            if not _streams(inputs, options):
                _step(inputs, options, cotangents, None, found, summed=False)
            elif at_once:
                _stream_step(inputs, options, None, found)
            else:
                if kept_rows is None:
                    kept_rows = logits.new_empty(len(logits), soft_streams.KEPT.value, dtype=acc)
                    _stream_forward(inputs, options, None, kept_rows)
                _stream_backward(inputs, options, cotangents, kept_rows, found)
        dlogits, dtarget = found[0] if needs_dlogits else None, found[1] if needs_dtarget else None
        if at_once and dlogits is not None:
            scale_by(dlogits, dloss, acc, inplace)
        if at_once and dtarget is not None:
            scale_by(dtarget, dloss, acc, False)
    return dlogits, dtarget


def _with_vectors(inputs: Inputs) -> Inputs:
    """With vectors that the kernels can index."""
    weight, sample_weight = (None if x is None else x.contiguous() for x in (inputs.weight, inputs.sample_weight))
    return inputs._replace(weight=weight, sample_weight=sample_weight)


def _at_once(inputs: Inputs, reduction: str, needs_dtarget: bool) -> bool:
    """Whether the gradients are made in forward: which dtarget waits for, dlogits does too."""
    return in_forward(inputs.logits, reduction) and not (needs_dtarget and inputs.target.dtype == torch.float16)


def _empty_gradients(inputs: Inputs, inplace: bool, needs_dlogits: bool, needs_dtarget: bool) -> Gradients:
    logits, target = inputs.logits, inputs.target
    dlogits = gradient_like(logits, inplace) if needs_dlogits else None
    return dlogits, gradient_like(logits, False, target.dtype) if needs_dtarget else None


def _norm(inputs: Inputs, options: Options) -> Tensor | int | None:
    """What the mean divides by."""
    if options.reduction != "mean":
        return None
    return len(inputs.logits) if inputs.normalizer is None else inputs.normalizer


def _tile(inputs: Inputs, options: Options) -> launch.Whole | None:
    """The tile for rows that are held; None: they are streamed."""
    weighed = inputs.weight is not None or options.label_smoothing != 0
    holds = launch.Holds(smoothing=weighed, softcap=options.softcap is not None)
    lines_up = _access(inputs)["GIVEN"] > 1
    return launch.soft_target(*layout(inputs.logits), inputs.target.itemsize, lines_up, holds, device())


def _sums(inputs: Inputs, options: Options) -> dict[str, Any]:
    """How streamed rows are summed: c too, whatever it is made of."""
    return stream(inputs.logits.itemsize, launch.Holds(smoothing=True, softcap=options.softcap is not None))


def _access(inputs: Inputs) -> dict[str, Any]:
    granule, odd = launch.access(*layout(inputs.logits))
    lines_up = launch.lines_up(layout(inputs.target), layout(inputs.logits), granule)
    return {"GRANULE": granule, "ODD": odd, "GIVEN": granule if lines_up else 1}


def _streams(inputs: Inputs, options: Options) -> bool:
    return inputs.logits.shape[1] > launch.FEW and _tile(inputs, options) is None


def _strides(inputs: Inputs, gradients: Gradients) -> tuple[int, ...]:
    out = (0 if gradient is None else gradient.stride(0) for gradient in gradients)
    return *inputs.logits.stride(), *inputs.target.stride(), *out


def _step(
    inputs: Inputs, options: Options, cotangents: Cotangents, loss: Tensor | None, gradients: Gradients, summed: bool
) -> Any:
    """Rows that a thread or a program holds. Returns what was written of the loss: its rows, or with `summed` sums."""
    logits, target = inputs.logits, inputs.target
    n_rows, n_cols = logits.shape
    dloss = cotangents.loss
    stride_dloss = dloss.stride(0) if dloss is not None and dloss.dim() else 0
    tensors = *inputs[:4], _norm(inputs, options), cotangents, loss, *gradients, numbers(inputs, options)
    strides = *_strides(inputs, gradients), stride_dloss
    common: dict[str, Any] = {"SUMMED": summed, **launch.OPTIONS}
    if n_cols <= launch.FEW:
        programs = launch.cdiv(n_rows, launch.ROWS)
        soft_rows.few_step_kernel[(programs,)](
            *tensors,
            n_rows,
            *strides,
            N_COLS=n_cols,
            ROWS=launch.ROWS,
            WIDTH=launch.vector(*layout(logits)),
            GIVEN=launch.vector(*layout(target)),
            num_warps=launch.ROWS // device().warp_size,
            **common,
        )
    else:
        tile = _tile(inputs, options)
        assert tile is not None
        programs = launch.cdiv(n_rows, tile.block_m)
        soft_rows.step_kernel[(programs,)](
            *tensors,
            n_rows,
            n_cols,
            *strides,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **_access(inputs),
            **common,
        )
    return loss[:programs] if loss is not None and summed else loss


def _stream_forward(inputs: Inputs, options: Options, loss: Tensor | None, kept: Tensor | None) -> None:
    logits = inputs.logits
    soft_streams.forward_kernel[(len(logits),)](
        *inputs[:4],
        loss,
        kept,
        numbers(inputs, options),
        *logits.shape,
        *logits.stride(),
        *inputs.target.stride(),
        **_access(inputs),
        **_sums(inputs, options),
    )


def _stream_step(inputs: Inputs, options: Options, loss: Tensor | None, gradients: Gradients) -> None:
    logits = inputs.logits
    soft_streams.step_kernel[(len(logits),)](
        *inputs[:4],
        _norm(inputs, options),
        NO_COTANGENTS,
        loss,
        *gradients,
        numbers(inputs, options),
        *logits.shape,
        *_strides(inputs, gradients),
        **_access(inputs),
        **_sums(inputs, options),
    )


def _stream_backward(
    inputs: Inputs, options: Options, cotangents: Cotangents, kept: Tensor, gradients: Gradients
) -> None:
    logits = inputs.logits
    num_warps, block = launch.STREAM[logits.itemsize]
    soft_streams.backward_kernel[(len(logits), launch.cdiv(logits.shape[1], block // 2))](
        *inputs[:4],
        _norm(inputs, options),
        cotangents,
        kept,
        *gradients,
        numbers(inputs, options),
        *logits.shape,
        *_strides(inputs, gradients),
        cotangents.loss.stride(0) if cotangents.loss.dim() else 0,
        BLOCK=block // 2,
        num_warps=num_warps,
        **_access(inputs),
        **launch.OPTIONS,
    )

"""The loss of rows against class indices, reduced, and its gradient: which kernels run, in which order.

    the mean's divisor      mean.norm_kernel, if it is needed
    losses, and gradient    few_classes, whole_row, packed_row or streaming, by the width of the rows (launch.py)
    their sum or mean       mean.reduce_kernel
    in backward             mean.scale_kernel, which has nothing to do where the incoming gradient is 1

The gradient is written while the rows are on chip, in forward: a step reads the logits once and writes dlogits once.
Not so for reduction="none", where each row has a factor of its own, and for float16, which could flush a small gradient
to zero before a loss scale lifts it: they read the logits again in backward. A batch of few rows and few classes takes
one launch in forward.
"""

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from ..options import Inputs, Options, Stats, empty_stats
from . import few_classes, mean, packed_row, streaming, whole_row
from .common import Cotangents, Extras, Outputs

NO_COTANGENTS = Cotangents(None, None, None, None)
NO_STATS = Stats()


def forward(
    inputs: Inputs, options: Options, dtype: torch.dtype, needs_grad: bool, inplace: bool, wanted: frozenset[str]
) -> tuple[Tensor, Stats, list[Any]]:
    """The loss in `dtype`, the stats, and what `backward` wants: the gradient, parts of the mean's divisor, what was
    kept of streamed rows, and what the launch was chosen by."""
    inputs = _contiguous(inputs)
    logits, reduction = inputs.logits, options.reduction
    acc = torch.promote_types(logits.dtype, torch.float32)
    now = needs_grad and in_forward(logits, reduction)
    dlogits = gradient_like(logits, inplace) if now else None
    stats = empty_stats(wanted, logits) if wanted else NO_STATS
    with on_device_of(logits):
        extras = numbers(inputs, options)
        if _is_tiny(logits, reduction):
            loss = logits.new_empty((), dtype=dtype)
            _one_launch(inputs, options, extras, NO_COTANGENTS, Outputs(loss, *stats), dlogits)
            return loss, stats, [dlogits, None, None, None]
        holds = _holds(inputs, options, wanted)
        norm = _norm(inputs, options)
        loss = logits.new_empty(len(logits), dtype=acc if reduction != "none" else dtype)
        outputs = Outputs(loss, *stats)
        kept = None
        if _streams(inputs, holds):
            if now:
                _stream_step(inputs, options, holds, extras, norm, outputs, dlogits)
            else:
                kept = logits.new_empty(len(logits), streaming.STATS.value, dtype=acc) if needs_grad else None
                _stream_forward(inputs, options, holds, extras, outputs, kept, "entropy" in wanted)
        else:
            summed = reduction != "none"
            loss = _step(inputs, options, holds, extras, norm, NO_COTANGENTS, outputs, dlogits, summed)
        if reduction != "none":
            loss = reduced(loss, norm, _norms(norm, inputs), dtype)
    return loss, stats, [dlogits, norm, kept, holds]


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    dstats: Stats,
    inputs: Inputs,
    options: Options,
    kept: list[Any],
    inplace: bool,
) -> Tensor:
    """The gradient of the logits, in their dtype: that which `forward` left, if it is still there."""
    dlogits: Tensor | None
    (dlogits, norm, kept_rows, holds), kept[0] = kept, None
    inputs = _contiguous(inputs)
    logits, reduction = inputs.logits, options.reduction
    n_rows, acc = len(logits), torch.promote_types(logits.dtype, torch.float32)
    at_once = all(x is None for x in dstats) and in_forward(logits, reduction)  # the same bits as in forward
    with on_device_of(logits):
        if dlogits is None or not at_once:
            if dlogits is None:
                dlogits = gradient_like(logits, inplace)
            extras = numbers(inputs, options)
            cotangents = NO_COTANGENTS
            if not at_once:
                rows = (None if x is None else x.contiguous() for x in dstats[:3])
                cotangents = Cotangents(dloss, *rows)
            outputs = Outputs(None, *NO_STATS)
            if _is_tiny(logits, reduction):
                _one_launch(inputs, options, extras, cotangents, outputs, dlogits)
                if at_once:
                    scale_by(dlogits, dloss, acc, inplace)
                return dlogits
            if norm is None:
                norm = _norm(inputs, options)
            if holds is None:
                holds = _holds(inputs, options, ())
            if dstats.entropy is not None:
                holds = holds._replace(stats=False, entropy_gradient=True)  # they are not wanted again
            if at_once and _streams(inputs, holds):
                _stream_step(inputs, options, holds, extras, norm, outputs, dlogits)
            elif _streams(inputs, holds):
                if kept_rows is None:
                    kept_rows = logits.new_empty(n_rows, streaming.STATS.value, dtype=acc)
                    moment = dstats.entropy is not None
                    _stream_forward(inputs, options, holds, extras, outputs, kept_rows, moment)
                _stream_backward(inputs, options, extras, norm, cotangents, kept_rows, dlogits)
            else:
                _step(inputs, options, holds, extras, norm, cotangents, outputs, dlogits, False)
        if at_once:
            scale_by(dlogits, dloss, acc, inplace)
    return dlogits


def numbers(inputs: Inputs, options: Options) -> Extras:
    """Numbers as they are, but for float64 logits as tensors, since a kernel's number is a float32."""
    values: list[Any] = [
        options.label_smoothing or None,
        options.z_loss or None,
        options.softcap,
        None if options.logit_scale == 1 else options.logit_scale,
    ]
    if inputs.logits.dtype == torch.float64:
        values = [None if x is None else inputs.logits.new_full((), x) for x in values]
    if inputs.logit_scale is not None:
        values[3] = inputs.logit_scale
    return Extras(*values)


def _contiguous(inputs: Inputs) -> Inputs:
    """With vectors that the kernels can index."""
    if inputs.target.is_contiguous() and inputs.weight is None and inputs.sample_weight is None:
        return inputs
    weight, sample_weight = (None if x is None else x.contiguous() for x in (inputs.weight, inputs.sample_weight))
    return inputs._replace(target=inputs.target.contiguous(), weight=weight, sample_weight=sample_weight)


def _is_tiny(logits: Tensor, reduction: str) -> bool:
    return logits.shape[1] <= launch.FEW and logits.shape[0] <= launch.ONE_LAUNCH and reduction != "none"


def in_forward(logits: Tensor, reduction: str) -> bool:
    return reduction != "none" and logits.dtype != torch.float16


def layout(logits: Tensor) -> tuple[int, int, int, int, int]:
    return logits.shape[1], *logits.stride(), logits.itemsize, logits.data_ptr()  # type: ignore[return-value]


def _holds(inputs: Inputs, options: Options, wanted: Collection[str]) -> launch.Holds:
    smoothing = options.label_smoothing != 0
    return launch.Holds(
        smoothing=smoothing,
        weights=smoothing and inputs.weight is not None,
        softcap=options.softcap is not None,
        stats="entropy" in wanted or "prediction" in wanted,
    )


def _tile(inputs: Inputs, holds: launch.Holds) -> launch.Whole | None:
    return launch.whole(*layout(inputs.logits), holds, device())


@cache
def device() -> launch.Device:
    """The kind of GPU that Triton compiles for; the interpreter is treated as a Hopper."""
    if triton.knobs.runtime.interpret:
        return launch.Device(32, 90)
    target = triton.runtime.driver.active.get_current_target()
    return launch.Device(target.warp_size, target.arch if target.backend == "cuda" else 0)


def _streams(inputs: Inputs, holds: launch.Holds) -> bool:
    return inputs.logits.shape[1] > launch.FEW and _tile(inputs, holds) is None


def gradient_like(logits: Tensor, inplace: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An empty [n_rows, n_cols], contiguous if that will do: its rows lie in their granules as those of the logits.
    dtype: default that of the logits."""
    if inplace:
        return logits.detach()
    n_rows, n_cols = logits.shape
    if n_cols <= launch.FEW:
        return logits.new_empty(n_rows, n_cols, dtype=dtype)
    granule, odd = launch.access(*layout(logits))
    lead = logits.data_ptr() % 16 // logits.itemsize if odd else 0
    stride = n_cols + (logits.stride(0) - n_cols) % granule
    if lead == 0 and stride == n_cols:
        return logits.new_empty(n_rows, n_cols, dtype=dtype)
    return logits.new_empty(lead + n_rows * stride, dtype=dtype)[lead:].view(n_rows, stride)[:, :n_cols]


def _norms(norm: Tensor | None, inputs: Inputs) -> int:
    """The kernels' NORMS."""
    return 1 if norm is None else 0 if inputs.normalizer is not None else len(norm)


def _step(
    inputs: Inputs,
    options: Options,
    holds: launch.Holds,
    extras: Extras,
    norm: Tensor | None,
    cotangents: Cotangents,
    outputs: Outputs,
    dlogits: Tensor | None,
    summed: bool,
) -> Any:
    """Rows that a thread or a program holds. Returns what was written of the loss: its rows, or with `summed` sums."""
    logits = inputs.logits
    n_rows, n_cols = logits.shape
    dloss = cotangents.loss
    stride_dloss = dloss.stride(0) if dloss is not None and dloss.dim() else 0
    stride_out = 0 if dlogits is None else dlogits.stride(0)
    tensors = *inputs[:4], norm, cotangents, outputs, dlogits, extras
    common: dict[str, Any] = {"NORMS": _norms(norm, inputs), **launch.OPTIONS}
    if n_cols <= launch.FEW:
        programs = launch.cdiv(n_rows, launch.ROWS)
        few_classes.step_kernel[(programs,)](
            *tensors,
            n_rows,
            *logits.stride(),
            stride_out,
            stride_dloss,
            options.ignore_index,
            SUMMED=summed,
            N_COLS=n_cols,
            ROWS=launch.ROWS,
            WIDTH=launch.vector(*layout(logits)),
            num_warps=launch.ROWS // device().warp_size,
            **common,
        )
        return outputs.loss if not summed else outputs.loss[:programs]
    tile = _tile(inputs, holds)
    assert tile is not None
    programs = launch.cdiv(n_rows, tile.block_m)
    common |= {"GRANULE": tile.access.granule, "ODD": tile.access.odd, "num_warps": tile.num_warps}
    if tile.packed:
        threads = device().warp_size * tile.num_warps
        chunks = tile.block_n // (threads * tile.access.granule)
        packed_row.step_kernel[(programs,)](
            *tensors,
            n_rows,
            n_cols,
            logits.stride(0),
            stride_out,
            stride_dloss,
            options.ignore_index,
            CHUNKS=chunks,
            MATES=launch.power_of_two_from(chunks * tile.access.granule),
            THREADS=threads,
            OPAQUE=not triton.knobs.runtime.interpret,
            **common,
        )
    else:
        whole_row.step_kernel[(programs,)](
            *tensors,
            n_rows,
            n_cols,
            *logits.stride(),
            stride_out,
            stride_dloss,
            options.ignore_index,
            SUMMED=summed,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            CLUSTER=tile.num_ctas > 1,
            num_ctas=tile.num_ctas,
            **common,
        )
    return outputs.loss if not summed else outputs.loss[:programs]


def _one_launch(
    inputs: Inputs,
    options: Options,
    extras: Extras,
    cotangents: Cotangents,
    outputs: Outputs,
    dlogits: Tensor | None,
) -> None:
    logits = inputs.logits
    few_classes.one_launch_kernel[(1,)](
        *inputs[:5],
        cotangents,
        outputs,
        dlogits,
        extras,
        len(logits),
        *logits.stride(),
        0 if dlogits is None else dlogits.stride(0),
        options.ignore_index,
        MEAN=options.reduction == "mean",
        N_COLS=logits.shape[1],
        ROWS=launch.ROWS,
        WIDTH=launch.vector(*layout(logits)),
        num_warps=launch.ROWS // device().warp_size,
        **launch.OPTIONS,
    )


def stream(itemsize: int, holds: launch.Holds) -> dict[str, Any]:
    """How the kernels that stream rows sum them."""
    num_warps, _ = launch.STREAM[itemsize]
    return {
        "THREADS": device().warp_size * num_warps,
        "VECTOR": 16 // itemsize,
        "UNROLL": launch.unroll(itemsize, holds, device()),
        "num_warps": num_warps,
        **launch.OPTIONS,
    }


def _stream_forward(
    inputs: Inputs,
    options: Options,
    holds: launch.Holds,
    extras: Extras,
    outputs: Outputs,
    kept: Tensor | None,
    moment: bool,
) -> None:
    logits = inputs.logits
    granule, odd = launch.access(*layout(logits))
    streaming.forward_kernel[(len(logits),)](
        *inputs[:4],
        outputs,
        kept,
        extras,
        *logits.shape,
        *logits.stride(),
        options.ignore_index,
        MOMENT=moment,
        GRANULE=1 if odd else granule,
        **stream(logits.itemsize, holds),
    )


def _stream_step(
    inputs: Inputs,
    options: Options,
    holds: launch.Holds,
    extras: Extras,
    norm: Tensor | None,
    outputs: Outputs,
    dlogits: Tensor | None,
) -> None:
    assert dlogits is not None
    logits = inputs.logits
    granule, odd = launch.access(*layout(logits))
    streaming.step_kernel[(len(logits),)](
        *inputs[:4],
        norm,
        NO_COTANGENTS,
        outputs,
        dlogits,
        extras,
        *logits.shape,
        *logits.stride(),
        dlogits.stride(0),
        options.ignore_index,
        NORMS=_norms(norm, inputs),
        GRANULE=granule,
        ODD=odd,
        **stream(logits.itemsize, holds),
    )


def _stream_backward(
    inputs: Inputs,
    options: Options,
    extras: Extras,
    norm: Tensor | None,
    cotangents: Cotangents,
    kept: Tensor,
    dlogits: Tensor,
) -> None:
    logits = inputs.logits
    num_warps, block = launch.STREAM[logits.itemsize]
    granule, odd = launch.access(*layout(logits))
    streaming.backward_kernel[(len(logits), launch.cdiv(logits.shape[1], block))](
        *inputs[:4],
        norm,
        cotangents,
        kept,
        dlogits,
        extras,
        *logits.shape,
        *logits.stride(),
        dlogits.stride(0),
        cotangents.loss.stride(0) if cotangents.loss.dim() else 0,
        options.ignore_index,
        NORMS=_norms(norm, inputs),
        BLOCK=block,
        GRANULE=granule,
        ODD=odd,
        num_warps=num_warps,
        **launch.OPTIONS,
    )


def _norm(inputs: Inputs, options: Options) -> Tensor | None:
    """What the mean divides by: a given number [1], or the sum of the weights of the targets that count, in parts."""
    if options.reduction != "mean":
        return None
    if inputs.normalizer is not None:
        return inputs.normalizer
    n_rows, n_cols = inputs.logits.shape
    acc = torch.promote_types(inputs.logits.dtype, torch.float32)
    norm = inputs.logits.new_empty(launch.norms(n_rows), dtype=acc)
    mean.norm_kernel[(len(norm),)](
        inputs.target, inputs.weight, norm, n_rows, n_cols, options.ignore_index, BLOCK=launch.NORM, **launch.OPTIONS
    )
    return norm


def reduced(loss: Tensor, norm: Tensor | int | None, norms: int, dtype: torch.dtype) -> Tensor:
    """The sum of the losses, divided by the norm. norms: the kernel's NORMS."""
    out = loss.new_empty((), dtype=dtype)
    mean.reduce_kernel[(1,)](loss, norm, out, len(loss), NORMS=norms, BLOCK=launch.NORM, **launch.OPTIONS)
    return out


def scale_by(dlogits: Tensor, dloss: Tensor, acc: torch.dtype, inplace: bool) -> None:
    """dlogits *= dloss. What lies between the rows is scaled too, as one long row, unless it is somebody else's."""
    n_rows, n_cols = dlogits.shape
    stride = dlogits.stride(0)
    if not inplace or stride == n_cols:
        n_rows, n_cols, stride = 1, (n_rows - 1) * stride + n_cols, 0
    granule, odd = launch.access(n_cols, stride, 1, dlogits.itemsize, dlogits.data_ptr())
    programs = min(launch.SCALERS, n_rows * launch.cdiv(n_cols, launch.SCALE))
    mean.scale_kernel[(programs,)](
        dlogits,
        dloss,
        n_rows,
        n_cols,
        stride,
        DOUBLE=acc == torch.float64,
        BLOCK=launch.SCALE,
        GRANULE=granule,
        ODD=odd,
        **launch.OPTIONS,
    )

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

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from . import few_classes, mean, packed_row, streaming, whole_row


def forward(
    logits: Tensor,  # [n_rows, n_cols] any strides
    target: Tensor,  # [n_rows] int
    weight: Tensor | None,  # [n_cols]
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dtype: torch.dtype,
    needs_grad: bool,
    inplace: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss in `dtype`, and what `backward` wants: the gradient, parts of the mean's divisor, the rows' stats."""
    n_rows, n_cols = logits.shape
    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    acc = torch.promote_types(logits.dtype, torch.float32)
    now = needs_grad and _in_forward(logits, reduction)
    dlogits = _gradient_like(logits, inplace) if now else None
    options = ignore_index, label_smoothing
    with on_device_of(logits):
        if _is_tiny(logits, reduction):
            loss = logits.new_empty((), dtype=dtype)
            _one_launch(logits, target, weight, None, *options, reduction, loss, dlogits)
            return loss, [dlogits, None, None]
        norm = _norm(target, weight, ignore_index, n_rows, n_cols, acc) if reduction == "mean" else None
        loss = logits.new_empty(n_rows, dtype=acc if reduction != "none" else dtype)
        stats = None
        if _streams(logits, label_smoothing):
            stats = logits.new_empty(n_rows, 4, dtype=acc) if needs_grad and not now else None
            _stream(logits, target, weight, norm, *options, loss, dlogits, stats)
        else:
            loss = _step(logits, target, weight, norm, None, *options, loss, dlogits, reduction != "none")
        if reduction != "none":
            loss = _reduce(loss, norm, dtype)
    return loss, [dlogits, norm, stats]


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    kept: list[Tensor | None],
    inplace: bool,
) -> Tensor:
    """The gradient of the logits, in their dtype: that which `forward` left, if it is still there."""
    (dlogits, norm, stats), kept[0] = kept, None
    n_rows, n_cols = logits.shape
    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    acc = torch.promote_types(logits.dtype, torch.float32)
    options = ignore_index, label_smoothing
    with on_device_of(logits):
        if dlogits is None:
            factor = None if _in_forward(logits, reduction) else dloss
            dlogits = _gradient_like(logits, inplace)
            if reduction == "mean" and norm is None and not _is_tiny(logits, reduction):
                norm = _norm(target, weight, ignore_index, n_rows, n_cols, acc)
            if _is_tiny(logits, reduction):
                _one_launch(logits, target, weight, factor, *options, reduction, None, dlogits)
            elif factor is not None and _streams(logits, label_smoothing):
                if stats is None:
                    stats = logits.new_empty(n_rows, 4, dtype=acc)
                    _stream(logits, target, weight, None, *options, logits.new_empty(n_rows, dtype=acc), None, stats)
                _stream_backward(factor, logits, target, weight, norm, *options, stats, dlogits)
            elif _streams(logits, label_smoothing):
                _stream(logits, target, weight, norm, *options, None, dlogits, None)
            else:
                _step(logits, target, weight, norm, factor, *options, None, dlogits, False)
        if _in_forward(logits, reduction):
            _scale(dlogits, dloss, acc, inplace)
    return dlogits


def _is_tiny(logits: Tensor, reduction: str) -> bool:
    return logits.shape[1] <= launch.FEW and logits.shape[0] <= launch.ONE_LAUNCH and reduction != "none"


def _in_forward(logits: Tensor, reduction: str) -> bool:
    return reduction != "none" and logits.dtype != torch.float16


def _layout(logits: Tensor) -> tuple[int, int, int, int, int]:
    return logits.shape[1], *logits.stride(), logits.itemsize, logits.data_ptr()  # type: ignore[return-value]


def _tile(logits: Tensor, label_smoothing: float) -> launch.Whole | None:
    return launch.whole(*_layout(logits), label_smoothing != 0, _device())


@cache
def _device() -> launch.Device:
    """The kind of GPU that Triton compiles for; the interpreter is treated as a Hopper."""
    if triton.knobs.runtime.interpret:
        return launch.Device(32, 90)
    target = triton.runtime.driver.active.get_current_target()
    return launch.Device(target.warp_size, target.arch if target.backend == "cuda" else 0)


def _streams(logits: Tensor, label_smoothing: float) -> bool:
    return logits.shape[1] > launch.FEW and _tile(logits, label_smoothing) is None


def _gradient_like(logits: Tensor, inplace: bool) -> Tensor:
    """An empty [n_rows, n_cols], contiguous if that will do: its rows lie in their granules as those of the logits."""
    if inplace:
        return logits.detach()
    n_rows, n_cols = logits.shape
    granule, odd = launch.access(*_layout(logits))
    lead = logits.data_ptr() % 16 // logits.itemsize if odd else 0
    stride = n_cols + (logits.stride(0) - n_cols) % granule
    if n_cols <= launch.FEW or (lead == 0 and stride == n_cols):
        return logits.new_empty(n_rows, n_cols)
    return logits.new_empty(lead + n_rows * stride)[lead:].view(n_rows, stride)[:, :n_cols]


def _step(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    norm: Tensor | None,
    dloss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    loss: Tensor | None,
    dlogits: Tensor | None,
    summed: bool,
) -> Any:
    """Rows that a thread or a program holds. Returns what was written of `loss`: its rows, or with `summed` sums."""
    n_rows, n_cols = logits.shape
    stride_dloss = dloss.stride(0) if dloss is not None and dloss.dim() else 0
    stride_out = 0 if dlogits is None else dlogits.stride(0)
    common: dict[str, Any] = {
        "NORMS": 1 if norm is None else len(norm),
        **launch.OPTIONS,
    }
    tensors = logits, target, weight, norm, dloss, loss, dlogits
    if n_cols <= launch.FEW:
        programs = launch.cdiv(n_rows, launch.ROWS)
        few_classes.step_kernel[(programs,)](
            *tensors,
            n_rows,
            *logits.stride(),
            stride_out,
            stride_dloss,
            ignore_index,
            label_smoothing,
            SMOOTHED=label_smoothing != 0,
            SUMMED=summed,
            N_COLS=n_cols,
            ROWS=launch.ROWS,
            WIDTH=launch.vector(*_layout(logits)),
            num_warps=launch.ROWS // _device().warp_size,
            **common,
        )
    else:
        tile = _tile(logits, label_smoothing)
        assert tile is not None
        programs = launch.cdiv(n_rows, tile.block_m)
        granule, odd = tile.access
        if tile.packed:
            packed_row.step_kernel[(programs,)](
                *tensors,
                n_rows,
                n_cols,
                logits.stride(0),
                stride_out,
                stride_dloss,
                ignore_index,
                BLOCK_N=tile.block_n,
                THREADS=32 * tile.num_warps,
                GRANULE=granule,
                ODD=odd,
                OPAQUE=not triton.knobs.runtime.interpret,
                num_warps=tile.num_warps,
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
                ignore_index,
                label_smoothing,
                SMOOTHED=label_smoothing != 0,
                SUMMED=summed,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                GRANULE=granule,
                ODD=odd,
                CLUSTER=tile.num_ctas > 1,
                num_warps=tile.num_warps,
                num_ctas=tile.num_ctas,
                **common,
            )
    return loss if loss is None or not summed else loss[:programs]


def _one_launch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dloss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    loss: Tensor | None,
    dlogits: Tensor | None,
) -> None:
    few_classes.one_launch_kernel[(1,)](
        logits,
        target,
        weight,
        dloss,
        loss,
        dlogits,
        len(logits),
        *logits.stride(),
        0 if dlogits is None else dlogits.stride(0),
        ignore_index,
        label_smoothing,
        SMOOTHED=label_smoothing != 0,
        MEAN=reduction == "mean",
        N_COLS=logits.shape[1],
        ROWS=launch.ROWS,
        WIDTH=launch.vector(*_layout(logits)),
        num_warps=launch.ROWS // _device().warp_size,
        **launch.OPTIONS,
    )


def _stream(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    norm: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    loss: Tensor | None,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    n_rows, n_cols = logits.shape
    num_warps, _ = launch.STREAM[logits.itemsize]
    common: dict[str, Any] = {
        "SMOOTHED": label_smoothing != 0,
        "THREADS": _device().warp_size * num_warps,
        "VECTOR": 16 // logits.itemsize,
        "num_warps": num_warps,
        **launch.OPTIONS,
    }
    granule, odd = launch.access(*_layout(logits))
    options = ignore_index, label_smoothing
    if dlogits is None:
        streaming.forward_kernel[(n_rows,)](
            logits,
            target,
            weight,
            loss,
            stats,
            n_rows,
            n_cols,
            *logits.stride(),
            *options,
            **common,
            GRANULE=1 if odd else granule,
        )
        return
    streaming.step_kernel[(n_rows,)](
        logits,
        target,
        weight,
        norm,
        loss,
        dlogits,
        n_rows,
        n_cols,
        *logits.stride(),
        dlogits.stride(0),
        *options,
        NORMS=1 if norm is None else len(norm),
        GRANULE=granule,
        ODD=odd,
        **common,
    )


def _stream_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    norm: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    stats: Tensor,
    dlogits: Tensor,
) -> None:
    n_rows, n_cols = logits.shape
    num_warps, block = launch.STREAM[logits.itemsize]
    granule, odd = launch.access(*_layout(logits))
    streaming.backward_kernel[(n_rows, launch.cdiv(n_cols, block))](
        dloss,
        logits,
        target,
        weight,
        norm,
        stats,
        dlogits,
        n_rows,
        n_cols,
        dloss.stride(0) if dloss.dim() else 0,
        *logits.stride(),
        dlogits.stride(0),
        ignore_index,
        label_smoothing,
        NORMS=1 if norm is None else len(norm),
        SMOOTHED=label_smoothing != 0,
        BLOCK=block,
        GRANULE=granule,
        ODD=odd,
        num_warps=num_warps,
        **launch.OPTIONS,
    )


def _norm(
    target: Tensor, weight: Tensor | None, ignore_index: int, n_rows: int, n_cols: int, acc: torch.dtype
) -> Tensor:
    """What the mean divides by, in parts: the sum of the weights of the targets that count."""
    norm = target.new_empty(launch.norms(n_rows), dtype=acc)
    mean.norm_kernel[(len(norm),)](target, weight, norm, n_rows, n_cols, ignore_index, BLOCK=launch.NORM)
    return norm


def _reduce(loss: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the losses, divided by the sum of the norm's parts."""
    out = loss.new_empty((), dtype=dtype)
    norms = 1 if norm is None else len(norm)
    mean.reduce_kernel[(1,)](loss, norm, out, len(loss), NORMS=norms, BLOCK=launch.NORM)
    return out


def _scale(dlogits: Tensor, dloss: Tensor, acc: torch.dtype, inplace: bool) -> None:
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
    )

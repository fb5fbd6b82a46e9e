"""Rows of a shard of the classes: what cpu/shards.py does, in a kernel each. shard_row.py has the kernels."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from ..options import Inputs, Options, Stats, empty_stats
from ..parallel.shards import Row, Shard, index_dtype
from . import shard_row
from .common import Cotangents, Outputs, Strides
from .rows import _indexable, _numbers, gradient_like, layout, warp_size
from .shard_row import Sums

BLOCK = 128  # rows whose sums are combined by one program

__all__ = ["combine", "gradient", "gradient_like", "sums"]


def sums(inputs: Inputs, options: Options, shard: Shard, fields: tuple[str, ...]) -> Tensor:
    """[fields, n_rows] in the dtype of the computation. A target that no shard can hold is told by rest = -1."""
    inputs = _indexable(inputs)
    logits = inputs.logits
    found = logits.new_empty(len(fields), len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    if len(logits):
        arguments = *inputs[:4], _numbers(inputs, options), _pointers(found, fields)
        with on_device_of(logits):
            _launch(shard_row.sums_kernel, arguments, inputs, options, shard, "gap" not in fields, ())
    return found


def combine(
    gathered: Tensor,  # [ranks, fields, n_rows]
    inputs: Inputs,
    options: Options,
    shard: Shard,
    fields: tuple[str, ...],
    wanted: Collection[str],
) -> tuple[Tensor, Stats, Row]:
    """The loss of each row, without its sample weight; the stats; and what `gradient` wants."""
    inputs = _indexable(inputs)
    n_rows = gathered.shape[2]
    loss = gathered.new_empty(n_rows)
    stats = empty_stats(frozenset(wanted), gathered[0, 0])
    m, rest, *others = (gathered.new_empty(n_rows) if name in fields else None for name in Row._fields)
    assert m is not None and rest is not None
    row = Row(m, rest, *others)
    if n_rows:
        with on_device_of(gathered):
            shard_row.combine_kernel[(launch.cdiv(n_rows, BLOCK),)](
                _pointers(gathered.movedim(1, 0), fields),
                inputs.target,
                inputs.sample_weight,
                _numbers(inputs, options),
                Outputs(loss, *stats),
                shard_row.RowOut(*row),
                n_rows,
                len(gathered),
                gathered.stride(0),
                shard.n_classes,
                options.ignore_index,
                BLOCK=BLOCK,
                num_warps=BLOCK // warp_size(),
                **launch.OPTIONS,
            )
    return loss, stats, row


def gradient(
    row: Row,
    dloss: Tensor | None,  # [n_rows], with the sample weight in it
    dstats: Stats,
    inputs: Inputs,
    options: Options,
    shard: Shard,
    dlogits: Tensor | None,  # [n_rows, n_cols] out; may be the logits
    dtarget: Tensor | None,  # likewise, of probabilities
) -> None:
    """The gradients of the shard's logits and probabilities."""
    inputs = _indexable(inputs)
    logits = inputs.logits
    if logits.numel() == 0:
        return
    dloss = torch.zeros_like(row.m) if dloss is None else dloss
    cotangents = Cotangents(dloss, *(None if x is None else x.contiguous() for x in dstats[:3]))
    arguments = *inputs[:4], cotangents, _numbers(inputs, options), shard_row.RowOut(*row), dlogits, dtarget
    plain = row.total is None and dstats.entropy is None
    with on_device_of(logits):
        _launch(shard_row.gradient_kernel, arguments, inputs, options, shard, plain, (dlogits, dtarget))


def _pointers(found: Tensor, fields: tuple[str, ...]) -> Sums:
    """found: [fields, n_rows] or [fields, ranks, n_rows]."""
    of: dict[str, Any] = dict(zip(fields, found, strict=True))
    if "best" in of:
        of["best"] = of["best"].view(index_dtype(found.dtype))
    return Sums(*(of.get(name) for name in Sums._fields))


def _launch(
    kernel: Any,
    arguments: tuple[Any, ...],
    inputs: Inputs,
    options: Options,
    shard: Shard,
    plain: bool,
    gradients: tuple[Tensor | None, ...],
) -> None:
    """A program for each row of the logits, which are read once."""
    logits, target = inputs.logits, inputs.target
    n_rows, n_cols = logits.shape
    soft = target.is_floating_point()
    if shard.n_classes > launch.MOST:
        raise RuntimeError(f"{shard.n_classes} classes: the kernels take {launch.MOST} at most")
    granule, odd = launch.access(*layout(logits))
    if not all(x is None or launch.lines_up(layout(x), layout(logits), granule) for x in gradients):
        granule, odd = 1, False
    given = granule
    if soft and not launch.lines_up(layout(target), layout(logits), granule):
        given = 1
    row_bytes = n_cols * (logits.itemsize + soft * target.itemsize)
    plain = plain and options.softcap is None
    threads, unroll, _ = launch.wide(row_bytes, logits.itemsize, odd, soft, plain, step=False)
    strides = Strides(
        *logits.stride(),  # type: ignore[call-arg]
        *(target.stride() if soft else (0, 0)),
        *(0 if x is None else x.stride(0) for x in (gradients or (None, None))),
        1,
    )
    kernel[(n_rows,)](
        *arguments,
        n_cols,
        shard.start,
        shard.n_classes,
        strides,
        options.ignore_index,
        UNROLL=unroll * (16 // logits.itemsize // granule),
        THREADS=threads,
        GRANULE=granule,
        GIVEN=given,
        ODD=odd,
        num_warps=threads // warp_size(),
        **launch.OPTIONS,
    )

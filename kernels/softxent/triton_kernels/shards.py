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
from .formula import Cotangents, Outputs
from .rows import batch_of, extras_of, gradient_like, indexable, strides_of, warp_size, wide_tile
from .shard_row import Classes, Exchanged, RowOut

NOTHING = None, None  # gradients
BLOCK = 128  # rows whose sums are combined by one program

__all__ = ["combine", "gradient", "gradient_like", "sums"]


def sums(inputs: Inputs, options: Options, shard: Shard, fields: tuple[str, ...]) -> Tensor:
    """[fields, n_rows] in the dtype of the computation. A target that no shard can hold is told by rest = -1."""
    inputs = indexable(inputs)
    logits = inputs.logits
    found = logits.new_empty(len(fields), len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    if len(logits):
        plain = "gap" not in fields and options.softcap is None
        with on_device_of(logits):
            tile, how = wide_tile(inputs, NOTHING, shard.n_classes, plain, step=False)
            shard_row.sums_kernel[(len(logits),)](
                batch_of(inputs, NOTHING),
                extras_of(inputs, options),
                _pointers(found, fields),
                _classes(inputs, shard),
                strides_of(inputs, NOTHING, None),
                tile=tile,
                **how,
            )
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
    inputs = indexable(inputs)
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
                batch_of(inputs, NOTHING)._replace(logits_ptr=None, weight_ptr=None),
                extras_of(inputs, options),
                Outputs(loss, *stats),
                RowOut(*row),
                n_rows,
                len(gathered),
                gathered.stride(0),
                _classes(inputs, shard),
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
    inputs = indexable(inputs)
    logits = inputs.logits
    if logits.numel() == 0:
        return
    dloss = torch.zeros_like(row.m) if dloss is None else dloss
    cotangents = Cotangents(dloss, *(None if x is None else x.contiguous() for x in dstats[:3]))
    plain = row.total is None and dstats.entropy is None and options.softcap is None
    with on_device_of(logits):
        tile, how = wide_tile(inputs, (dlogits, dtarget), shard.n_classes, plain, step=False)
        shard_row.gradient_kernel[(len(logits),)](
            batch_of(inputs, (dlogits, dtarget)),
            cotangents,
            extras_of(inputs, options),
            RowOut(*row),
            _classes(inputs, shard),
            strides_of(inputs, (dlogits, dtarget), dloss),
            tile=tile,
            **how,
        )


def _classes(inputs: Inputs, shard: Shard) -> Classes:
    return Classes(inputs.logits.shape[1], shard.start, shard.n_classes)


def _pointers(found: Tensor, fields: tuple[str, ...]) -> Exchanged:
    """found: [fields, n_rows] or [fields, ranks, n_rows]."""
    of: dict[str, Any] = dict(zip(fields, found, strict=True))
    if "best" in of:
        of["best"] = of["best"].view(index_dtype(found.dtype))
    return Exchanged(*(of.get(name) for name in Exchanged._fields))

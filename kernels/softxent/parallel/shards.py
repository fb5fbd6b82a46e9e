"""What one rank holds of the classes, and what it tells the others of each row: one collective a step.

Of the classes of one shard but the target class y, with u_j as in triton_kernels/formula.py,

    m      = max_j z_j
    rest   = sum_j exp(z_j - m)
    total  = sum_j u_j
    gap    = sum_j u_j * (m - z_j)
    moment = sum_j exp(z_j - m) * (m - z_j)
    best   = the class of m, the first of them

and, where `moment` is exchanged, in the place of `rest` what is left of it without the 1 of `best`: the entropy of a
row that is sure of that class is made of it

and z_y and w_y from the shard that holds y. Sums of shards add up as those of a row's threads do, once they are moved
to the largest m. Those of all ranks are gathered, and each rank adds them in the order of ranks: the same operations on
the same numbers, so that every rank has the same bits.

    sums(inputs, options, shard, fields) -> [fields, n_rows]                    reads the logits
    exchange(sums, shard)                -> [ranks, fields, n_rows]             the collective
    combine(gathered, ...)               -> losses, stats, and Row              reads no logits
    gradient(row, ...)                   -> dlogits of the shard                reads them again

The first, third and fourth are in cpu/shards.py and triton_kernels/shards.py.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch
from ..options import Inputs, Options, is_given

MOST_FIELDS = 8  # of fields_of


class Shard(NamedTuple):
    """The classes [start, start + n_cols) of n_classes, which this rank of the group holds."""

    start: int
    n_cols: int
    n_classes: int
    widest: int  # the most classes that a rank of the group holds
    group: Any  # dist.ProcessGroup


class Row(NamedTuple):
    """What backward wants of rows, over all classes, [n_rows] each, or None where nothing asks for it."""

    m: Tensor  # the target's logit is in it
    rest: Tensor  # but not in this
    z_y: Tensor | None
    w_y: Tensor | None  # 0 where the target is ignored; None: all 1
    total: Tensor | None
    moment: Tensor | None


def fields_of(inputs: Inputs, options: Options, wanted: Collection[str]) -> tuple[str, ...]:
    """What is exchanged of a row: 3 to 6 numbers for the loss, 2 more for all stats."""
    soft = inputs.target.is_floating_point()
    there = {
        "z_y": not soft,
        "w_y": not soft and inputs.weight is not None,
        "total": soft or is_given(options.label_smoothing),
        "gap": soft or is_given(options.label_smoothing),
        "moment": "entropy" in wanted,
        "best": "prediction" in wanted,
    }
    return "m", "rest", *(name for name, is_there in there.items() if is_there)


def exchange(sums: Tensor, shard: Shard, async_op: bool = False) -> tuple[Tensor, Any]:
    """[ranks, fields, n_rows] of [fields, n_rows], in the order of ranks; and what to wait for, with `async_op`."""
    ranks = dist.get_world_size(shard.group)
    gathered = sums.new_empty(ranks, *sums.shape)
    if sums.numel() == 0:
        return gathered, None
    return gathered, gather(gathered.flatten(0, 1), sums, shard.group, async_op)


def gather(out: Tensor, mine: Tensor, group: Any, async_op: bool = False) -> Any:
    """What every rank gives, one after the other, in `out`; and what to wait for, with `async_op`."""
    of_torch = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until PyTorch 2.12
    return of_torch(out, mine, group=group, async_op=async_op)


def implementation(logits: Tensor) -> Any:
    """The module that serves the logits of a shard: of triton_kernels/ or of cpu/."""
    return dispatch.kernel_module("shards") if dispatch.uses_kernels(logits) else dispatch.cpu_module("shards")


def index_dtype(acc: torch.dtype) -> torch.dtype:
    """Integers of the width of `acc`, as which `best` travels among floats."""
    return torch.int64 if acc == torch.float64 else torch.int32

"""The loss of a DTensor of logits: on each rank that of its own part, and what the parts come to.

    replicated        every rank has the loss of all rows                           no collective
    rows sharded      the loss of its rows; their sum is Partial, each divided by what all rows count to: one number
                      summed over the ranks, where a mean of class indices has to count them
    classes sharded   that of vocab.py, over the group of the mesh's dimension: one all-gather

Each mesh dimension is one of these, and the logits are never gathered. The result is placed as torch's cross_entropy
places it, within `loss_parallel` or not: rows as the target's, a sum Partial("sum"), a mean Partial("avg"), on mesh
dimensions that shard rows, and Replicate on all others.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..functional import LossAndStats, call_of, loss_and_stats, loss_of
from .call import vocab_parallel

Placements = tuple[Placement, ...]


class Layout:
    """How logits lie on their mesh, and what lies beside them."""

    def __init__(self, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size, class_dim: int) -> None:
        self.mesh, self.class_dim = mesh, class_dim
        self.input: Placements = tuple(placements)
        self.n_classes = shape[class_dim]
        if self.mesh.get_coordinate() is None:
            raise RuntimeError(f"this rank is not in the mesh of the logits, {self.mesh}")
        for p in self.input:
            if type(p) not in (Replicate, Shard):
                wanted = tuple(q if type(q) in (Replicate, Shard) else Replicate() for q in self.input)
                raise NotImplementedError(
                    f"input is {p}, and has to be Replicate or Shard: {redistribute('input', wanted)}"
                )
        over = [i for i, p in enumerate(self.input) if p.is_shard(self.class_dim)]
        if len(over) > 1:
            wanted = tuple(Replicate() if i in over[1:] else p for i, p in enumerate(self.input))
            raise NotImplementedError(
                f"the classes of input are sharded over {len(over)} dimensions of the mesh, {self.input}: one may. "
                f"{redistribute('input', wanted)}, or flatten these dimensions of the mesh"
            )
        self.over_classes = over[0] if over else None
        self.over_rows = [i for i, p in enumerate(self.input) if p.is_shard() and i not in over]
        self.rows: Placements = tuple(
            self._of_rows(p) if i in self.over_rows else Replicate() for i, p in enumerate(self.input)
        )

    def _of_rows(self, p: Any) -> Placement:
        """Without the class dimension."""
        return Shard(p.dim - (p.dim > self.class_dim))

    def reduced(self, reduction: str) -> Placements:
        """Of the loss."""
        if reduction == "none":
            return self.rows
        partial = Partial("avg" if reduction == "mean" else "sum")
        return tuple(partial if i in self.over_rows else Replicate() for i in range(self.mesh.ndim))

    @property
    def row_parts(self) -> int:
        return math.prod(self.mesh.size(i) for i in self.over_rows)

    def slice(self) -> tuple[int, int]:
        """This rank's classes [start, end): as torch.chunk has them, the last parts smaller or empty."""
        if self.over_classes is None:
            return 0, self.n_classes
        size = -(-self.n_classes // self.mesh.size(self.over_classes))
        start = min(self.n_classes, size * self.mesh.get_local_rank(self.over_classes))
        return start, min(self.n_classes, start + size)


@torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator]
def dtensor_loss(
    input: DTensor,
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
    stats: Any = (),
) -> LossAndStats:
    """The loss and the stats of functional.py, as DTensors."""
    if inplace:
        raise RuntimeError("inplace=True does not go with a DTensor: leave it out")
    layout = Layout(input.device_mesh, input.placements, input.shape, min(1, input.dim() - 1))
    soft = isinstance(target, Tensor) and target.is_floating_point()
    shape = torch.Size(s for i, s in enumerate(input.shape) if i != layout.class_dim)
    y = local_part("target", target, layout, layout.input if soft else layout.rows)
    v = None if sample_weight is None else local_part("sample_weight", sample_weight, layout, layout.rows)
    w = None if weight is None else local_part("weight", weight, layout, (Replicate(),) * layout.mesh.ndim)
    scale = number_of("logit_scale", logit_scale, layout)
    n = number_of("normalizer", normalizer, layout)
    if reduction == "mean" and n is None and layout.over_rows:
        n = shape.numel() if soft else count_of(y, w, ignore_index, layout)
    logits = plain(input.to_local(grad_placements=layout.input))
    if w is not None:
        w = w[slice(*layout.slice())]
    arguments = logits, y, w, ignore_index, reduction, label_smoothing, z_loss, softcap, scale, v, n, loss_dtype, False
    if layout.over_classes is None:
        wanted = tuple(stats)
        loss, found = loss_of(call_of(*arguments), wanted)
    else:
        loss, found, wanted = vocab_parallel(
            *arguments,
            True,
            group=layout.mesh.get_group(layout.over_classes),
            vocab_start=layout.slice()[0],
            vocab_size=layout.n_classes,
            stats=stats,
        )
    out = loss_and_stats(loss, found, y, wanted)
    if reduction == "mean" and layout.row_parts > 1:  # what is averaged over the ranks; its gradient is that of the sum
        loss = loss + (layout.row_parts - 1) * loss.detach()
    loss = placed(loss, layout, layout.reduced(reduction), shape if reduction == "none" else torch.Size())
    return LossAndStats(loss, *(None if x is None else placed(x, layout, layout.rows, shape) for x in out[1:]))


def placed(x: Tensor, layout: Layout, placements: Placements, shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, layout.mesh, placements, run_check=False, shape=shape, stride=stride)


def local_part(name: str, x: Any, layout: Layout, wanted: Placements) -> Tensor:
    """What this rank holds of what lies beside the logits. Where it is replicated and has to be sharded, its part."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(x).__name__}")
    if not isinstance(x, DTensor):
        if any(p.is_shard() for p in wanted):
            raise RuntimeError(
                f"{name} is a plain tensor beside logits that are {layout.input}: pass distribute_tensor({name}, mesh, "
                f"{list(wanted)}), or DTensor.from_local of this rank's part"
            )
        return x
    check_mesh(name, x, layout)
    if tuple(x.placements) != wanted:
        moves = any(p != q and not p.is_replicate() for p, q in zip(x.placements, wanted, strict=True))
        if moves or (x.requires_grad and torch.is_grad_enabled()):
            raise RuntimeError(
                f"{name} is {tuple(x.placements)} beside logits that are {layout.input}: {redistribute(name, wanted)}"
            )
        x = x.redistribute(placements=wanted)  # a part of what is here: nothing is sent
    return plain(x.to_local(grad_placements=wanted))


def number_of(name: str, x: Any, layout: Layout) -> Any:
    """A number that all ranks share. Its gradient is a sum over the rows of all."""
    if not isinstance(x, Tensor):
        return x
    learned = x.requires_grad and torch.is_grad_enabled()
    if not isinstance(x, DTensor):
        if learned and layout.over_rows:
            raise RuntimeError(
                f"{name} requires a gradient, to which every rank's rows add: pass "
                f"distribute_tensor({name}, mesh, {[Replicate()] * layout.mesh.ndim})"
            )
        return x
    check_mesh(name, x, layout)
    wanted = (Replicate(),) * layout.mesh.ndim
    if tuple(x.placements) != wanted:
        raise RuntimeError(f"{name} is {tuple(x.placements)}: {redistribute(name, wanted)}")
    sums = tuple(Partial() if i in layout.over_rows else Replicate() for i in range(layout.mesh.ndim))
    return plain(x.to_local(grad_placements=sums))


def count_of(target: Tensor, weight: Tensor | None, ignore_index: int, layout: Layout) -> Tensor:
    """What the mean divides by, of all rows: their number, or the sum of their targets' weights; NaN for nothing."""
    y = target.long()
    kept = y != ignore_index
    if weight is None:
        n = torch.count_nonzero(kept)
    else:
        of_targets = weight[y.clamp(0, len(weight) - 1)].to(torch.promote_types(weight.dtype, torch.float32))
        n = torch.where(kept, of_targets, 0).sum()
    n = n.reshape(1)
    for i in layout.over_rows:
        dist.all_reduce(n, group=layout.mesh.get_group(i))
    n = n.to(torch.promote_types(n.dtype, torch.float32))
    return torch.where(n == 0, float("nan"), n)


def check_mesh(name: str, x: DTensor, layout: Layout) -> None:
    if x.device_mesh != layout.mesh:
        raise RuntimeError(f"{name} is on {x.device_mesh}, and input on {layout.mesh}: put both on one mesh")


def plain(x: Any) -> Tensor:
    """The result of a collective that is still on its way, once it is there."""
    if type(x) is not Tensor and hasattr(x, "trigger_wait"):
        x = x.wait()
    return x  # type: ignore[no-any-return]


def redistribute(name: str, placements: Placements) -> str:
    return f"{name}.redistribute(placements={list(placements)})"

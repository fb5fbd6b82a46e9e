"""What the mean divides by: the sum of the weights of the targets that count, of one process or of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import INDEX_DTYPES


def normalizer(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """A number on the device of the target, never read by the host. Weights that sum to 0 give NaN."""
    total = _sum_of_weights(target, weight, ignore_index, dtype)
    return total if weight is None else _nan_for_0(total)


def global_normalizer(
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    *,
    group: Any = None,
    gradients: str = "mean",
) -> Tensor:
    """`normalizer=` of a mean over the rows of all ranks, where each rank has rows of its own: data parallelism, and
    sequence parallelism, where the rows of a sequence are spread over time.

        n = sum of w[y_i] over the rows of all ranks,    w = 1 without class weights, and 0 for rows that are ignored

    The mean over the ranks of sum_i loss_i / (n / W), each of W ranks over its own rows i, is the loss of one process
    with all rows, however many of them count on each rank; none may on some. Gradients likewise.

    Args:
        target: the class indices of this rank's rows, in any shape: int64, int32 or uint8. Of a language model the
            labels that are shifted already. Of accumulated gradients those of all micro-batches.
        weight: (C), the weights of classes, as they are given to the loss.
        ignore_index: rows with this target do not count.
        group: the ranks that have different rows, and whose gradients are put together; None for all. Ranks that share
            rows, as those of tensor parallelism do, are in groups of their own, and each has the same target.
        gradients: what becomes of the gradients of the ranks: "mean", as in DistributedDataParallel and fully_shard,
            for which n / W is returned; or "sum", for which it is n.

    Returns a number on the device of `target`, float64 (float32 on MPS), without a gradient; NaN where weights sum to
    0. One all-reduce of one number, which every rank of the group has to take part in; the host does not wait for it.
    Without a process group it is that of this process alone.

    Raises RuntimeError for a target that is not class indices, and for a rank that is not in the group; ValueError for
    other `gradients`; TypeError for a DeviceMesh in the place of a group.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f"gradients must be 'mean' or 'sum', got {gradients!r}")
    if target.dtype not in INDEX_DTYPES:
        raise RuntimeError(
            f"expected class indices, got {target.dtype}: a mean over probabilities divides by the number of rows, "
            "which is normalizer=n of all ranks"
        )
    if hasattr(group, "get_group"):  # a DeviceMesh
        raise TypeError(f"group must be a ProcessGroup or None, not {type(group).__name__}: pass its get_group()")
    dtype = widest(target.device)
    total = _sum_of_weights(target, None if weight is None else weight.detach(), ignore_index, dtype).to(dtype)
    ranks = 1
    if group is not None or (dist.is_available() and dist.is_initialized()):
        ranks = dist.get_world_size(group)
        if ranks < 1:
            raise RuntimeError("this rank is not in the group")
        dist.all_reduce(total, group=group)
    if weight is not None:
        total = _nan_for_0(total)
    return total / ranks if gradients == "mean" else total


def widest(device: torch.device) -> torch.dtype:
    """Of floating point: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _sum_of_weights(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    target = target.long()  # first: a uint8 156 is not -100
    kept = target != ignore_index
    if weight is None:
        return torch.count_nonzero(kept)
    # A target out of range has its NaN or its error from the row's loss; here it must only not be read.
    y = torch.where(kept, target, 0).clamp(0, len(weight) - 1)
    return torch.where(kept, weight.to(dtype)[y], 0).sum()


def _nan_for_0(total: Tensor) -> Tensor:
    return torch.where(total == 0, float("nan"), total)  # as torch: NaN, though a smoothed loss over 0 is infinite

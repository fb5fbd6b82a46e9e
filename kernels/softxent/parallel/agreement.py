"""Whether the ranks of a group mean the same call, found out once for each group and set of shapes.

Each rank sends what it was called with; all of them look at all of it, and raise the same error. A rank whose own
arguments are wrong sends its error instead, so that no other waits for it. What was agreed is remembered by what is
equal on all ranks, so that all of them remember it or none. Later calls of the same shapes exchange nothing for it, or
two numbers where no vocab_size says how many classes there are: from then on a rank that differs, or fails, is to the
others as one that died.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import Shard

MOST = 4096  # sets of shapes remembered of a group
Slices = list[tuple[int, int, int]]  # start, n_cols, n_classes of each rank
_agreed: WeakKeyDictionary[Any, dict[Any, tuple[Slices, list[Any]]]] = WeakKeyDictionary()


def group_of(group: Any) -> Any:
    """The process group that is meant. Raises where there is none, or this rank is not in it."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialized: init_process_group() comes first")
    group = dist.group.WORLD if group is None else group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError("this rank is not in the group")
    if not isinstance(group, dist.ProcessGroup):
        hint = ": pass mesh.get_group()" if type(group).__name__ == "DeviceMesh" else ""
        raise TypeError(f"group must be a ProcessGroup or None, not {type(group).__name__}{hint}")
    if dist.get_rank(group) < 0:
        raise RuntimeError("this rank is not in the group")
    return group


def agree(
    group: Any,
    names: tuple[Any, ...],
    same: dict[str, Any],
    n_local: int,
    vocab_start: int | None,
    vocab_size: int | None,
    equal: dict[str, Tensor | None],
    error: Exception | None,
    device: torch.device | None = None,
) -> Shard:
    """This rank's shard.

    names: what may not change without a new agreement, equal on all ranks. same: what has to be the same on every
    rank; equal: tensors likewise. device: of what is sent.

    Raises `error` here and RuntimeError elsewhere; RuntimeError on every rank where they differ; ValueError on every
    rank for slices that do not make up the classes. Once the group has agreed on something, an error is raised here
    alone: the others may be in a collective of their own already.
    """
    known = _agreed.setdefault(group, {})
    if error is not None and known:
        raise error
    key = (vocab_size, *names)
    shards, held = known.get(key, (None, [])) if error is None else (None, [])
    me = dist.get_rank(group)
    if shards is not None and vocab_size is None and _held_by_all(group, n_local, vocab_start, device) != held:
        shards = None
    elif shards is not None and vocab_size is not None:
        _check_held(shards[me], n_local, vocab_start)
    if shards is None:
        mine = {"error": f"{type(error).__name__}: {error}"} if error else {"error": None, **same}
        if error is None:
            mine |= {name: None if x is None else fingerprint(x) for name, x in equal.items()}
        slices = n_local, vocab_start, vocab_size
        of_ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_ranks, (mine, slices), group=group)
        if error is not None:
            raise error
        ranks = [dist.get_global_rank(group, i) for i in range(len(of_ranks))]
        _check_same([said for said, _ in of_ranks], ranks)
        shards = slices_of([said for _, said in of_ranks], ranks)
        if len(known) >= MOST:
            known.clear()
        held = [(size, -1 if start is None else start) for _, (size, start, _) in of_ranks]
        known[key] = shards, held
    return Shard(*shards[me], max(n_cols for _, n_cols, _ in shards), group)


def _held_by_all(group: Any, n_local: int, vocab_start: int | None, device: torch.device | None) -> list[Any]:
    """n_local and vocab_start, -1 for None, of each rank."""
    mine = torch.tensor([n_local, -1 if vocab_start is None else vocab_start], device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [tuple(of_rank) for of_rank in torch.stack(found).tolist()]


def _check_held(agreed: tuple[int, int, int], n_local: int, vocab_start: int | None) -> None:
    start, n_cols, n_classes = agreed
    moved = n_cols > 0 and vocab_start not in (None, start)
    if n_local < n_cols or moved:
        raise RuntimeError(
            f"this rank holds {n_local} classes{f' from {vocab_start} on' if moved else ''}, and ranks agreed that it "
            f"has [{start}, {start + n_cols}) of vocab_size={n_classes}: in one group they are spread in one way"
        )


def _check_same(said: Sequence[dict[str, Any]], ranks: Sequence[int]) -> None:
    for rank, of_rank in zip(ranks, said, strict=True):
        if of_rank["error"]:
            raise RuntimeError(f"rank {rank} raised {of_rank['error']}")
    for rank, of_rank in zip(ranks, said, strict=True):
        for name in said[0]:
            if of_rank[name] != said[0][name]:
                what = f"{name} is {of_rank[name]} on rank {rank}, and {said[0][name]} on rank {ranks[0]}"
                if name in ("target", "sample_weight"):
                    what = f"the values of {name} on rank {rank} are not those on rank {ranks[0]}"
                raise RuntimeError(
                    f"{what}. All ranks of the group, which share the classes of the same rows, have to be called alike"
                )


def slices_of(said: Sequence[tuple[int, int | None, int | None]], ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, n_cols, n_classes) of each rank, from its n_local, vocab_start and vocab_size."""
    sizes, starts, wholes = zip(*said, strict=True)
    for name, values in (("vocab_start", [x is None for x in starts]), ("vocab_size", wholes)):
        for rank, value in zip(ranks, values, strict=True):
            if value != values[0]:
                raise ValueError(f"{name} is not the same on rank {rank} as on rank {ranks[0]}: {said}")
    if starts[0] is None:
        starts = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    n_classes = sum(sizes) if wholes[0] is None else wholes[0]
    pairs = list(zip(starts, sizes, strict=True))
    held = [(start, max(0, min(n_local, n_classes - start)), n_classes) for start, n_local in pairs]
    reached, before = 0, None
    for (start, n_cols, _), rank in sorted(zip(held, ranks, strict=True)):
        if n_cols == 0:
            continue
        mine = f"rank {rank} holds [{start}, {start + n_cols})"
        if start < reached:
            raise ValueError(f"slices overlap: {mine}, rank {before} holds them to {reached}")
        if start > reached:
            raise ValueError(f"no rank holds the classes [{reached}, {start}) of {n_classes}: {mine}")
        reached, before = start + n_cols, rank
    if reached < n_classes:
        raise ValueError(
            f"no rank holds the classes [{reached}, {n_classes}) of {n_classes}: the group of {len(ranks)} ranks holds "
            f"slices of {list(sizes)}"
        )
    return held


def fingerprint(x: Tensor) -> int:
    """A number that other values, or another order of them, are very unlikely to have."""
    x = x.detach().reshape(-1)
    bits = x.double().view(torch.int64) if x.is_floating_point() else x.long()
    place = torch.arange(1, len(bits) + 1, device=x.device) * 0x9E3779B97F4A7C1
    return int(((bits ^ (bits >> 29)) * (place | 1)).sum())

"""The linear layer on DTensors, its weight sharded by classes: dtensor.py says where results lie, linear.py the rest.

The mesh dimension that shards the classes, as DTensors have them:

    input replicated there        its gradient is an all-reduce there
    input sharded by rows there   it is gathered, and its gradient is a reduce-scatter: sequence parallelism

both DTensor's own. On other dimensions input and target may be sharded by rows; the weight is whole there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..linear import Place
from ..options import Stats
from .dtensor import Layout, Placements, check_mesh, count_of, local_part, number_of, placed, plain, redistribute


@torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator]
def dtensor_linear(call: Callable[..., tuple[Tensor, Stats]], **arguments: Any) -> tuple[Tensor, Stats]:
    """call: the op on this rank's part, and the group."""
    arguments = dict.fromkeys(("weight", "sample_weight", "normalizer")) | arguments
    x, weight, bias = arguments["input"], arguments["linear_weight"], arguments["linear_bias"]
    mesh, over = weight.device_mesh, _over_classes(weight)
    rows: Placements = tuple(Replicate() if i == over else p for i, p in enumerate(x.placements))
    class_dim = x.dim() - 1
    of_logits = tuple(Shard(class_dim) if i == over else p for i, p in enumerate(rows))
    layout = Layout(mesh, of_logits, torch.Size([*x.shape[:-1], len(weight)]), class_dim)
    _check(arguments, layout)
    soft, shift = arguments["target"].is_floating_point(), arguments["shift"]
    shape = x.shape[:-1]
    if shift:
        if any(p.is_shard(class_dim - 1) for p in rows):
            raise RuntimeError(
                "shift=True predicts the next position, which another rank has: the positions may be sharded over the "
                f"mesh dimension of the classes alone. {redistribute('input', (Replicate(),) * mesh.ndim)}"
            )
        shape = torch.Size([*shape[:-1], shape[-1] - 1])
    target = local_part("target", arguments["target"], layout, layout.input if soft else layout.rows)
    v, w = arguments["sample_weight"], arguments["weight"]
    v = None if v is None else local_part("sample_weight", v, layout, layout.rows)
    w = None if w is None else local_part("weight", w, layout, (Replicate(),) * mesh.ndim)
    n = number_of("normalizer", arguments["normalizer"], layout)
    if arguments["reduction"] == "mean" and n is None and layout.over_rows:
        counted = target[..., 1:] if shift else target
        n = shape.numel() if soft else count_of(counted, w, arguments["ignore_index"], layout)
    sums = tuple(Partial() if i in layout.over_rows else Replicate() for i in range(mesh.ndim))
    of_classes = tuple(Shard(0) if i == over else p for i, p in enumerate(sums))
    of_input = tuple(Partial() if i == over else p for i, p in enumerate(rows))
    whole = x.redistribute(placements=rows)
    start, end = layout.slice()
    arguments |= {
        "input": plain(whole.to_local(grad_placements=of_input)),
        "linear_weight": plain(weight.to_local(grad_placements=of_classes)),
        "linear_bias": None if bias is None else plain(bias.to_local(grad_placements=of_classes)),
        "target": target,
        "weight": None if w is None else w[start:end],
        "sample_weight": v,
        "normalizer": n,
        "logit_scale": number_of("logit_scale", arguments["logit_scale"], layout),
        "place": Place(mesh.get_group(over), start, len(weight), "partial"),
    }
    loss, stats = call(**arguments)
    if arguments["reduction"] == "mean" and layout.row_parts > 1:  # averaged over the ranks; its gradient is the sum's
        loss = loss + (layout.row_parts - 1) * loss.detach()
    each = arguments["reduction"] == "none"
    loss = placed(loss, layout, layout.reduced(arguments["reduction"]), shape if each else torch.Size())
    return loss, Stats(*(None if s is None else placed(s, layout, layout.rows, shape) for s in stats))


def _over_classes(weight: DTensor) -> int:
    """The dimension of the mesh that shards the classes."""
    over = [i for i, p in enumerate(weight.placements) if p.is_shard(0)]
    if len(over) != 1 or not all(p.is_replicate() or p.is_shard(0) for p in weight.placements):
        raise NotImplementedError(
            f"linear_weight is {tuple(weight.placements)}, and has to be Shard(0), its classes, on one dimension of "
            "the mesh, and Replicate() on others"
        )
    return over[0]


def _check(arguments: dict[str, Any], layout: Layout) -> None:
    x, weight, bias = arguments["input"], arguments["linear_weight"], arguments["linear_bias"]
    if arguments.get("several"):
        raise ValueError("several ids of each token do not go with a DTensor: pass target")
    if not isinstance(arguments["target"], Tensor):
        raise TypeError(f"target must be a Tensor, not {type(arguments['target']).__name__}")
    check_mesh("input", x, layout)
    if any(p.is_shard(layout.class_dim) for p in x.placements):
        raise NotImplementedError(
            f"the features of input are sharded, {tuple(x.placements)}: "
            f"{redistribute('input', (Replicate(),) * layout.mesh.ndim)}"
        )
    if bias is not None and (not isinstance(bias, DTensor) or tuple(bias.placements) != tuple(weight.placements)):
        raise RuntimeError(
            f"linear_bias is {tuple(getattr(bias, 'placements', ())) or 'a plain tensor'}, and has to lie as "
            f"linear_weight, {tuple(weight.placements)}"
        )

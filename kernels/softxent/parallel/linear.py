"""Rows through a linear layer whose classes are spread over the ranks of a group: two chunks of logits at a time.

    z = x @ W.T + b                 [chunk, shard.n_cols] of each rank: one product
    sums, exchange, combine         shards.py: one collective a chunk, under the product of the next chunk
                                    (and one of a number each: for a mean with class weights, for a learned scale)
    z <- dloss/dz                   in place, knowing what all ranks know
    dx = z @ W,  dW += z.T @ x      W and its gradient are a rank's own; dx is its summand, which `Whole` adds up

As in linear_rows.py, which has the products, a sum or mean makes its gradients in forward: three products. For the
others backward makes the logits again, and exchanges nothing but dx: what all ranks know of each row was kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import on_device_of
from ..functional import reduced
from ..linear_rows import (
    OF_WIDEST,
    Gradients,
    Head,
    How,
    Products,
    check_exist,
    default_bytes,
    empty_rows,
    made_in_forward,
    of_rows,
    sizes_of,
    that_count,
    times_,
)
from ..options import Inputs, Options, Stats
from ..transforms import in_higher_order_backward
from .agreement import agree, group_of
from .call import as_divisor, check_call, check_slice, said
from .shards import MOST_FIELDS, Row, Shard, exchange, fields_of, gather, implementation

if TYPE_CHECKING:
    from ..linear import Place, Rows

ROOMS = 2  # one for the chunk whose sums are on their way
GRADIENTS = ("all_reduce", "reduce_scatter", "partial")


@torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator]
def of_group(
    prepare: Callable[[int], "Rows"],  # of how many ranks each gives a part of the rows
    names: tuple[str, ...],
    place: "Place",
) -> "tuple[Rows, Tensor, Stats]":
    """And the loss (of each row, or reduced) in the dtype of the computation, and the stats of these names, of rows."""
    group, (vocab_start, vocab_size, input_gradient) = group_of(place.group), place[1:]
    rows, error = None, None
    try:  # so that a rank with wrong arguments tells the others, who would wait for it
        check_slice(vocab_start, vocab_size)
        if input_gradient not in GRADIENTS:
            raise ValueError(f"input_gradient must be one of {', '.join(GRADIENTS)}, got {input_gradient!r}")
        rows = prepare(dist.get_world_size(group) if input_gradient == "reduce_scatter" else 1)
        check_call(rows.call)
    except (TypeError, ValueError, RuntimeError, IndexError) as raised:
        error = raised
    if rows is None or error is not None:
        agree(group, (), {}, 0, None, None, {}, error)
        raise AssertionError("agree() raises a given error")
    (x, weight, bias), call, how = rows
    inputs = call.inputs
    decides, same = said(call, names)
    same |= {"input_gradient": input_gradient, "the features of input": x.shape[1], "valid_rows": how.valid_rows}
    same |= {"max_logits_bytes": how.max_bytes, "linear_bias given": bias is not None}
    same |= {"the dtype of linear_weight": weight.dtype, "accum_dtype": how.accumulator}
    equal = {"target": None if inputs.target.is_floating_point() else inputs.target}
    equal["sample_weight"] = inputs.sample_weight
    wants = tuple(t is not None and t.requires_grad for t in (*rows.head, inputs.target))
    same |= {"what requires a gradient": wants, "whether gradients are recorded": torch.is_grad_enabled()}
    same["the dtype of products"] = how.operand
    often = how._replace(valid_rows=None), torch.is_grad_enabled()  # a count of rows is another one in each step
    decides = (*decides, x.shape, input_gradient, *often, weight.dtype, bias is not None, wants)
    with on_device_of(x):
        shard = agree(group, decides, same, len(weight), vocab_start, vocab_size, equal, None, x.device)
    if shard.n_classes == 0 and len(inputs.target):
        raise IndexError(f"no class to choose from: none of the {dist.get_world_size(group)} ranks holds one")
    before = call.shape.numel() - len(inputs.target)
    check_exist(inputs, shard.n_classes, call.options, before)  # here, where a row's number is that of the caller
    if how.max_bytes == OF_WIDEST:
        how = how._replace(max_bytes=default_bytes(shard.widest, weight))
    n_cols = shard.n_cols
    if n_cols < len(weight):  # padding
        weight, bias = weight[:n_cols], None if bias is None else bias[:n_cols]
        inputs = inputs._replace(logits=inputs.logits[:, :n_cols])
        inputs = inputs._replace(weight=None if inputs.weight is None else inputs.weight[:n_cols])
        if inputs.target.is_floating_point():
            inputs = inputs._replace(target=inputs.target[:, :n_cols])
    head = Head(Whole.apply(x, group, input_gradient), weight, bias)
    return rows, *_loss(head, inputs, call.options, shard, how, names)


class Whole(torch.autograd.Function):
    """The rows of the input, whose gradient is the sum of the ranks' summands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, input_gradient: str) -> Tensor:
        ctx.group, ctx.how = group, input_gradient
        if input_gradient != "reduce_scatter":
            return x.view_as(x)
        whole = x.new_empty(len(x) * dist.get_world_size(group), x.shape[1])
        gather(whole, x.contiguous(), group)
        return whole

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.how == "all_reduce":
            dx = dx.contiguous()
            dist.all_reduce(dx, group=ctx.group)
        elif ctx.how == "reduce_scatter":
            mine = dx.new_empty(len(dx) // dist.get_world_size(ctx.group), dx.shape[1])
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            scatter(mine, dx.contiguous(), group=ctx.group)
            dx = mine
        return dx, None, None


def _loss(
    head: Head, inputs: Inputs, options: Options, shard: Shard, how: How, names: tuple[str, ...]
) -> tuple[Tensor, Stats]:
    v, n = inputs.sample_weight, inputs.normalizer
    learned = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (v, n)]
    if options.reduction == "mean" and n is None:
        inputs = inputs._replace(normalizer=as_divisor(inputs, options, _counts(inputs, options, shard)))
    if not any(learned):
        return VocabLinear.of(head, inputs, options, shard, how, names)
    bare = inputs._replace(sample_weight=None, normalizer=None) if learned[0] else inputs._replace(normalizer=None)
    alone, how = options._replace(reduction="none"), how._replace(valid_rows=None)
    loss, stats = VocabLinear.of(head, bare, alone, shard, how, names)
    if learned[0] and v is not None:
        stats = stats.without(v == 0)
    else:
        inputs = inputs._replace(sample_weight=None)  # it is in the losses of rows
    return reduced(loss, inputs, options), stats


def _counts(inputs: Inputs, options: Options, shard: Shard) -> Tensor | None:
    """The sum of w_y over the rows that count [1]; None for all 1."""
    target, weight = inputs.target, inputs.weight
    if weight is None or target.is_floating_point():
        return None
    y = target.long() - shard.start
    held = (y >= 0) & (y < shard.n_cols) & (target != options.ignore_index)
    padded = F.pad(weight.to(inputs.logits.dtype), (0, 1))  # 0 for what is not held
    mine = padded[torch.where(held, y, shard.n_cols)].sum()
    return exchange(mine.reshape(1, 1), shard)[0].sum(0)[0]


class VocabLinear(torch.autograd.Function):
    @classmethod
    def of(
        cls, head: Head, inputs: Inputs, options: Options, shard: Shard, how: How, names: Sequence[str]
    ) -> tuple[Tensor, Stats]:
        tensors = *head, *inputs[1:]
        wanted = (x is not None and x.requires_grad for x in (*head, inputs.target, inputs.logit_scale))
        grad = Gradients(*wanted) if torch.is_grad_enabled() else Gradients(*[False] * 5)
        loss, *stats = cls.apply(*tensors, (options, shard, how, names, grad))
        return loss, Stats(**dict(zip(names, stats, strict=True)))

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, (options, shard, how, names, wanted) = arguments
        head, inputs = _unpacked(tensors)
        at_once = made_in_forward(head, options, how, names)
        with torch.autocast(head.input.device.type, enabled=False):
            loss, stats, rows, made = _forward(head, inputs, options, shard, how, names, wanted, at_once)
        ctx.save_for_backward(*tensors, *rows, *options.tensors)
        ctx.rest = options, shard, how, names, wanted
        ctx.at_once, ctx.made = at_once, made
        ctx.set_materialize_grads(False)
        found = [getattr(stats, name) for name in names]
        ctx.mark_non_differentiable(*(x for name, x in zip(names, found, strict=True) if name == "prediction"))
        return loss, *found

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        options, shard, how, names, wanted = ctx.rest
        there = [x for x in given if x is not None]
        if any(in_higher_order_backward(x) for x in there):
            raise RuntimeError(
                "no recorded or batched backward pass of a loss whose classes are spread over ranks: it would need "
                "collectives of its own. Leave out create_graph"
            )
        if not there:
            return (None,) * 9
        dloss, dstats = given[0], Stats(**dict(zip(names, given[1:], strict=True)))._replace(prediction=None)
        made, ctx.made = ctx.made, None
        if made is None:
            tensors, rows = ctx.saved_tensors[:8], Row(*ctx.saved_tensors[8 : 8 + len(Row._fields)])
            head, inputs = _unpacked(tensors)
            with torch.autocast(there[0].device.type, enabled=False):
                if not ctx.at_once:
                    chunks = _Chunks(head, inputs, options, shard, how, wanted, rooms=1)
                    made = _backward(chunks, options, shard, rows, dloss, dstats)
                else:  # a second backward pass
                    made = _forward(head, inputs, options, shard, how, names, wanted, True)[3]
        if ctx.at_once:
            assert dloss is not None
            times_([x for x in made if x is not None], dloss)
        return *made[:4], None, None, None, made.logit_scale, None


def _unpacked(tensors: Sequence[Any]) -> tuple[Head, Inputs]:
    x, weight, bias, target, *others = tensors
    acc = torch.promote_types(x.dtype, torch.float32)
    logits = x.new_zeros((), dtype=acc).expand(len(target), len(weight))  # for those who ask of which shape
    return Head(x, weight, bias), Inputs(logits, target, *others)


class _Chunks:
    """The rows that count, some at a time, and their products: as many chunks on each rank, however many classes."""

    def __init__(
        self,
        head: Head,
        inputs: Inputs,
        options: Options,
        shard: Shard,
        how: How,
        wanted: Gradients,
        rooms: int,
        later: Gradients | None = None,
    ) -> None:
        """later: those that backward will want, for which the bytes have to suffice too."""
        self.head = head
        self.rows, self.inputs = that_count(inputs, options, how.valid_rows)
        n_rows = len(self.inputs.target)
        self.count = n_rows if self.rows is None else len(self.rows)
        some = self.rows is not None
        row = 2 * dist.get_world_size(shard.group) * MOST_FIELDS * self.inputs.logits.itemsize  # gathered, and moved
        if some and inputs.target.is_floating_point():
            row += shard.widest * inputs.target.itemsize  # a chunk's, side by side
        self.sizes = sizes_of(head, self.inputs, how, later or wanted, self.count, some, shard.widest, rooms, row)
        self.products = Products(head, how, self.sizes, wanted, n_rows, not some, rooms)
        self.dtarget = inputs.target.new_zeros(inputs.target.shape) if wanted.target else None

    def __iter__(self) -> Iterator[tuple[Any, Tensor, Inputs]]:
        """Where they are, their features, and their logits in a room of their own until the one after the next."""
        for start in range(0, self.count, self.sizes.rows):
            at: Any = slice(start, min(self.count, start + self.sizes.rows))
            at = at if self.rows is None else self.rows[at]
            x = self.head.input[at].to(self.products.operand)
            yield at, x, of_rows(self.inputs, at)._replace(logits=self.products.logits(x))

    def pieces(self, part: Inputs) -> Iterator[tuple[slice, Inputs]]:
        """As many rows as torch operations may take at a time; all of them for the kernels."""
        for start in range(0, len(part.logits), self.sizes.piece):
            some = slice(start, start + self.sizes.piece)
            yield some, of_rows(part, some)._replace(logits=part.logits[some])

    def sums(self, part: Inputs, options: Options, shard: Shard, fields: tuple[str, ...]) -> Tensor:
        module = implementation(part.logits)
        return torch.cat([module.sums(piece, options, shard, fields) for _, piece in self.pieces(part)], 1)

    def add(self, at: Any, x: Tensor, part: Inputs, options: Options, shard: Shard, row: Row, given: Any) -> None:
        """The gradients of a chunk; given: those of the loss, without its factors, and of the stats, of the chunk."""
        dloss, dstats = given
        z = part.logits
        if dloss is not None:
            dloss = _times_factors(dloss.expand(len(z)), part, options)
        for some, piece in self.pieces(part):
            of_row = Row(*(None if y is None else y[some] for y in row))  # type: ignore[arg-type]
            of_stats = Stats(*(None if y is None else y[some] for y in dstats))
            of_loss = None if dloss is None else dloss[some]
            dtarget = None if self.dtarget is None else self.dtarget.new_empty(piece.target.shape)
            implementation(z).gradient(of_row, of_loss, of_stats, piece, options, shard, piece.logits, dtarget)
            if self.dtarget is not None and dtarget is not None:
                self.dtarget[_within(at, some)] = dtarget
        self.products.add(at, x, z)

    def gradients(self, shard: Shard) -> Gradients:
        made = self.products.gradients(self.dtarget, self.inputs.logit_scale)
        if made.logit_scale is not None:
            of_ranks, _ = exchange(made.logit_scale.reshape(1, 1), shard)
            made = made._replace(logit_scale=of_ranks.sum(0).reshape(made.logit_scale.shape))
        return made


def _within(at: Any, some: slice) -> Any:
    """Of rows `at`, those."""
    return at[some] if isinstance(at, Tensor) else slice(at.start + some.start, min(at.start + some.stop, at.stop))


def _times_factors(losses: Tensor, part: Inputs, options: Options) -> Tensor:
    """A row's sample weight, over the mean's divisor."""
    if part.sample_weight is not None:
        losses = losses * part.sample_weight.to(losses.dtype)
    if options.reduction == "mean" and part.normalizer is not None:
        losses = losses / part.normalizer
    return losses.contiguous()


def _forward(
    head: Head,
    inputs: Inputs,
    options: Options,
    shard: Shard,
    how: How,
    names: Sequence[str],
    wanted: Gradients,
    at_once: bool,
) -> tuple[Tensor, Stats, Row, Gradients | None]:
    """The loss, the stats, what is known of rows, and the gradients if they are made at once."""
    now = wanted if at_once else Gradients(*[False] * 5)
    chunks = _Chunks(head, inputs, options, shard, how, now, ROOMS, None if at_once else wanted)
    inputs, target = chunks.inputs, inputs.target
    acc = inputs.logits.dtype
    module, fields = implementation(inputs.logits), fields_of(inputs, options, names)
    each = options.reduction == "none"
    loss = target.new_zeros((len(target),) if each else (), dtype=acc)
    stats = Stats(**dict(zip(names, empty_rows(names, target, acc), strict=True)))
    kept = None if at_once or not any(wanted) else Row(*_room(fields, target, acc))  # type: ignore[arg-type]
    if options.reduction == "mean" and inputs.normalizer is not None and chunks.count == 0:
        loss = loss / inputs.normalizer[0]

    def finish(at: Any, x: Tensor, part: Inputs, gathered: Tensor, work: Any) -> None:
        if work is not None:
            work.wait()
        losses, found, row = module.combine(gathered, part, options, shard, fields, names)
        losses = _times_factors(losses, part, options)
        if each:
            loss[at] = losses
        else:
            loss.add_(losses.sum())
        for out, values in (*zip(stats, found, strict=True), *zip(kept or (), row if kept else (), strict=True)):
            if out is not None:
                out[at] = values
        if any(now):
            chunks.add(at, x, part, options, shard, row, (losses.new_ones(()), Stats()))

    before: Any = None
    for at, x, part in chunks:
        pair = exchange(chunks.sums(part, options, shard, fields), shard, async_op=True)
        if before is not None:
            finish(*before)
        before = at, x, part, *pair
    if before is not None:
        finish(*before)
    made = chunks.gradients(shard) if at_once else None
    return loss, stats, kept or Row(*[None] * len(Row._fields)), made  # type: ignore[arg-type]


def _room(fields: Sequence[str], target: Tensor, acc: torch.dtype) -> list[Tensor | None]:
    return [target.new_zeros(len(target), dtype=acc) if name in fields else None for name in Row._fields]


def _backward(
    chunks: _Chunks, options: Options, shard: Shard, rows: Row, dloss: Tensor | None, dstats: Stats
) -> Gradients:
    each = dloss is not None and dloss.dim() > 0
    for at, x, part in chunks:
        row = Row(*(None if y is None else y[at] for y in rows))  # type: ignore[arg-type]
        given = dloss[at] if each and dloss is not None else dloss
        of_stats = Stats(*(None if y is None else y[at] for y in dstats))
        chunks.add(at, x, part, options, shard, row, (given, of_stats))
        del x, part  # before there are those of the next
    return chunks.gradients(shard)

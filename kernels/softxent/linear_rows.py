"""Rows through a linear layer and the row op, some rows at a time: never more than one chunk of logits.

    z  = x @ W.T + b                        [chunk, n_cols]: one product, kept in float32
    z <- dloss/dz                           the op on logits (dispatch.implementation), in place
    dx = z @ W,  dW += z.T @ x,  db += sum_i z_i
    dloss/ds = (sum_i x_i . dx_i + b . db) / s         for a learned logit scale s, since the op sees s * (x @ W.T + b)

The sum or mean has its gradients made in forward: three products, and backward multiplies them by the incoming one. Not
so where rows have factors of their own (reduction="none", stats), or where float16 could flush a small gradient to
zero before a loss scale lifts it: there the logits are made again in backward, and it is four products.

Registered operators, so that torch.compile sees one node each way with the eager memory. Where autograd asks for more
than a gradient, plain torch operations on all of the logits serve.

Operands of the products are in the dtype of `How.operand` on a GPU; elsewhere in that of the logits, which is as exact
and, without matrix units for half precision, faster. A weight of another dtype is cast some classes at a time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference
from .compiled import numbers_of, with_numbers
from .cpu.row_loss import _existing, map_, slope
from .functional import _without_loss, _without_target
from .options import DIFFERENTIABLE, Inputs, Options, Stats, is_given
from .transforms import in_higher_order_backward

SCRATCH = 6  # matrices that the torch operations of cpu/ keep beside the rows they work on
PLAIN = 3  # of them, where no option needs more
PIECE = 1 << 19  # values of those rows, at most
CLASSES = 1024  # of a product on a CPU: their part of the weight stays in the cache, which few rows gain by
NOTHING: frozenset[str] = frozenset()
OF_WIDEST = -1  # max_bytes, until it is known of how many classes the widest slice of a group is


class Head(NamedTuple):
    input: Tensor  # [n_rows or more, n_features] x; the rows beyond those of the target do not count
    weight: Tensor  # [n_cols, n_features] W
    bias: Tensor | None  # [n_cols] b


class How(NamedTuple):
    max_bytes: int  # of a chunk's logits and all that is needed beside them
    valid_rows: int | None  # how many rows count, where the host knows
    accumulator: torch.dtype  # of dW
    operand: torch.dtype


class Gradients(NamedTuple):
    """Of each tensor, or None. As a sequence of bool: which are wanted."""

    input: Any = None
    weight: Any = None
    bias: Any = None
    target: Any = None
    logit_scale: Any = None


class Given(NamedTuple):
    """Incoming gradients."""

    loss: Tensor | None
    stats: Stats


class Sizes(NamedTuple):
    rows: int  # of a chunk
    piece: int  # of them, through the row op at a time
    classes: int  # of the weight, cast at a time


def linear_loss(
    head: Head, inputs: Inputs, options: Options, how: How, names: Sequence[str], wanted: Gradients
) -> tuple[Tensor, Stats]:
    """The loss (of each row [n_rows], or their sum or mean; for ids [n_rows, K] their log-probabilities [n_rows, K]),
    and the stats of these names, in the dtype of the logits. The logits of `inputs` are not read."""
    given, numbers = numbers_of(options, inputs._replace(logits=head.input, logit_scale=None))
    packed = options.ignore_index, options.reduction, given, numbers, *how
    found = list(linear_rows(*head, *inputs[1:], *packed, " ".join(names), list(wanted)))
    return found[0], Stats(**dict(zip(names, found[1:], strict=False)))


def plain_loss(head: Head, inputs: Inputs, options: Options) -> tuple[Tensor, Stats]:
    """The same, all stats, in torch operations that autograd may treat as it likes, on all of the logits."""
    acc, n_rows = _acc(head.input), len(inputs.target)
    z = head.input[:n_rows].to(acc) @ head.weight.to(acc).T
    z = z if head.bias is None else z + head.bias.to(acc)
    inputs = inputs._replace(logits=z)
    if not _is_ids(inputs.target):
        return reference.softmax_xent(inputs, options), reference.row_stats(inputs, options)
    ids, ignored = _existing_ids(inputs.target, z.shape[1], options)
    rows = inputs._replace(target=torch.where(ignored.all(1), -100, 0))
    log_p = torch.log_softmax(reference.logit_map(z, options, inputs.logit_scale), 1)
    return log_p.gather(1, ids).masked_fill(ignored, 0), reference.row_stats(rows, _without_loss(options))


def made_in_forward(head: Head, options: Options, how: How, names: Sequence[str]) -> bool:
    """Whether the gradients are, for the incoming one to multiply."""
    halves = head.input.dtype, head.weight.dtype, how.operand
    return options.reduction != "none" and torch.float16 not in halves and not set(names) & set(DIFFERENTIABLE)


def default_bytes(n_cols: int, weight: Tensor) -> int:
    """As many as the weight's, of so many classes, or 32 MiB, which keeps products large."""
    return max(n_cols * weight.shape[1] * weight.itemsize, 32 << 20)


def _acc(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _is_ids(target: Tensor) -> bool:
    return target.dim() == 2 and not target.is_floating_point()


class Products:
    """The rooms of chunks, in turn, the products with them, and the gradients that these add to."""

    def __init__(
        self, head: Head, how: How, sizes: Sizes, wanted: Gradients, n_rows: int, all_rows: bool, rooms: int = 1
    ) -> None:
        self.head, self.how, self.wanted, self.classes = head, how, wanted, sizes.classes
        x, weight, bias = head
        self.of_logits = min(sizes.classes, CLASSES) if x.device.type == "cpu" else sizes.classes
        self.acc = _acc(x)
        self.operand = how.operand if x.is_cuda else self.acc
        n_cols = len(weight)
        self.rooms = [x.new_empty(sizes.rows, n_cols, dtype=self.acc) for _ in range(rooms)]
        self.bias = None if bias is None else bias.to(self.acc)
        complete = all_rows and n_rows == len(x) and n_cols > 0
        self.dx = (x.new_empty if complete else x.new_zeros)(x.shape) if wanted.input else None
        self.in_place = complete and x.dtype == self.acc
        # Under a logit scale that is learned db is wanted too.
        self.db = (
            x.new_zeros(n_cols, dtype=self.acc) if wanted.bias or (wanted.logit_scale and bias is not None) else None
        )
        self.dw = x.new_empty(weight.shape, dtype=how.accumulator) if wanted.weight else None
        self.dscale = x.new_zeros((), dtype=self.acc) if wanted.logit_scale else None
        self.first = True

    def _blocks(self, step: int, read: bool) -> Any:
        """Some classes at a time, and their rows of the weight as an operand."""
        for start in range(0, len(self.head.weight), step):
            some = slice(start, start + step)
            yield some, self.head.weight[some].to(self.operand) if read else None

    def logits(self, x: Tensor) -> Tensor:
        self.rooms.append(self.rooms.pop(0))
        z = self.rooms[-1][: len(x)]
        for some, w in self._blocks(self.of_logits, read=True):
            out = z[:, some]
            if self.bias is not None:
                out.copy_(self.bias[some])
            _add_product(out, x, w.T, add=self.bias is not None)
            del w
        return z

    def add(self, at: Any, x: Tensor, dz: Tensor) -> None:
        """The gradients of the rows `at`."""
        if len(self.head.weight) == 0:  # of a rank without classes
            return
        if self.db is not None:
            self.db.add_(dz.sum(0))
        dz = dz.to(self.operand)
        if self.dx is not None or self.dscale is not None:
            dx = self.dx[at] if self.in_place and self.dx is not None else x.new_empty(x.shape, dtype=self.acc)
            for some, w in self._blocks(self.classes, read=True):
                _add_product(dx, dz[:, some], w, add=some.start > 0)
                del w
            if self.dscale is not None:
                self.dscale.add_((x.to(self.acc) * dx).sum())
            if self.dx is not None and not self.in_place:
                self.dx[at] = dx.to(self.dx.dtype)
            del dx
        if self.dw is not None:
            self._add_to_weight(self.dw, x, dz)
        self.first = False

    def _add_to_weight(self, dw: Tensor, x: Tensor, dz: Tensor) -> None:
        if dw.dtype in (self.acc, self.operand):
            _add_product(dw, dz.T, x, add=not self.first)
            return
        for some, _ in self._blocks(self.classes, read=False):
            of_some = dz[:, some].T @ x
            dw[some] = of_some if self.first else of_some.add_(dw[some])

    def gradients(self, dtarget: Tensor | None, logit_scale: Tensor | None) -> Gradients:
        self.rooms.clear()
        _, weight, bias = self.head
        dw = self.dw
        if dw is not None:
            dw = (dw.zero_() if self.first else dw).to(weight.dtype)
        dscale = self.dscale
        if dscale is not None:
            assert logit_scale is not None
            if self.bias is not None and self.db is not None:
                dscale = dscale + torch.where(self.bias.isfinite(), self.bias * self.db, 0).sum()
            dscale = (dscale / logit_scale).to(logit_scale.dtype)
        db = self.db.to(bias.dtype) if self.wanted.bias and self.db is not None and bias is not None else None
        return Gradients(self.dx, dw, db, dtarget, dscale)


def _add_product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (+)= a @ b; of half precision into float32 on a GPU."""
    how: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **how)
    else:
        torch.mm(a, b, out=out, **how)


def sizes_of(
    head: Head,
    inputs: Inputs,
    how: How,
    wanted: Gradients,
    count: int,
    gathered: bool,
    n_cols: int | None = None,
    rooms: int = 1,
    beside: int = 0,
    scratch: int = SCRATCH,
) -> Sizes:
    """So that `rooms` chunks take `max_bytes` at most, with all that is allocated for them; as if of n_cols classes.
    beside: bytes of a row, of what else is. scratch: matrices beside the rows that the row op works on, on a CPU."""
    x, weight, bias = head
    max_bytes = how.max_bytes // rooms
    n_features, target = weight.shape[1], inputs.target
    n_cols = len(weight) if n_cols is None else n_cols
    wide = _acc(x).itemsize
    operand = how.operand.itemsize if x.is_cuda else wide
    row = beside + n_cols * wide + 2 * n_features * wide + (n_cols + n_features) * operand * (operand < wide)
    piece = 0
    if target.is_floating_point():  # stats have logits of their own beside probabilities
        piece = n_cols * (target.itemsize * (gathered + bool(wanted.target)) + wide)
    if dispatch.uses_kernels(x):
        row, piece = row + piece, 0
    else:
        piece += scratch * n_cols * wide
    cast = weight.dtype != (how.operand if x.is_cuda else _acc(x)) or (wanted.weight and how.accumulator != _acc(x))
    by_class = 2 * n_features * wide if cast else 0  # its share of W or of dW, and what is added to that
    always = n_cols * wide * (3 * (bias is not None) + (inputs.weight is not None))  # float32, and db of a chunk
    least = always + row + max(piece, by_class)
    if max_bytes < least:
        needed = f"{rooms * least}: {n_cols} classes"
        raise ValueError(f"max_logits_bytes={how.max_bytes} is less than one row needs, {needed}")
    share = max_bytes // 8
    some = min(max(1, share // piece), max(1, PIECE // n_cols)) if piece else count
    classes = min(n_cols, max(1, share // by_class)) if cast else n_cols
    rows = (max_bytes - always - max(some * piece, classes * by_class)) // row
    if rows < 1:
        rows, some, classes = 1, 1, 1 if cast else n_cols
    chunks = max(1, math.ceil(count / rows))
    rows = max(1, math.ceil(count / chunks))  # all chunks alike
    return Sizes(rows, min(some, rows), max(1, classes))


def _run(
    head: Head,
    inputs: Inputs,
    options: Options,
    how: How,
    names: Sequence[str],
    wanted: Gradients,
    given: Given | None,
    later: Gradients | None = None,
) -> tuple[Tensor | None, Stats, Gradients]:
    """The loss, the stats and the gradients that are wanted, of `given`: of the loss itself if it is None.

    later: those that backward will want, for which the bytes have to suffice too.
    """
    if given is None:
        check_exist(inputs, len(head.weight), options, len(head.input) - len(inputs.target))
    rows, inputs = that_count(inputs, options, how.valid_rows)
    target, acc = inputs.target, _acc(head.input)
    n_rows = len(target)
    count = n_rows if rows is None else len(rows)
    scratch = _scratch(inputs, options)
    sizes = sizes_of(head, inputs, how, later or wanted, count, rows is not None, scratch=scratch)
    products = Products(head, how, sizes, wanted, n_rows, rows is None)
    loss, stats = None, Stats()
    if given is None:
        shape = target.shape if _is_ids(target) else (n_rows,) if options.reduction == "none" else ()
        loss = target.new_zeros(shape, dtype=acc)
        stats = Stats(**dict(zip(names, empty_rows(names, target, acc), strict=True)))
        if options.reduction == "mean" and inputs.normalizer is not None and count == 0:
            loss = loss / inputs.normalizer[0]
    dtarget = target.new_zeros(target.shape) if wanted.target else None
    for start in range(0, count, sizes.rows):
        at: Any = slice(start, min(count, start + sizes.rows))
        at = at if rows is None else rows[at]
        x = head.input[at].to(products.operand)
        z = products.logits(x)
        for first in range(0, len(z), sizes.piece):
            of_z = z[first : first + sizes.piece]
            some: Any = slice(start + first, start + first + len(of_z))
            some = some if rows is None else rows[some]
            part = of_rows(inputs, some)._replace(logits=of_z)
            if given is None:
                assert loss is not None
                of_loss, of_stats, of_target = _forward(part, options, frozenset(names), wanted)
                if loss.dim():
                    loss[some] = of_loss
                else:
                    loss += of_loss
                for out, found in zip(stats, of_stats, strict=True):
                    if out is not None and found is not None:
                        out[some] = found
            else:
                of_target = _backward(part, options, _taken(given, some), wanted)
            if dtarget is not None and of_target is not None:
                dtarget[some] = of_target
            del part, of_target
        if any(wanted):
            products.add(at, x, z)
        del x, z, of_z
    return loss, stats, products.gradients(dtarget, inputs.logit_scale)


def _scratch(inputs: Inputs, options: Options) -> int:
    weighed = inputs.weight is not None and is_given(options.label_smoothing)
    return SCRATCH if weighed or inputs.target.is_floating_point() else PLAIN


def empty_rows(names: Sequence[str], target: Tensor, acc: torch.dtype) -> list[Tensor]:
    """As rows have them that do not count."""
    n_rows = target.shape[0]  # len() of a symbol would be compiled in
    whole = {"prediction": torch.int64}
    return [target.new_full((n_rows,), -1 if name in whole else 0, dtype=whole.get(name, acc)) for name in names]


def of_rows(inputs: Inputs, at: Any) -> Inputs:
    """What there is of these rows beside logits."""
    v = inputs.sample_weight
    return inputs._replace(target=inputs.target[at], sample_weight=None if v is None else v[at])


def _taken(given: Given, at: Any) -> Given:
    loss = given.loss if given.loss is None or given.loss.dim() == 0 else given.loss[at]
    return Given(loss, Stats(*(None if x is None else x[at] for x in given.stats)))


def that_count(inputs: Inputs, options: Options, valid_rows: int | None) -> tuple[Tensor | None, Inputs]:
    """The rows that are not ignored and not of weight 0, in order; None for all. A GPU is not waited for: there it is
    the caller who knows how many, and a wrong number makes NaN."""
    target, v = inputs.target, inputs.sample_weight
    masks = [] if v is None else [v != 0]
    if not target.is_floating_point():
        kept = target.long() != options.ignore_index
        masks.append(kept.any(1) if _is_ids(target) else kept)
    if not masks:
        return None, inputs
    counted = torch.stack(masks).all(0)
    if _may_wait(target):
        count = int(counted.sum())
        if valid_rows is not None and count > valid_rows:
            raise ValueError(f"valid_rows={valid_rows}, but {count} rows count")
        return None if count == len(counted) else counted.nonzero()[:, 0], inputs
    if valid_rows is None:
        return None, inputs
    more = counted.sum() > valid_rows
    if target.is_floating_point():
        assert v is not None
        inputs = inputs._replace(sample_weight=torch.where(more, float("nan"), v))
    else:  # no class: a loss of NaN
        inputs = inputs._replace(target=torch.where(more, torch.iinfo(torch.int64).max, target.long()))
    return torch.argsort(counted, stable=True, descending=True)[: max(1, valid_rows)], inputs  # one, to be NaN


def check_exist(inputs: Inputs, n_cols: int, options: Options, first: int) -> None:
    """Raises IndexError before anything is made; the kernels have NaN instead. first: rows of the caller's before."""
    target = inputs.target
    if target.is_floating_point() or dispatch.uses_kernels(target) or target.numel() == 0:
        return
    for y in target.T if _is_ids(target) else (target,):
        _existing(y, n_cols, options.ignore_index, first)


def _may_wait(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _existing_ids(ids: Tensor, n_cols: int, options: Options) -> tuple[Tensor, Tensor]:
    ids = ids.long()
    return ids.clamp(0, n_cols - 1), ids == options.ignore_index


def _forward(
    inputs: Inputs, options: Options, names: frozenset[str], wanted: Gradients
) -> tuple[Tensor, Stats, Tensor | None]:
    """Loss, stats, and the gradient of probabilities; that of the logits goes over them."""
    acc = inputs.logits.dtype
    if _is_ids(inputs.target):
        return *_logprobs(inputs, options, names), None
    stats = Stats()
    if names and inputs.target.is_floating_point():
        rows, alone = _without_target(inputs), _without_loss(options)
        module = dispatch.implementation(inputs.logits, rows.target)
        _, stats, _ = module.forward(rows, alone, acc, False, False, names)
        names = NOTHING
    module = dispatch.implementation(inputs.logits, inputs.target)
    now = any(wanted) and not wanted.target
    loss, found, kept = module.forward(inputs, options, acc, now, True, names)
    dtarget = None
    if any(wanted) and kept[0] is None:
        one = loss.new_ones(())
        _, dtarget = module.backward(one, Stats(), inputs, options, kept, True, True, wanted.target)
    return loss, found if names else stats, dtarget


def _backward(inputs: Inputs, options: Options, given: Given, wanted: Gradients) -> Tensor | None:
    """The gradient of probabilities; that of the logits goes over them."""
    z, (dloss, dstats) = inputs.logits, given
    if _is_ids(inputs.target):
        _gradient_of_logprobs(inputs, options, given)
        return None
    none = torch.zeros((), dtype=z.dtype, device=z.device).expand(len(z))
    if dloss is None:
        dloss = none
        inputs, options = inputs._replace(normalizer=None), options._replace(reduction="none")
    also = None
    if inputs.target.is_floating_point() and any(x is not None for x in dstats):
        rows, alone = _without_target(inputs), _without_loss(options)
        module = dispatch.implementation(z, rows.target)
        also, _ = module.backward(none, dstats, rows, alone, [None] * 3, False, True, False)
        dstats = Stats()
    module = dispatch.implementation(z, inputs.target)
    dz, dtarget = module.backward(dloss, dstats, inputs, options, [None] * 3, True, True, bool(wanted.target))
    if also is not None:
        dz += also
    return dtarget  # type: ignore[no-any-return]


def _logprobs(inputs: Inputs, options: Options, names: frozenset[str]) -> tuple[Tensor, Stats]:
    """log p_k = (z_k - m) + log p_max of each id k: exact where the model is confident of the largest."""
    logits, n_cols = inputs.logits, inputs.logits.shape[1]
    ids, ignored = _existing_ids(inputs.target, n_cols, options)
    missing = _missing(inputs, ignored)
    largest = logits.argmax(1, keepdim=True)
    z, m = (map_(logits.gather(1, k), inputs, options) for k in (ids, largest))
    rows = inputs._replace(target=largest[:, 0].masked_fill(missing, n_cols).masked_fill(ignored.all(1), -100))
    module = dispatch.implementation(logits, rows.target)
    alone = _without_loss(options)
    _, stats, _ = module.forward(rows, alone, logits.dtype, False, True, names | {"target_logprob"})
    found = ((z - m) + stats.target_logprob[:, None]).masked_fill_(ignored, 0)
    return found, Stats(**{name: getattr(stats, name) for name in names})


def _missing(inputs: Inputs, ignored: Tensor) -> Tensor:
    """Tokens of which an id does not exist: the kernels have NaN for all of such a token."""
    ids = inputs.target
    missing: Tensor = ((ids < 0) | (ids >= inputs.logits.shape[1])) & ~ignored
    return missing.any(1)


def _gradient_of_logprobs(inputs: Inputs, options: Options, given: Given) -> None:
    """d log p_k / dz_j = [j == k] - p_j, and -p_j is what -lse gives."""
    logits, (dlogprobs, dstats) = inputs.logits, given
    ids, ignored = _existing_ids(inputs.target, logits.shape[1], options)
    dx = None
    if dlogprobs is not None:
        g = dlogprobs.masked_fill(ignored, 0)
        dx = g * slope(logits.gather(1, ids), inputs, options)
        dstats = dstats._replace(lse=-g.sum(1))
    one = ids[:, 0].masked_fill(_missing(inputs, ignored), logits.shape[1])
    rows = inputs._replace(target=one.masked_fill(ignored.all(1), -100))
    module = dispatch.implementation(logits, rows.target)
    none = torch.zeros((), dtype=logits.dtype, device=logits.device).expand(len(logits))
    dz, _ = module.backward(none, dstats, rows, _without_loss(options), [None] * 3, True, True, False)
    if dx is not None:
        if dispatch.uses_kernels(dz):  # a GPU's scatter_add_ takes what a token has of an id twice in any order
            rows_of = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
            dz.index_put_((rows_of, ids), dx, accumulate=True)
        else:
            dz.scatter_add_(1, ids, dx)


# As operators. Their arguments: of Head, of Inputs but for the logits, of Options, of How, names of stats, Gradients.


def _unpacked(tensors: Sequence[Any], packed: Sequence[Any]) -> tuple[Head, Inputs, Options, How]:
    ignore_index, reduction, given, numbers, *how = packed
    inputs = Inputs(tensors[0], *tensors[3:])
    return Head(*tensors[:3]), *with_numbers(inputs, Options(ignore_index, reduction), given, numbers), How(*how)


@torch.library.custom_op("softxent::linear_rows", mutates_args=())
def linear_rows(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    logit_scale: Tensor | None,
    ignore_index: int,
    reduction: str,
    given: str,
    numbers: list[Tensor],
    max_bytes: int,
    valid_rows: int | None,
    accumulator: torch.dtype,
    operand: torch.dtype,
    names: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The loss, the stats of these names, and the gradients that are wanted, if they are made now."""
    tensors = input, linear_weight, linear_bias, target, weight, sample_weight, normalizer, logit_scale
    packed = ignore_index, reduction, given, numbers, max_bytes, valid_rows, accumulator, operand
    head, inputs, options, how = _unpacked(tensors, packed)
    found, now, later = names.split(), Gradients(*wanted), None
    if not made_in_forward(head, options, how, found):
        now, later = Gradients(), now
    with torch.autocast(input.device.type, enabled=False):
        loss, stats, gradients = _run(head, inputs, options, how, found, now, None, later)
    assert loss is not None
    return [loss, *(getattr(stats, name) for name in found), *(x for x in gradients if x is not None)]


@linear_rows.register_fake
def _(*arguments: Any) -> list[Tensor]:
    head, inputs, how = Head(*arguments[:3]), Inputs(arguments[0], *arguments[3:8]), How(*arguments[12:16])
    reduction, names, wanted, target, acc = arguments[9], *arguments[16:], inputs.target, _acc(head.input)
    shape = target.shape if _is_ids(target) else target.shape[:1] if reduction == "none" else ()
    found = [target.new_empty(shape, dtype=acc), *empty_rows(names.split(), target, acc)]
    if made_in_forward(head, Options(reduction=reduction), how, names.split()):
        found += _like(head, inputs, wanted)
    return found


def _like(head: Head, inputs: Inputs, wanted: Sequence[bool]) -> list[Tensor]:
    of = *head, inputs.target, inputs.logit_scale
    return [x.new_empty(x.shape) for x, is_wanted in zip(of, wanted, strict=True) if is_wanted and x is not None]


@torch.library.custom_op("softxent::linear_rows_backward", mutates_args=())
def linear_rows_backward(
    dloss: Tensor | None,
    dstats: list[Tensor],
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    logit_scale: Tensor | None,
    ignore_index: int,
    reduction: str,
    given: str,
    numbers: list[Tensor],
    max_bytes: int,
    valid_rows: int | None,
    accumulator: torch.dtype,
    operand: torch.dtype,
    names: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are wanted, from those of the loss and of the stats of these names."""
    tensors = input, linear_weight, linear_bias, target, weight, sample_weight, normalizer, logit_scale
    packed = ignore_index, reduction, given, numbers, max_bytes, valid_rows, accumulator, operand
    head, inputs, options, how = _unpacked(tensors, packed)
    incoming = Given(dloss, Stats(**dict(zip(names.split(), dstats, strict=True))))
    with torch.autocast(input.device.type, enabled=False):
        *_, gradients = _run(head, inputs, options, how, (), Gradients(*wanted), incoming)
    return [x for x in gradients if x is not None]


@linear_rows_backward.register_fake
def _(dloss: Any, dstats: Any, *arguments: Any) -> list[Tensor]:
    return _like(Head(*arguments[:3]), Inputs(arguments[0], *arguments[3:8]), arguments[17])


@torch.library.custom_op("softxent::times_", mutates_args={"gradients"})
def times_(gradients: list[Tensor], factor: Tensor) -> None:
    """Nothing at all where the factor is 1. What is 0 stays so, whatever the factor."""
    for x in gradients:
        if x.numel() == 0:
            continue
        if dispatch.uses_kernels(x):
            dispatch.kernel_module("rows").scaled(factor, [x.view(1, -1), None], False)
        elif (number := factor.item()) != 1:
            x.mul_(number) if math.isfinite(number) else x.copy_(torch.where(x == 0, 0, x * number))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, packed, (ctx.names, wanted) = inputs[:8], list(inputs[8:16]), inputs[16:]
    made = [x.detach() for x in output[1 + len(ctx.names.split()) :]]
    ctx.wanted, ctx.made = Gradients(*wanted), made
    ctx.at_once = bool(made)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *packed[3])
    ctx.n_numbers, packed[3] = len(packed[3]), None
    ctx.packed = packed


def _saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """Tensors, and what is packed."""
    saved = list(ctx.saved_tensors)
    return saved[:8], [*ctx.packed[:3], saved[8:], *ctx.packed[4:]]


def _gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    names = ctx.names.split()
    dloss, dstats = grads[0], Stats(**dict(zip(names, grads[1:], strict=False)))._replace(prediction=None)
    given = [x for x in (dloss, *dstats) if x is not None]
    if not given:
        return _placed(Gradients(), ctx)
    if not torch.compiler.is_compiling() and any(in_higher_order_backward(x) for x in given):
        return _placed(_by_torch(ctx, dloss, dstats), ctx)
    made, ctx.made = ctx.made, []
    if ctx.at_once:
        if not made:
            tensors, packed = _saved(ctx)
            made = linear_rows(*tensors, *packed, ctx.names, list(ctx.wanted))[1 + len(names) :]
        times_(made, dloss)
    else:
        tensors, packed = _saved(ctx)
        of = [name for name in names if getattr(dstats, name) is not None]
        made = linear_rows_backward(
            dloss,
            [getattr(dstats, name) for name in of],
            *tensors,
            *packed,
            " ".join(of),
            list(ctx.wanted),
        )
    found = iter(made)
    return _placed(Gradients(*(next(found) if is_wanted else None for is_wanted in ctx.wanted)), ctx)


def _placed(of: Gradients, ctx: Any) -> tuple[Any, ...]:
    """One for each argument."""
    return *of[:4], None, None, None, of.logit_scale, None, None, None, [None] * ctx.n_numbers, *[None] * 6


def _by_torch(ctx: Any, dloss: Tensor | None, dstats: Stats) -> Gradients:
    """By plain operations on all of the logits, which may be recorded or batched."""
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        saved, packed = _saved(ctx)
        tensors = [None if x is None else x.view_as(x) for x in saved]  # or their hooks would run here too
        head, inputs, options, _ = _unpacked(tensors, packed)
        loss, stats = plain_loss(head, inputs, options)
    pairs = [(loss, dloss), *zip(stats, dstats, strict=True)]
    used = [(y, dy) for y, dy in pairs if y is not None and y.requires_grad and dy is not None]
    outputs, given = [y for y, _ in used], [dy.to(y.dtype) for y, dy in used]
    of = *tensors[:4], inputs.logit_scale
    leaves: list[Any] = [x for x, is_wanted in zip(of, ctx.wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(outputs, leaves, given, create_graph=record, allow_unused=True))
    return Gradients(*[next(found) if is_wanted else None for is_wanted in ctx.wanted])


linear_rows.register_autograd(_gradient, setup_context=_keep)

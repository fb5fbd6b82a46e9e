"""Cross-entropy of each row of logits against its target class, in torch operations.

The mathematics of triton_kernels/formula.py, where c and a are defined, arranged for what torch does fast. With
p = softmax(z) and target y:

    miss       = sum_{j != y} p_j             1 - p_y without the subtraction
    -log p_y   = log1p(miss / p_y)            exact at both ends
    dloss/dz_j =  a * p_j  - c_j              j != y
    dloss/dz_y = eps / n_cols * (sum_k w_k * p_y - w_y) - (1 - eps) * w_y * miss
    log d      = -log p_k                     z_k = m the largest, d = sum_j exp(z_j - m)
    lse        = m + log d
    smoothing  = sum_j w_j * log d + sum_j w_j * (m - z_j)                    the sum of w_j * -log p_j
    entropy    = sum_{j != k} -p_j * log p_j + p_k * log1p(rest / p_k)        rest = sum_{j != k} p_j
    dentropy/dz_j = -p_j * (log p_j + entropy)                                j != k
    dentropy/dz_k = p_k * (log1p(rest / p_k) * rest - sum_{j != k} -p_j * log p_j)

Forward leaves the gradient, with the mean's 1 / n in it, in the buffer that becomes dlogits, and the first backward
pass multiplies it by the incoming gradient unless that is 1: one softmax a step, and no second matrix. It is computed
again in any later backward pass on the same graph, and for float16, which could flush it to zero before a loss scale
lifts it, and for bfloat16 where each row has a factor of its own. Half precision goes through a float32 scratch of some
rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..normalizer import normalizer
from ..options import NO_STATS, Inputs, Options, Stats, empty_stats

CHUNK = 1 << 19  # values in the scratch: 2 MiB of float32
FEW = 64  # classes
LARGEST = {dtype: -math.log(8 * torch.finfo(dtype).tiny) for dtype in (torch.float32, torch.float64)}  # -log p normal


def forward(
    inputs: Inputs, options: Options, dtype: torch.dtype, needs_grad: bool, inplace: bool, wanted: frozenset[str]
) -> tuple[Tensor, Stats, list[Tensor | None]]:
    """The loss in `dtype`, the stats, and what `backward` wants: its gradient, where that is worth keeping.

    Raises IndexError for a target that is neither `ignore_index` nor in [0, n_cols).
    """
    inputs = _computed(inputs)
    logits, reduction = inputs.logits, options.reduction
    rows = _Rows(inputs, options, *_classes(inputs, options))
    factor = _factor(rows)
    now = needs_grad and _survives_a_factor(logits, reduction)
    dlogits = _gradient_like(logits, inplace) if now else None
    stats = empty_stats(wanted, logits) if wanted else NO_STATS
    loss = _in_chunks(rows, dlogits, _times(factor, inputs.sample_weight), stats, NO_STATS)
    if inputs.sample_weight is not None:
        loss = loss * inputs.sample_weight
    if reduction != "none":
        loss = loss.sum()
    loss = loss if factor is None else loss.mul_(factor)
    return loss.to(dtype, copy=reduction == "none"), stats, [dlogits, None, rows.skipped]  # a view may not be edited


def backward(
    dloss: Tensor,  # () or, for reduction="none", [n_rows]
    dstats: Stats,
    inputs: Inputs,
    options: Options,
    kept: list[Tensor | None],
    inplace: bool,
    needs_dlogits: bool,
    needs_dtarget: bool,
) -> tuple[Tensor, None]:
    """The gradient of the logits, in their dtype, made anew. None of classes."""
    (dlogits, *_), kept[0] = kept, None
    inputs = _computed(inputs)
    logits = inputs.logits
    rows = _Rows(inputs, options, *_classes(inputs, options))
    scale = _times(_factor(rows), inputs.sample_weight)
    if dlogits is None:
        dlogits = _gradient_like(logits, inplace)
    if any(x is not None for x in dstats) or not _survives_a_factor(logits, options.reduction):
        acc = torch.promote_types(logits.dtype, torch.float32)
        _in_chunks(rows, dlogits, _times(scale, dloss.to(acc)), NO_STATS, dstats)
        return dlogits, None
    _in_chunks(rows, dlogits, scale, NO_STATS, NO_STATS)  # that of `forward`, bit for bit
    return scaled(dloss, [dlogits, None, rows.skipped], inplace)


def scaled(dloss: Tensor, kept: list[Tensor | None], inplace: bool) -> tuple[Tensor, None]:
    """The gradient of the logits that `forward` left, times the incoming one."""
    (dlogits, _, skipped), kept[0] = kept, None
    assert dlogits is not None
    dloss = dloss.to(torch.promote_types(dlogits.dtype, torch.float32))
    if dloss.dim() == 0:
        factor = dloss.item()
        # Rows that do not count are 0 already, and stay so: 0 * inf is NaN.
        if factor == 1:
            return dlogits, None
        return _rows_times(dlogits, dloss, None if math.isfinite(factor) else skipped), None
    return _rows_times(dlogits, dloss[:, None], skipped), None


def _computed(inputs: Inputs) -> Inputs:
    """With weights in the dtype that the logits are computed in."""
    if inputs.weight is None and inputs.sample_weight is None:
        return inputs
    acc = torch.promote_types(inputs.logits.dtype, torch.float32)
    weight, sample_weight = (None if x is None else x.to(acc) for x in (inputs.weight, inputs.sample_weight))
    return inputs._replace(weight=weight, sample_weight=sample_weight)


class _Rows(NamedTuple):
    """Some of the rows of a call, with `part`."""

    inputs: Inputs
    options: Options
    y: Tensor  # [n_rows] int64
    skipped: Tensor | None  # [n_rows] bool: rows that do not count; None for none

    def part(self, part: slice) -> "_Rows":
        inputs = self.inputs._replace(logits=self.inputs.logits[part])
        return self._replace(
            inputs=inputs, y=self.y[part], skipped=None if self.skipped is None else self.skipped[part]
        )

    @property
    def mapped(self) -> bool:
        return self.options.maps(self.inputs)

    def z(self, logits: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """In a new tensor or in `out`; the logits themselves where there is nothing to do."""
        if not self.mapped:
            return logits.to(dtype) if out is None else out.copy_(logits)
        z = logits.to(dtype, copy=True) if out is None else out.copy_(logits)
        return map_(z, self.inputs, self.options)


def _gradient_like(logits: Tensor, inplace: bool) -> Tensor:
    return logits.detach() if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)


def _survives_a_factor(logits: Tensor, reduction: str) -> bool:
    """Whether the gradient may be rounded to the dtype of the logits before the incoming gradient multiplies it."""
    return logits.itemsize >= 4 or (logits.dtype == torch.bfloat16 and reduction != "none")


def _factor(rows: _Rows) -> Tensor | float | None:
    """1 / n for the mean; None where there is none."""
    inputs, options = rows.inputs, rows.options
    if options.reduction != "mean":
        return None
    if inputs.normalizer is not None:
        return 1 / inputs.normalizer[0]
    if rows.skipped is None and inputs.weight is None:
        return 1 / inputs.logits.shape[0]
    acc = torch.promote_types(inputs.logits.dtype, torch.float32)
    return 1 / normalizer(inputs.target, inputs.weight, options.ignore_index, acc).to(acc)


def _times(factor: Tensor | float | None, rows: Tensor | None) -> Tensor | float | None:
    if factor is None or rows is None:
        return rows if factor is None else factor
    return factor * rows


def _rows_times(dlogits: Tensor, scale: Tensor, skipped: Tensor | None) -> Tensor:
    return dlogits.mul_(scale if skipped is None else torch.where(skipped[:, None], 0, scale))


def _in_chunks(
    rows: _Rows,
    dlogits: Tensor | None,  # [n_rows, n_cols] out; may be the logits
    scale: Tensor | float | None,  # of the gradient of the loss: [n_rows], a number, or None: 1
    stats: Stats,  # out
    dstats: Stats,
) -> Tensor:
    """The loss of each row, unscaled, and the gradient, of the loss times `scale` and of the stats, in `dlogits`."""
    logits = rows.inputs.logits
    n_rows, n_cols = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    direct = dlogits is not None and dlogits.dtype == acc and dlogits.data_ptr() != logits.data_ptr()
    weighed = rows.inputs.weight is not None and bool(rows.options.label_smoothing)
    temporaries = rows.mapped or weighed or stats.entropy is not None or dstats.entropy is not None
    if rows.skipped is not None and all(x is None for x in (*stats, *dstats)):
        n_skipped = int(rows.skipped.sum())
        if n_skipped > n_rows // 8:
            return _of_the_others(rows, dlogits, scale, n_rows - n_skipped)
    step = n_rows if direct and not temporaries else min(n_rows, max(1, CHUNK // n_cols))
    if n_rows <= step:
        return _step(rows, dlogits, scale, stats, dstats, dlogits if direct else None)
    scratch = None if direct else logits.new_empty(step, n_cols, dtype=acc)
    losses = []
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        some = rows.part(part)
        out = None if dlogits is None else dlogits[part]
        p = out if scratch is None else scratch[: len(some.y)]
        assert p is not None
        losses.append(
            _step(
                some,
                out,
                scale[part] if isinstance(scale, Tensor) and scale.dim() else scale,
                Stats(*(None if x is None else x[part] for x in stats)),
                Stats(*(None if x is None else x[part] for x in dstats)),
                p,
            )
        )
    return torch.cat(losses)


def _of_the_others(rows: _Rows, dlogits: Tensor | None, scale: Tensor | float | None, n_counted: int) -> Tensor:
    """`_in_chunks` where many rows are skipped, which are not read then: the others go side by side."""
    logits, skipped = rows.inputs.logits, rows.skipped
    assert skipped is not None
    n_rows, n_cols = logits.shape
    acc = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_zeros(n_rows, dtype=acc)
    counted = (~skipped).nonzero()[:, 0]
    step = max(1, CHUNK // max(1, n_cols))
    scratch = logits.new_empty(min(step, n_counted), n_cols, dtype=acc)
    for some in counted.split(step) if n_counted else ():
        inputs = rows.inputs._replace(logits=logits[some])
        part = rows._replace(inputs=inputs, y=rows.y[some], skipped=None)
        p = scratch[: len(some)]
        of_some = scale[some] if isinstance(scale, Tensor) and scale.dim() else scale
        loss[some] = _step(part, None if dlogits is None else p, of_some, NO_STATS, NO_STATS, p)
        if dlogits is not None:
            dlogits[some] = p.to(dlogits.dtype)
    if dlogits is not None:
        dlogits.index_fill_(0, skipped.nonzero()[:, 0], 0)
    return loss


def _step(
    rows: _Rows,
    dlogits: Tensor | None,
    scale: Tensor | float | None,
    stats: Stats,
    dstats: Stats,
    p: Tensor | None,  # scratch in the dtype of the computation, or dlogits itself
) -> Tensor:
    inputs, options, y, skipped = rows
    logits, n_cols = inputs.logits, inputs.logits.shape[1]
    w = inputs.weight
    eps, y = float(options.label_smoothing), y[:, None]
    acc = torch.promote_types(logits.dtype, torch.float32)
    z = logits
    if rows.mapped or logits.dtype != acc:
        z = p = rows.z(logits, acc, p)
    k = m = gap = None
    of_entropy = stats.entropy is not None or dstats.entropy is not None
    if stats.prediction is not None or of_entropy:
        k = z.argmax(1, keepdim=True)  # as slow as a softmax, amax ten times faster
        m = z.gather(1, k)
    elif eps or options.z_loss or stats.lse is not None:
        m = z.amax(1, keepdim=True)
    if eps:
        assert m is not None
        z = p = z - m if p is None else torch.sub(z, m, out=p)
        gap = sum_rows(z if w is None else torch.where(w == 0, 0, z * w)).neg_()
    p = torch.softmax(z, 1) if p is None else torch.softmax(z, 1, out=p)
    p_k = None if m is None else p.amax(1, keepdim=True) if k is None else p.gather(1, k)
    p_y = p.gather(1, y)
    entropy = _entropy(p, k, p_k) if of_entropy and k is not None and p_k is not None else None
    miss = sum_rows(p.scatter_(1, y, 0))
    nll = _minus_log(p_y, miss, rows, y)
    # torch's softmax of a long row sums to 1 only to some 50 roundings.
    d = None if n_cols <= FEW else p_y + miss
    lse = log_d = None
    if m is not None and p_k is not None:
        log_d = (p_k if d is None else p_k / d).log().neg_()
        lse = m + log_d

    w_y: Tensor | float = 1.0
    loss = nll
    if w is not None:
        w_y = w[y]
        loss = torch.where(w_y == 0, miss * 0, nll * w_y)  # miss * 0: still NaN where there is no softmax
    if eps:
        assert log_d is not None and gap is not None
        smooth = gap.add_(log_d * (n_cols if w is None else w.sum())).mul_(eps / n_cols)
        loss = smooth if eps == 1 else smooth.add_(loss, alpha=1 - eps)
    if options.z_loss:
        assert lse is not None
        z_loss = options.z_loss * w_y * lse * lse
        loss = loss + (torch.where(w_y == 0, 0, z_loss) if isinstance(w_y, Tensor) else z_loss)
    if skipped is not None:
        loss = loss.masked_fill(skipped[:, None], 0)
    if stats is not NO_STATS:
        _write_stats(stats, skipped, lse, None if entropy is None else entropy.value, nll, k)
    if dlogits is None:
        return loss[:, 0]

    scale = 1.0 if scale is None else scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale
    per_d: Tensor | float = 1.0 if d is None else d.reciprocal()
    if eps or options.z_loss or any(x is not None for x in dstats):
        _gradient(p, y, p_y, miss, per_d, w, w_y, scale, lse, entropy, options, dstats)
    else:
        p.scatter_(1, y, miss.neg_())
        factor = per_d * w_y * scale
        if isinstance(factor, Tensor) or factor != 1:
            p.mul_(factor)
    if rows.mapped:
        p.mul_(slope(logits.to(p.dtype), inputs, options))
    if skipped is not None:
        p.masked_fill_(skipped[:, None], 0)
    if p.data_ptr() != dlogits.data_ptr():
        dlogits.copy_(p)
    return loss[:, 0]


def _gradient(
    p: Tensor,  # softmax but for 0 at the target, times d
    y: Tensor,
    p_y: Tensor,
    miss: Tensor,
    per_d: Tensor | float,
    w: Tensor | None,
    w_y: Tensor | float,
    scale: Tensor | float,
    lse: Tensor | None,
    entropy: "_Entropy | None",
    options: Options,
    dstats: Stats,
) -> None:
    """p becomes dloss/dz: of the loss with label smoothing and z-loss, times `scale`, and of the stats."""
    eps, n_cols = options.label_smoothing, p.shape[1]
    hard = scale * ((1 - eps) * w_y)  # of p_j - [j == y]
    share = scale * (eps / n_cols)  # of -w_j
    soft = share * (n_cols if w is None else w.sum())  # of p_j
    if options.z_loss:
        assert lse is not None
        soft = soft + scale * (2 * options.z_loss * w_y * lse)
    if dstats.lse is not None:
        soft = soft + dstats.lse[:, None].to(p.dtype)
    if dstats.target_logprob is not None:
        hard = hard - dstats.target_logprob[:, None].to(p.dtype)
    at_target = per_d * (p_y * soft - miss * hard) - share * w_y
    if dstats.entropy is None:
        p.mul_(per_d * (hard + soft))
    else:
        assert entropy is not None
        value, k, at_k = entropy
        g = dstats.entropy[:, None].to(p.dtype)
        p_y = p_y * per_d
        at_target = at_target + g * torch.where(y == k, at_k, torch.special.entr(p_y) - p_y * value)
        p.mul_(per_d)
        p_k = p.gather(1, k)
        surprise = torch.special.entr(p).mul_(g)
        p.mul_(hard + soft - g * value).add_(surprise)
        p.scatter_(1, k, p_k * (hard + soft) + g * at_k)
    if eps:
        p.sub_(share if w is None else share * w)
    p.scatter_(1, y, at_target)


def map_(x: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """softcap * tanh(logit_scale * x / softcap), in place."""
    scale: Tensor | float = options.logit_scale
    if inputs.logit_scale is not None:
        scale = inputs.logit_scale.to(x.dtype)
        scale = torch.where(scale > 0, scale, float("nan"))
    if options.softcap is None:
        return x.mul_(scale)
    x = x if isinstance(scale, float) and scale == 1 else x.mul_(scale)
    return x.div_(options.softcap).tanh_().mul_(options.softcap)


def slope(x: Tensor, inputs: Inputs, options: Options) -> Tensor | float:
    """dz/dx: logit_scale / cosh^2(u) = logit_scale * 4 * s * (1 - s),    u = logit_scale * x / cap, s = sigmoid(-2|u|)

    torch's cosh has other bits in the last values of a vector than in the others: a row's would depend on its batch.
    """
    logit_scale = inputs.logit_scale
    scale = options.logit_scale if logit_scale is None else logit_scale.to(x.dtype)
    if options.softcap is None:
        return scale
    s = (x * (2 * scale / options.softcap)).abs_().exp_().add_(1).reciprocal_()
    return s.addcmul_(s, s, value=-1).mul_(4 * scale)


class _Entropy(NamedTuple):
    value: Tensor  # [n_rows, 1]
    k: Tensor  # [n_rows, 1] the largest's column
    at_k: Tensor  # [n_rows, 1] its gradient there: the only one that is a small difference of large numbers


def _entropy(p: Tensor, k: Tensor, p_k: Tensor) -> _Entropy:
    """Of p, which need not sum to 1. The largest apart: where a row is confident, log p_k has no digits left."""
    p.scatter_(1, k, 0)
    rest = sum_rows(p)
    d = p_k + rest
    surprise = (sum_rows(torch.special.entr(p)) + rest * d.log()) / d
    p.scatter_(1, k, p_k)
    log_k, p_k = (rest / p_k).log1p(), p_k / d
    return _Entropy(p_k * log_k + surprise, k, p_k * (log_k * (rest / d) - surprise))


def _write_stats(
    stats: Stats, skipped: Tensor | None, lse: Tensor | None, entropy: Tensor | None, nll: Tensor, k: Tensor | None
) -> None:
    for name, value in (("lse", lse), ("entropy", entropy), ("target_logprob", nll)):
        out = getattr(stats, name)
        if out is not None:
            assert value is not None
            value = value[:, 0].neg() if name == "target_logprob" else value[:, 0]
            out.copy_(value if skipped is None else value.masked_fill(skipped, 0))
    if stats.prediction is not None:
        assert k is not None
        none = nll[:, 0].isnan() if skipped is None else nll[:, 0].isnan() | skipped
        stats.prediction.copy_(k[:, 0].masked_fill(none, -1))


def _classes(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor | None]:
    """The target as int64 classes that exist, and which rows do not count: None for none."""
    y, ignored = _existing(inputs.target, inputs.logits.shape[1], options.ignore_index)
    if inputs.sample_weight is not None:
        zero = inputs.sample_weight == 0
        ignored = zero if ignored is None else ignored | zero
    return y, ignored


def _existing(target: Tensor, n_cols: int, ignore_index: int, first: int = 0) -> tuple[Tensor, Tensor | None]:
    """The target as int64 classes that exist, and where it is ignored: None where no row is. first: the number of the
    first row, for the error."""
    y = target.long()
    least, most = torch.aminmax(y)
    low, high = least.item(), most.item()
    if low >= 0 and high < n_cols and not low <= ignore_index <= high:
        return y, None
    ignored = y == ignore_index
    bad = ((y < 0) | (y >= n_cols)) & ~ignored
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise IndexError(
            f"target {int(y[row])} at row {first + row} is out of bounds for {n_cols} classes "
            f"(and is not ignore_index = {ignore_index})"
        )
    return y.masked_fill(ignored, 0), ignored


def _minus_log(p_y: Tensor, miss: Tensor, rows: _Rows, y: Tensor) -> Tensor:
    """-log p_y [n_rows, 1]: from miss / p_y, or from the logits for rows whose p_y is subnormal, or 0."""
    largest = LARGEST[p_y.dtype]
    loss = (miss / p_y).log1p_()
    if not loss.max().item() < largest:  # NaN comes here too, and leaves as NaN
        bad = (~(loss < largest))[:, 0]
        z, y = rows.z(rows.inputs.logits[bad], p_y.dtype), y[bad]
        m = z.amax(1, keepdim=True)
        loss[bad] = (m - z.gather(1, y)) + sum_rows((z - m).exp_()).log_()
    return loss


def sum_rows(values: Tensor) -> Tensor:
    """Of each row [n_rows, 1]. One row alone is summed as two are: torch would split it among the threads, and a row's
    bits would depend on its batch."""
    return values.sum(1, keepdim=True) if values.shape[0] > 1 else values.expand(2, -1).sum(1, keepdim=True)[:1]

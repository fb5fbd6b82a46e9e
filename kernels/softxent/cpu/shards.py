"""Rows of a shard of the classes, in torch operations: their sums, what all shards' come to, and the gradient.

The mathematics of triton_kernels/formula.py; parallel/shards.py says what the sums are. Some rows at a time.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..options import Inputs, Options, Stats
from ..parallel.shards import Row, Shard, index_dtype
from .row_loss import map_, slope, sum_rows

CHUNK = 1 << 19  # values at a time
NOWHERE = 2**31 - 1
INF = float("inf")


def sums(inputs: Inputs, options: Options, shard: Shard, fields: tuple[str, ...]) -> Tensor:
    """[fields, n_rows] in the dtype of the computation. A target that no shard can hold is told by rest = -1."""
    logits, target, weight = inputs[:3]
    acc = torch.promote_types(logits.dtype, torch.float32)
    found = logits.new_zeros(len(fields), len(logits), dtype=acc)
    out = dict(zip(fields, found, strict=True))
    out["m"].fill_(-INF)
    if "best" in out:
        out["best"].view(index_dtype(acc)).fill_(NOWHERE)
    if "z_y" in out:
        out["z_y"].fill_(INF)  # the smallest of all ranks is the one that is there
    for rows, z in _chunks(inputs, options, shard):
        of = {name: values[rows] for name, values in out.items()}
        y = None
        if "z_y" in of:
            y = target[rows].long()[:, None] - shard.start
            held = (y >= 0) & (y < shard.n_cols)
            y = y.clamp(0, shard.n_cols - 1)
            of["z_y"].copy_(torch.where(held, z.gather(1, y), INF)[:, 0])
            if "w_y" in of:
                assert weight is not None
                counts = held & (target[rows, None] != options.ignore_index)
                of["w_y"].copy_(torch.where(counts, weight.to(acc)[y], 0)[:, 0])
            z.scatter_(1, y, torch.where(held, -INF, z.gather(1, y)))
            y = torch.where(held, y, -1)
        m, best = z.max(1, keepdim=True)
        of["m"].copy_(m[:, 0])
        if "best" in of:
            of["best"].view(index_dtype(acc)).copy_((best[:, 0] + shard.start).masked_fill_(m[:, 0] == -INF, NOWHERE))
        behind = finite_or_zero(m) - z
        if "gap" in of:
            u = coefficients(inputs, options, shard, rows, acc)
            if y is not None:
                u = torch.where(torch.arange(shard.n_cols, device=y.device) == y, 0, u)
            of["total"].copy_(u.expand_as(z).sum(1))
            of["gap"].copy_(sum_rows(torch.where((u == 0) | (behind == 0), 0, u * behind))[:, 0])
        e = behind.neg().exp_()
        if "moment" in of:  # without the largest
            e.scatter_(1, best, 0)
        of["rest"].copy_(sum_rows(e)[:, 0])
        if "moment" in of:
            of["moment"].copy_(sum_rows(behind.mul_(e).masked_fill_(e == 0, 0))[:, 0])
    if "z_y" in out:
        missing = ((target < 0) | (target >= shard.n_classes)) & (target != options.ignore_index)
        out["rest"].masked_fill_(missing, -1)
    return found


def combine(
    gathered: Tensor,  # [ranks, fields, n_rows]
    inputs: Inputs,
    options: Options,
    shard: Shard,
    fields: tuple[str, ...],
    wanted: Collection[str],
) -> tuple[Tensor, Stats, Row]:
    """The loss of each row, without its sample weight; the stats; and what `gradient` wants.

    Raises IndexError for a target that is neither `ignore_index` nor in [0, n_classes), on any rank.
    """
    of = dict(zip(fields, gathered.unbind(1), strict=True))
    skipped = unread(inputs, options)
    if "z_y" in of:
        _check_targets(of["rest"], of["z_y"], inputs.target, skipped, shard)
    eps = float(options.label_smoothing)

    highest, rest, below, moment, total, gap = _added(of)
    m, z_y, w_y = highest, None, None
    if "z_y" in of:  # the target's own term
        found = (of["z_y"] < INF).sum(0) == 1  # NaN neither
        z_y = of["z_y"].amin(0).masked_fill(~found, float("nan"))
        w_y = of["w_y"].sum(0) if "w_y" in of else torch.ones_like(z_y)
        m = torch.maximum(highest, z_y)
        risen = torch.where(highest == -INF, 0, m - highest)
        over = (highest - m).exp()
        if moment is not None:
            moment = _moment_of(over, moment + rest * risen) + _moment_of((z_y - m).exp(), _behind(m, z_y))
        rest = rest * over
        if gap is not None and total is not None:
            gap = gap + _raised(total, risen) + _weighed(w_y, _behind(m, z_y))
            total = total + w_y
    d, log_d = _log_normalizer(m, rest, z_y)

    loss = torch.zeros_like(d)
    if z_y is not None and w_y is not None:
        hard = (1 - eps) * w_y
        loss = torch.where(hard == 0, d * 0, hard * (_behind(m, z_y) + log_d))
    if gap is not None and total is not None:
        loss = loss + _share(inputs, options, shard) * (total * log_d + gap)
    if options.z_loss:
        v = torch.ones_like(d) if w_y is None else w_y
        loss = loss + torch.where(v == 0, 0, options.z_loss * v * (m + log_d) ** 2)
    names = {"lse": m + log_d}
    if moment is not None:
        assert below is not None
        but_one = below if z_y is None else below + (z_y - m).exp()
        apart = d < 2 if z_y is None else (z_y < m) & (d < 2)
        names["entropy"] = torch.where(apart, but_one.log1p(), log_d) + moment / d
    if z_y is not None:
        names["target_logprob"] = -(_behind(m, z_y) + log_d)
    if "best" in of:
        names["prediction"] = _prediction(of, highest, z_y, d, inputs.target)
    stats = {name: value for name, value in names.items() if name in wanted}
    if skipped is not None:
        loss, m, rest = (x.masked_fill(skipped, value) for x, value in ((loss, 0), (m, 0), (rest, 1)))
        stats = {name: x.masked_fill(skipped, -1 * (name == "prediction")) for name, x in stats.items()}
    return loss, Stats(**stats), Row(m, rest, z_y, w_y if "w_y" in of else None, total, moment)


def _added(of: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """m, rest, what is left of that without one largest, moment, total and gap of all shards [n_rows]: their sums
    [ranks, n_rows], moved to the largest m."""
    highest = of["m"].amax(0)
    less = (of["m"] - finite_or_zero(highest)).exp()
    risen = torch.where(of["m"] == -INF, 0, highest - of["m"])
    rests, below, moment, total, gap = of["rest"], None, None, None, None
    if "moment" in of:
        rests = torch.where(of["m"] == -INF, 0, 1 + of["rest"])
        first = of["m"].argmax(0, keepdim=True)
        below = (less * rests).scatter(0, first, of["rest"].gather(0, first)).sum(0)
        moment = (less * (of["moment"] + risen * rests)).sum(0)
    if "gap" in of:
        total = of["total"].sum(0)
        gap = (of["gap"] + _raised(of["total"], risen)).sum(0)
    return highest, (rests * less).sum(0), below, moment, total, gap


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
    acc = row.m.dtype
    eps = float(options.label_smoothing)
    m, z_y = row.m, row.z_y
    w_y = torch.ones_like(m) if row.w_y is None else row.w_y
    v = w_y
    if z_y is None:  # probabilities have no class y
        w_y, v = torch.zeros_like(m), torch.ones_like(m)
    e_y = torch.zeros_like(m) if z_y is None else (z_y - m).exp()
    _, log_d = _log_normalizer(m, row.rest, z_y)
    per_d = 1 / (row.rest + e_y)
    r = torch.zeros_like(m) if dloss is None else dloss.to(acc)
    hard = r * (1 - eps) * w_y  # of p_j - [j == y]
    smooth = r * _share(inputs, options, shard) if row.total is not None else torch.zeros_like(m)  # of u_j
    soft = smooth * row.total if row.total is not None else torch.zeros_like(m)  # of p_j
    if options.z_loss:
        soft = soft + torch.where(v == 0, 0, r * 2 * options.z_loss * v * (m + log_d))
    if dstats.lse is not None:
        soft = soft + dstats.lse.to(acc)
    if dstats.target_logprob is not None:
        hard = hard - dstats.target_logprob.to(acc)
    at_target = per_d * (soft * e_y - hard * row.rest) - smooth * w_y
    scale, bend = (hard + soft) * per_d, None
    if dstats.entropy is not None:
        assert row.moment is not None
        bend = dstats.entropy.to(acc) * per_d
        if z_y is not None:
            at_target = at_target + bend * (_moment_of(e_y, _behind(m, z_y)) - e_y * (row.moment * per_d))
        scale = scale - bend * (row.moment * per_d)

    skipped = unread(inputs, options)
    for rows, z in _chunks(inputs, options, shard):
        z = z.sub_(m[rows, None]).neg_()  # m - z
        gap = z
        if dtarget is not None:
            dt = (1 - eps) * r[rows, None] * (log_d[rows, None] + gap)
            if inputs.weight is not None:
                dt.mul_(inputs.weight.to(acc))
            dtarget[rows] = _without(skipped, rows, dt).to(dtarget.dtype)
        if dlogits is None:
            continue
        e = gap.neg().exp_()
        dz = scale[rows, None] * e
        if bend is not None:
            dz.add_(bend[rows, None] * _moment_of(e, gap))
        if row.total is not None:
            u = coefficients(inputs, options, shard, rows, acc)
            dz.sub_(torch.where(smooth[rows, None] == 0, 0, smooth[rows, None] * u))
        if z_y is not None:
            y = inputs.target[rows].long()[:, None] - shard.start
            held = (y >= 0) & (y < shard.n_cols)
            y = y.clamp(0, shard.n_cols - 1)
            dz.scatter_(1, y, torch.where(held, at_target[rows, None], dz.gather(1, y)))
        if options.maps(inputs):
            dz.mul_(slope(inputs.logits[rows].to(acc), inputs, options))
        dlogits[rows] = _without(skipped, rows, dz).to(dlogits.dtype)


def gradient_like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [n_rows, n_cols]."""
    return logits.new_empty(logits.shape, dtype=dtype)


def unread(inputs: Inputs, options: Options) -> Tensor | None:
    """Rows that do not count [n_rows]: ignored, or of sample weight 0. None for none."""
    masks = [] if inputs.sample_weight is None else [inputs.sample_weight == 0]
    if not inputs.target.is_floating_point():
        masks.append(inputs.target.long() == options.ignore_index)
    return torch.stack(masks).any(0) if masks else None


def coefficients(inputs: Inputs, options: Options, shard: Shard, rows: slice, acc: torch.dtype) -> Tensor:
    """u_j of the shard's classes: [1, n_cols] for class indices, else of rows."""
    w: Tensor = inputs.logits.new_ones(1, dtype=acc) if inputs.weight is None else inputs.weight.to(acc)
    if not inputs.target.is_floating_point():
        return w.expand(1, shard.n_cols)
    eps = float(options.label_smoothing)
    t: Tensor = inputs.target[rows].to(acc)
    return w * (t if eps == 0 else (1 - eps) * t + eps / shard.n_classes)


def finite_or_zero(m: Tensor) -> Tensor:
    """A maximum as a shift: 0 where there is only -inf, since -inf - -inf is NaN."""
    return torch.where(m == -INF, 0, m)


def _chunks(inputs: Inputs, options: Options, shard: Shard) -> Iterator[tuple[slice, Tensor]]:
    """Some rows, and their logits behind the map, in a copy that may be written over. 0 in rows that do not count."""
    logits = inputs.logits
    if logits.numel() == 0:
        return
    acc = torch.promote_types(logits.dtype, torch.float32)
    skipped = unread(inputs, options)
    step = max(1, CHUNK // shard.n_cols)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        z = logits[rows].to(acc, copy=True)
        if skipped is not None:
            z.masked_fill_(skipped[rows, None], 0)
        yield rows, map_(z, inputs, options) if options.maps(inputs) else z


def _check_targets(rest: Tensor, z_y: Tensor, target: Tensor, skipped: Tensor | None, shard: Shard) -> None:
    """rest, z_y: [ranks, n_rows]. All ranks see the same of all, and raise together."""
    missing = rest == -1
    if missing.any():
        rank, row = (int(i) for i in missing.nonzero()[0])
        raise IndexError(
            f"the target at row {row} of rank {rank} is out of bounds for {shard.n_classes} classes (and is not "
            f"ignore_index); here it is {int(target[row])}"
        )
    twice = (z_y < INF).sum(0) > 1
    twice = twice if skipped is None else twice & ~skipped
    if twice.any():
        row = int(twice.nonzero()[0])
        held = (z_y[:, row] < INF).nonzero()[:, 0].tolist()
        raise ValueError(f"the ranks' targets differ: ranks {held} all hold that of row {row}")


def _prediction(of: dict[str, Tensor], highest: Tensor, z_y: Tensor | None, d: Tensor, target: Tensor) -> Tensor:
    """The class of the largest logit, the first of equals."""
    best = of["best"].contiguous().view(index_dtype(d.dtype)).long()
    best = torch.where(of["m"] == highest, best, NOWHERE).amin(0)
    if z_y is not None:
        y = target.long()
        best = torch.where((z_y > highest) | ((z_y == highest) & (y < best)), y, best)
    return best.masked_fill(d.isnan(), -1)


def _log_normalizer(m: Tensor, rest: Tensor, z_y: Tensor | None) -> tuple[Tensor, Tensor]:
    """d, and log d: exactly log1p(rest) where the target is the largest. NaN where m is infinite."""
    rest = rest + (m - m)
    if z_y is None:
        return rest, rest.log()
    d = rest + (z_y - m).exp()
    return d, torch.where(z_y == m, rest.log1p(), d.log())


def _share(inputs: Inputs, options: Options, shard: Shard) -> float:
    """What multiplies sum_j u_j * -log p_j."""
    return 1.0 if inputs.target.is_floating_point() else float(options.label_smoothing) / shard.n_classes


def _behind(m: Tensor, z_y: Tensor) -> Tensor:
    return torch.where(z_y == m, 0, m - z_y)


def _raised(total: Tensor, risen: Tensor) -> Tensor:
    return torch.where((risen == 0) | (total == 0), 0, total * risen)


def _weighed(w: Tensor, gap: Tensor) -> Tensor:
    return torch.where((w == 0) | (gap == 0), 0, w * gap)


def _moment_of(e: Tensor, gap: Tensor) -> Tensor:
    return torch.where(e == 0, 0, e * gap)


def _without(skipped: Tensor | None, rows: slice, values: Tensor) -> Tensor:
    return values if skipped is None else values.masked_fill_(skipped[rows, None], 0)

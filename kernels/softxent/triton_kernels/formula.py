"""The formula of a row: its target and its factor, its loss, its stats and its gradient. What all kernels share.

For one row of n_cols logits x with target class y, class weights w, label smoothing eps, z-loss zeta, and a factor r
(the row's sample weight, over n for the mean, times the incoming gradient), with
c_j = (1 - eps) * w_y * [j == y] + (eps / n_cols) * w_j and a = sum_j c_j (reference.py):

    z     = softcap * tanh(logit_scale * x / softcap)       or what is left of that
    m     = max_j z_j
    rest  = sum_{j != y} exp(z_j - m)
    d     = rest + exp(z_y - m)
    lse   = m + log d                                       log d = log1p(rest) where z_y == m
    loss  = a * log d + sum_j c_j * (m - z_j) + zeta * w_y * lse^2
    dloss/dz_j = r * ((a + 2 * zeta * w_y * lse) * exp(z_j - m) / d - c_j)                           j != y
    dloss/dz_y = r * (((eps / n_cols) * sum_k w_k + 2 * zeta * w_y * lse) * exp(z_y - m) / d
                      - (eps / n_cols) * w_y - (1 - eps) * w_y * rest / d)

The last is the same as the one before at j = y, without the cancellation of p_y - 1. Against a row of probabilities t
there is no class y, c_j = w_j * ((1 - eps) * t_j + eps / n_cols), the z-loss counts once, and of
the target the gradient is

    dloss/dt_j = r * (1 - eps) * w_j * (log d + (m - z_j))

Of a row's stats,

    target_logprob = z_y - lse        adds to dloss/dz_j its gradient times [j == y] - p_j: it is a loss of weight -1
    lse                               times p_j
    entropy = log d + s / d           times p_j * ((m - z_j) - s / d), with s = sum_j exp(z_j - m) * (m - z_j)

    and there log d = log1p(d - 1) whichever class is the largest, d - 1 summed without it.

An ignored row has loss, stats and gradient 0 and is not read; nor is one of sample weight 0. A target outside
[0, n_cols) gives NaN in that row's loss and gradient, and an assertion where Triton's debug mode is on; nothing is read
through it.

Options are pointers or numbers, or None where they change nothing, on which Triton specialises: no kernel has a flag
for one, and a schedule compiles nothing anew.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import divide, exp, log_of, moment_of, nan_unless, raised, reciprocal, scalar, tanh_for


class Batch(NamedTuple):
    """Pointers to what is read and written of rows."""

    logits_ptr: Any  # [n_rows, n_cols]
    target_ptr: Any  # [n_rows] int, or None
    probs_ptr: Any  # [n_rows, n_cols] floating point, or None; where neither is, c = 0
    weight_ptr: Any  # [n_cols], or None: all 1
    sample_weight_ptr: Any  # [n_rows], or None: all 1
    dlogits_ptr: Any  # [n_rows, n_cols] out, perhaps the logits; or None
    dtarget_ptr: Any  # likewise, of probabilities


class Extras(NamedTuple):
    """The options of a row's loss: each a number, or a pointer to one, or None."""

    label_smoothing: Any
    z_loss: Any
    softcap: Any
    logit_scale: Any
    ignore_index: int


class Cotangents(NamedTuple):
    """Incoming gradients, [n_rows] each, or None: 1 of the loss, 0 of the others."""

    loss: Any  # or one number, with stride_dloss = 0
    lse: Any
    entropy: Any
    target_logprob: Any


class Outputs(NamedTuple):
    """What is wanted of the rows, [n_rows] each, or None."""

    loss: Any  # or one number a program
    lse: Any
    entropy: Any
    target_logprob: Any
    prediction: Any  # int64


class Strides(NamedTuple):
    """In values: from row to row, and of what is read also from column to column."""

    row: int
    col: int
    target_row: int  # of probabilities
    target_col: int
    dlogits_row: int
    dtarget_row: int
    dloss: int  # 0 for one number


class Formula(NamedTuple):
    """How a row is compared with its target. The target row enters as `hard` at the target class, if there is one, and
    share * u_j at each column:

    u_j = w_j                                      share = eps / n_cols       class indices; left out if eps is None
    u_j = w_j * ((1 - eps) * t_j + eps / n_cols)   share = 1                  probabilities
    """

    probs_ptr: Any  # t, or None
    weight_ptr: Any
    eps: Any
    even: Any  # eps / n_cols
    extras: Any


class Target(NamedTuple):
    """The class y of each row; where there is none, one of no weight behind all others. Of a shard: y counted from its
    first class, and valid only where it is here."""

    y: Any  # -1: none
    active: Any  # rows that count
    valid: Any  # those of them with a class
    z: Any
    slope: Any  # dz/dx
    w: Any  # NaN for a class that does not exist
    v: Any  # what weighs the z-loss
    share: Any


class RowSums(NamedTuple):
    """A row's sums, with which its gradient is made."""

    m: Any  # of all columns, the target's too
    rest: Any
    total: Any  # sum_j u_j
    moment: Any  # sum_j exp(z_j - m) * (m - z_j)


class Factors(NamedTuple):
    """The gradient as exp(z_j - m) * (scale + bend * (m - z_j)) - smooth * u_j for j != y, at_target for y; and
    of_t * w_j * (log d + (m - z_j)) of t_j."""

    m: Any
    log_d: Any
    scale: Any
    bend: Any
    smooth: Any
    of_t: Any
    at_target: Any


@triton.jit
def rows_that_count(sample_weight_ptr, rows, n_rows):
    """Those there are, but for those of sample weight 0."""
    active = rows < n_rows
    if sample_weight_ptr is not None:
        active = active & (tl.load(sample_weight_ptr + rows, mask=active, other=0.0) != 0.0)
    return active


@triton.jit
def load_target(target_ptr, sample_weight_ptr, rows, n_rows, n_cols, ignore_index):
    """The target classes of rows, -1 where there is none; which rows count; and which of those have a class."""
    in_range = rows < n_rows
    target = tl.load(target_ptr + rows, mask=in_range, other=0).to(tl.int64)
    active = in_range & (target != ignore_index)
    if sample_weight_ptr is not None:
        active = active & (tl.load(sample_weight_ptr + rows, mask=active, other=0.0) != 0.0)
    valid = active & (target >= 0) & (target < n_cols)
    tl.device_assert(valid | (active == 0), "softxent: target out of range")
    return tl.where(valid, target, -1).to(tl.int32), active, valid


@triton.jit
def load_target_weight(weight_ptr, target, valid, dtype: tl.constexpr):
    """w_y; NaN for a class that does not exist."""
    if weight_ptr is None:
        w_y = tl.full((), 1.0, dtype)
    else:
        w_y = tl.load(weight_ptr + target, mask=valid, other=1.0).to(dtype)
    return w_y + nan_unless(valid, dtype)


@triton.jit
def target_of(batch, rows, n_rows, n_cols, strides, formula):
    """The target of rows."""
    acc: tl.constexpr = formula.eps.dtype
    if batch.target_ptr is not None:
        y, active, valid = load_target(
            batch.target_ptr, batch.sample_weight_ptr, rows, n_rows, n_cols, formula.extras.ignore_index
        )
        x = tl.load(batch.logits_ptr + rows * strides.row + y.to(tl.int64) * strides.col, mask=valid, other=0.0)
        z, slope = logit_map(x, formula.extras, acc)
        w = load_target_weight(batch.weight_ptr, y, valid, acc)
        target = Target(y, active, valid, z, slope, w, w, formula.even)
    else:
        active = rows_that_count(batch.sample_weight_ptr, rows, n_rows)
        target = no_target(rows, active, formula)
    return target


@triton.jit
def no_target(rows, active, formula):
    acc: tl.constexpr = formula.eps.dtype
    one = tl.full((), 1.0, acc)
    zero = tl.zeros(rows.shape, acc)
    share = formula.even
    if formula.probs_ptr is not None:
        share = one
    return Target(tl.full(rows.shape, -1, tl.int32), active, active, zero + float("-inf"), one, zero, one, share)


@triton.jit
def load_sample_weight(sample_weight_ptr, rows, active, dtype: tl.constexpr):
    """What multiplies the loss of rows, and their gradient; 0 of rows that do not count."""
    r = active.to(dtype)
    if sample_weight_ptr is not None:
        r = tl.load(sample_weight_ptr + rows, mask=active, other=0.0).to(dtype)
    return r


@triton.jit
def load_cotangent(cotangent, rows, active, dtype: tl.constexpr):
    """A number for all rows, or of each."""
    if hasattr(cotangent, "dtype"):
        if cotangent.dtype.is_ptr():
            cotangent = tl.load(cotangent + rows, mask=active, other=0.0)
    return (cotangent + tl.zeros((), dtype)).to(dtype)


@triton.jit
def load_factor(
    cotangents, stride_dloss, norm_ptr, sample_weight_ptr, rows, active, NORMS: tl.constexpr, dtype: tl.constexpr
):
    """r: the sample weight times the incoming gradient, over the sum of the parts of the mean's divisor."""
    r = load_sample_weight(sample_weight_ptr, rows, active, dtype)
    if cotangents.loss is not None:
        r *= tl.load(cotangents.loss + rows * stride_dloss, mask=active, other=0.0).to(dtype)
    if norm_ptr is not None:
        r = divide(r, load_norm(norm_ptr, NORMS, dtype))
    return r


@triton.jit
def load_norm(norm_ptr, NORMS: tl.constexpr, dtype: tl.constexpr):
    """The mean's divisor: a number, or what is pointed to, if NORMS is 0; or from its parts, where 0 becomes NaN:
    nothing to average."""
    if NORMS == 0:
        n = scalar(norm_ptr, dtype)
    else:
        n = tl.sum(tl.load(norm_ptr + tl.arange(0, NORMS)), 0).to(dtype)
        n += nan_unless(n != 0.0, dtype)
    return n


@triton.jit
def logit_map(x, extras, dtype: tl.constexpr):
    """z in `dtype`, and dz/dx."""
    z = x.to(dtype)
    slope = tl.full((), 1.0, dtype)
    if extras.logit_scale is not None:
        slope = scalar(extras.logit_scale, dtype)
        slope += nan_unless(slope > 0.0, dtype)  # -inf has to stay -inf
        z *= slope
    if extras.softcap is not None:
        softcap = scalar(extras.softcap, dtype)
        t, dt = tanh_for(z * reciprocal(softcap), x.dtype)
        z = softcap * t
        slope = slope * dt
    return z, slope


@triton.jit
def times_slope(dz, slope, extras):
    """dloss/dx from dloss/dz; not a multiplication where there is no map."""
    if extras.logit_scale is not None or extras.softcap is not None:
        dz = dz * slope
    return dz


@triton.jit
def log_normalizer(m, rest, z_y):
    """d, and log d. Where the target is the largest, log1p(rest)."""
    d = rest + exp(z_y - m)
    return d, log_of(d, rest, z_y == m)


@triton.jit
def behind(m, z_y):
    """m - z_y, and 0 where the target is the largest: behind a map z_y is a product, which a compiler may take into the
    subtraction unrounded, where m is rounded. That would leave half a rounding of z, above any confident row's loss."""
    return tl.where(z_y == m, 0.0, m - z_y)


@triton.jit
def weighed_gap(m, z, w):
    """w_j * (m - z_j), selected: 0 where the weight is 0, whatever the logit, and where there is no gap."""
    return tl.where((w == 0.0) | (z == m), 0.0, w * (m - z))


@triton.jit
def smoothing(extras, n_cols, dtype: tl.constexpr):
    """eps, and eps / n_cols."""
    if extras.label_smoothing is None:
        eps = tl.zeros((), dtype)
        share = tl.zeros((), dtype)
    else:
        eps = scalar(extras.label_smoothing, dtype)
        share = divide(eps, scalar(n_cols, dtype))
    return eps, share


@triton.jit
def with_target(highest, rest, total, gap, moment, target):
    """Sums over j != y relative to `highest`, the largest of those z_j, moved to the row's m, and all but `rest` joined
    by the target's own term: the row, and its gap."""
    m = tl.where(target.active, tl.maximum(highest, target.z), 0.0)
    risen = tl.where(highest == float("-inf"), 0.0, m - highest)
    over = exp(highest - m)
    moment = moment_of(over, moment + rest * risen) + moment_of(exp(target.z - m), behind(m, target.z))
    gap += raised(total, risen) + weighed_gap(m, target.z, target.w)
    return RowSums(m, rest * over, total + target.w, moment), gap


@triton.jit
def loss_of_row(row, gap, target, formula):
    """d, log d, and the loss of rows; gap: sum_j u_j * (m - z_j)."""
    U: tl.constexpr = formula.probs_ptr is not None or formula.extras.label_smoothing is not None
    d, log_d = log_normalizer(row.m, row.rest, target.z)
    hard = (1.0 - formula.eps) * target.w
    loss = hard * (behind(row.m, target.z) + log_d)
    loss = tl.where(hard == 0.0, d * 0.0, loss)  # d * 0: still NaN where there is no softmax
    if formula.extras.z_loss is not None:
        lse = row.m + log_d
        zeta = scalar(formula.extras.z_loss, loss.dtype) * target.v
        loss += tl.where(target.v == 0.0, 0.0, zeta * lse * lse)
    if U:
        loss += target.share * (row.total * log_d + gap)
    return d, log_d, loss


@triton.jit
def gradient_of_row(r, row, target, formula, cotangents, rows):
    dtype: tl.constexpr = r.dtype
    U: tl.constexpr = formula.probs_ptr is not None or formula.extras.label_smoothing is not None
    extras = formula.extras
    e_y = exp(target.z - row.m)
    per_d = reciprocal(row.rest + e_y)
    hard = r * (1.0 - formula.eps) * target.w  # of p_j - [j == y]
    soft = tl.zeros((), dtype)  # of p_j
    smooth = tl.zeros((), dtype)  # of u_j
    if U:
        smooth = r * target.share
        soft += smooth * row.total
    bend = tl.zeros((), dtype)
    _, log_d = log_normalizer(row.m, row.rest, target.z)
    if extras.z_loss is not None:
        zeta = scalar(extras.z_loss, dtype) * target.v
        soft += tl.where(zeta == 0.0, 0.0, r * 2.0 * zeta * (row.m + log_d))
    if cotangents.lse is not None:
        soft += load_cotangent(cotangents.lse, rows, target.active, dtype)
    if cotangents.target_logprob is not None:
        hard -= load_cotangent(cotangents.target_logprob, rows, target.active, dtype)
    at_target = per_d * (soft * e_y - hard * row.rest) - smooth * target.w
    scale = (hard + soft) * per_d
    if cotangents.entropy is not None:
        bend = load_cotangent(cotangents.entropy, rows, target.active, dtype) * per_d
        at_target += bend * (moment_of(e_y, behind(row.m, target.z)) - e_y * (row.moment * per_d))
        scale -= bend * (row.moment * per_d)
    at_target = times_slope(at_target, target.slope, extras)
    zero = tl.zeros((), dtype)
    return Factors(
        row.m,
        log_d,
        tl.where(target.active, scale, zero),
        tl.where(target.active, bend, zero),
        tl.where(target.active, smooth, zero),
        tl.where(target.active, r * (1.0 - formula.eps), zero),
        tl.where(target.active, at_target, zero),
    )


@triton.jit
def store_stats(outputs, rows, in_range, target, row, d, log_d, below, best):
    """What is wanted of rows besides their loss; of one that does not count 0, and class -1; of one whose target does
    not exist NaN, and -1.

    below: sum of exp(z_j - m) over z_j < m, j != y. Where another class than the target is the largest, and d < 2 says
    that it is alone, d = 1 + below + exp(z_y - m).
    """
    m, z_y, active = row.m, target.z, target.active
    undefined = nan_unless(target.valid, m.dtype)
    if outputs.lse is not None:
        tl.store(outputs.lse + rows, tl.where(active, m + log_d + undefined, 0.0), mask=in_range)
    if outputs.entropy is not None:
        but_one = below + exp(z_y - m)
        log_d_apart = log_of(1.0 + but_one, but_one, True)
        entropy = tl.where((z_y < m) & (d < 2.0), log_d_apart, log_d) + row.moment * reciprocal(d) + undefined
        tl.store(outputs.entropy + rows, tl.where(active, entropy, 0.0), mask=in_range)
    if outputs.target_logprob is not None:
        log_p = undefined - (behind(m, z_y) + log_d)
        tl.store(outputs.target_logprob + rows, tl.where(active, log_p, 0.0), mask=in_range)
    if outputs.prediction is not None:
        tl.store(outputs.prediction + rows, tl.where(target.valid & (d == d), best, -1).to(tl.int64), mask=in_range)


@triton.jit
def better_of(target, highest, best):
    """The class of the largest logit, the first of them: the target, or the best of the others."""
    return tl.where((target.z > highest) | ((target.z == highest) & (target.y < best)), target.y, best)

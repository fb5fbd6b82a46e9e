"""What the kernels share: arithmetic, a row's target and factor, its loss and its gradient, and where a row lies.

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

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Extras(NamedTuple):
    """The options of a row's loss: each a number, or a pointer to one, or None."""

    label_smoothing: Any
    z_loss: Any
    softcap: Any
    logit_scale: Any


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


@triton.jit
def exp(x):
    """e^x for x <= 0. In float32 as exp2(h), h = fl(x * log2(e)), times 1 + (x - h * ln 2): within a rounding or two,
    where exp2(h) alone is off by |x| of them. NaN stays; below -150 all is 0, and -inf - -inf would be NaN."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)
        h = x * LOG2E
        e = tl.exp2(h)
        e = tl.fma(e, tl.fma(h, -LN2, x), e)
    return e


@triton.jit
def exp_for(x, dtype: tl.constexpr):
    """e^x for x <= 0, as exact as results in `dtype` can show: of 16 bits they do not see |x| roundings of float32."""
    if dtype == tl.float32 or dtype == tl.float64:
        e = exp(x)
    else:
        e = tl.exp2(x * LOG2E)
    return e


@triton.jit
def reciprocal(x):
    """1 / x, rounded once. Newton's steps, since a division of float64 is a call, which spills registers: for it x must
    lie in the range of float32, or be NaN."""
    if x.dtype == tl.float64:
        r = (1.0 / x.to(tl.float32)).to(tl.float64)
        r = tl.fma(r, tl.fma(-x, r, 1.0), r)
    else:
        r = 1.0 / x
    return tl.fma(r, tl.fma(-x, r, 1.0), r)


@triton.jit
def divide(a, b):
    """a / b, rounded once, for any normal b; as IEEE has it for 0 and infinities."""
    if b.dtype == tl.float64:  # b = f * 2^k with 1 <= |f| < 2
        bits = b.to(tl.int64, bitcast=True)
        exponent = (bits >> 52) & 0x7FF
        f = (bits - ((exponent - 1023) << 52)).to(tl.float64, bitcast=True)
        r = reciprocal(f) * ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
        r = tl.where(b == b, r, b)
    else:
        r = reciprocal(b)
    q = a * r
    edge = a * (1.0 / b.to(tl.float32)).to(b.dtype)
    q = tl.where(tl.abs(q) < float("inf"), tl.fma(r, tl.fma(-b, q, a), q), edge)
    return tl.where((b == 0.0) | (tl.abs(b) == float("inf")), edge, q)


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A float argument, or what it points to, as `dtype`; in the interpreter it is a Python float still: no .to().
    Less 0: plus 0 would make 0 of -0, by which a mean is divided to -inf."""
    if hasattr(value, "dtype"):
        if value.dtype.is_ptr():
            value = tl.load(value)
    return (value - tl.zeros((), dtype)).to(dtype)


@triton.jit
def nan_unless(condition, dtype: tl.constexpr):
    """0 or NaN, by way of inf - inf: as a scalar constant of float64, Triton 3.7's code for AMD does not assemble."""
    x = tl.where(condition, 0.0, float("inf")).to(tl.float32)
    return (x - x).to(dtype)


@triton.jit
def finite_or_zero(m):
    """A running maximum as a shift: 0 while only -inf was seen, since -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


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
def tanh(u):
    """tanh(u), and its derivative, neither with a cancellation: below 0.4 by the continued fraction of Lambert (1768),
    cut where float64 does not see it; above, with e = exp(-2|u|), (1 - e) / (1 + e) and 4 e / (1 + e)^2."""
    small = tl.abs(u) < 0.4
    e = exp(-2.0 * tl.abs(u))
    s = tl.where(small, u * u, 0.0)
    top = tl.where(u < 0.0, e - 1.0, 1.0 - e)
    top = tl.where(small, u * (135135.0 + s * (17325.0 + s * (378.0 + s))), top)
    bottom = tl.where(small, 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)), 1.0 + e)
    r = reciprocal(bottom)
    t = top * r
    t = tl.fma(r, tl.fma(-bottom, t, top), t)  # rounded once
    return t, tl.where(small, 1.0 - t * t, 4.0 * e * r * r)


@triton.jit
def tanh_for(u, dtype: tl.constexpr):
    """The same, as exact as results in `dtype` can show: of 16 bits to 3e-7, with a shorter fraction and divisions
    that are not corrected."""
    if dtype == tl.float32 or dtype == tl.float64:
        t, slope = tanh(u)
    else:
        small = tl.abs(u) < 0.4
        e = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
        s = tl.where(small, u * u, 0.0)
        top = tl.where(small, u * (105.0 + s * 10.0), tl.where(u < 0.0, e - 1.0, 1.0 - e))
        r = 1.0 / tl.where(small, 105.0 + s * (45.0 + s), 1.0 + e)
        t = top * r
        slope = tl.where(small, 1.0 - t * t, 4.0 * e * r * r)
    return t, slope


@triton.jit
def logit_map(x, mask, extras, dtype: tl.constexpr):
    """z in `dtype`, and dz/dx, of loaded logits; -inf where the mask, if any, is false: softcap * tanh(-inf) is not."""
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
        if mask is not None:
            z = tl.where(mask, z, float("-inf"))
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
def log_of(d, rest, apart):
    """log d; with `apart`, d = fl(1 + rest), log1p(rest): Kahan's log(d) * rest / (d - 1)."""
    log_d = tl.log(d)
    exact = tl.where(d == 1.0, rest, log_d * (rest * reciprocal(tl.where(d == 1.0, 1.0, d - 1.0))))
    return tl.where(apart, exact, log_d)


@triton.jit
def behind(m, z_y):
    """m - z_y, and 0 where the target is the largest: behind a map z_y is a product, which a compiler may take into the
    subtraction unrounded, where m is rounded. That would leave half a rounding of z, above any confident row's loss."""
    return tl.where(z_y == m, 0.0, m - z_y)


@triton.jit
def loss_of_target(m, rest, z_y, w_y, v, eps, extras):
    """d, log d, and what of the loss w_y weighs, the target's part, and v, the z-loss."""
    d, log_d = log_normalizer(m, rest, z_y)
    hard = (1.0 - eps) * w_y
    loss = tl.where(hard == 0.0, d * 0.0, hard * (behind(m, z_y) + log_d))  # d * 0: still NaN where there is no softmax
    if extras.z_loss is not None:
        lse = m + log_d
        loss += tl.where(v == 0.0, 0.0, scalar(extras.z_loss, loss.dtype) * v * lse * lse)
    return d, log_d, loss


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
def raised(total, risen):
    """What sum_j u_j * (m - z_j) gains where m rises: nothing if it does not, whatever sum_j u_j is."""
    return tl.where(risen == 0.0, 0.0, total * risen)


@triton.jit
def moment_of(e, gap):
    """exp(z_j - m) * (m - z_j), of which the entropy is made: 0 * log 0 is 0."""
    return tl.where(e == 0.0, 0.0, e * gap)


@triton.jit
def gradient_of_row(
    r, m, rest, z_y, w_y, v, total, moment, eps, share, extras, cotangents, rows, active, U: tl.constexpr
):
    """The gradient as exp(z_j - m) * (scale + bend * (m - z_j)) - smooth * w_j for j != y, and its value at y.

    total: sum_j w_j; moment: sum_j exp(z_j - m) * (m - z_j), where the entropy has a gradient.
    """
    dtype: tl.constexpr = r.dtype
    e_y = exp(z_y - m)
    per_d = reciprocal(rest + e_y)
    hard = r * (1.0 - eps) * w_y  # of p_j - [j == y]
    soft = tl.zeros((), dtype)  # of p_j
    smooth = tl.zeros((), dtype)  # of w_j
    if U:
        smooth = r * share
        soft += smooth * total
    bend = tl.zeros((), dtype)
    if extras.z_loss is not None or cotangents.lse is not None:
        _, log_d = log_normalizer(m, rest, z_y)
        if extras.z_loss is not None:
            zeta = scalar(extras.z_loss, dtype) * v
            soft += tl.where(zeta == 0.0, 0.0, r * 2.0 * zeta * (m + log_d))
        if cotangents.lse is not None:
            soft += load_cotangent(cotangents.lse, rows, active, dtype)
    if cotangents.target_logprob is not None:
        hard -= load_cotangent(cotangents.target_logprob, rows, active, dtype)
    at_target = per_d * (soft * e_y - hard * rest) - smooth * w_y
    scale = (hard + soft) * per_d
    if cotangents.entropy is not None:
        bend = load_cotangent(cotangents.entropy, rows, active, dtype) * per_d
        at_target += bend * (moment_of(e_y, behind(m, z_y)) - e_y * (moment * per_d))
        scale -= bend * (moment * per_d)
    zero = tl.zeros((), dtype)
    scale, bend = tl.where(active, scale, zero), tl.where(active, bend, zero)
    return scale, bend, tl.where(active, smooth, zero), tl.where(active, at_target, zero)


@triton.jit
def store_stats(outputs, rows, in_range, active, valid, m, d, log_d, z_y, below, moment, best):
    """What is wanted of rows besides their loss; of one that does not count 0, and class -1; of one whose target does
    not exist NaN, and -1.

    below: sum of exp(z_j - m) over z_j < m, j != y. Where another class than the target is the largest, and d < 2 says
    that it is alone, d = 1 + below + exp(z_y - m).
    """
    undefined = nan_unless(valid, m.dtype)
    if outputs.lse is not None:
        tl.store(outputs.lse + rows, tl.where(active, m + log_d + undefined, 0.0), mask=in_range)
    if outputs.entropy is not None:
        but_one = below + exp(z_y - m)
        log_d_apart = log_of(1.0 + but_one, but_one, True)
        entropy = tl.where((z_y < m) & (d < 2.0), log_d_apart, log_d) + moment * reciprocal(d) + undefined
        tl.store(outputs.entropy + rows, tl.where(active, entropy, 0.0), mask=in_range)
    if outputs.target_logprob is not None:
        log_p = undefined - (behind(m, z_y) + log_d)
        tl.store(outputs.target_logprob + rows, tl.where(active, log_p, 0.0), mask=in_range)
    if outputs.prediction is not None:
        tl.store(outputs.prediction + rows, tl.where(valid & (d == d), best, -1).to(tl.int64), mask=in_range)


@triton.jit
def better_of(z_y, target, runner_up, best):
    """The class of the largest logit, the first of them: the target, or the best of the others."""
    return tl.where((z_y > runner_up) | ((z_y == runner_up) & (target < best)), target, best)

"""What the kernels share: arithmetic, a row's target and factor, its loss and its gradient, and where a row lies.

For one row z of n_cols logits with target class y, class weights w, label smoothing eps and a factor r (1 / n for the
mean, the incoming gradient), with c_j = (1 - eps) * w_y * [j == y] + (eps / n_cols) * w_j and a = sum_j c_j
(reference.py):

    m     = max_j z_j
    rest  = sum_{j != y} exp(z_j - m)
    d     = rest + exp(z_y - m)
    loss  = a * log d + sum_j c_j * (m - z_j)               log d = log1p(rest) where z_y == m
    dloss/dz_j = r * ( a * exp(z_j - m) / d - c_j)          j != y
    dloss/dz_y = r * (eps / n_cols * (sum_k w_k * exp(z_y - m) / d - w_y) - (1 - eps) * w_y * rest / d)

The last is the same as the one before at j = y, without the cancellation of p_y - 1.

An ignored row has loss and gradient 0 and is not read. A target outside [0, n_cols) gives NaN in that row's loss and
gradient, and an assertion where Triton's debug mode is on; nothing is read through it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
    """a / b, rounded once, for any normal b."""
    if b.dtype == tl.float64:  # b = f * 2^k with 1 <= |f| < 2
        bits = b.to(tl.int64, bitcast=True)
        exponent = (bits >> 52) & 0x7FF
        f = (bits - ((exponent - 1023) << 52)).to(tl.float64, bitcast=True)
        r = reciprocal(f) * ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
        r = tl.where(b == b, r, b)
    else:
        r = reciprocal(b)
    q = a * r
    return tl.fma(r, tl.fma(-b, q, a), q)


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A float argument as `dtype`. The sum is for the interpreter, where it is a Python float still: no .to()."""
    return (value + tl.zeros((), dtype)).to(dtype)


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
def load_target(target_ptr, rows, n_rows, n_cols, ignore_index):
    """The target classes of rows, -1 where there is none; which rows count; and which of those have a class."""
    in_range = rows < n_rows
    target = tl.load(target_ptr + rows, mask=in_range, other=0).to(tl.int64)
    active = in_range & (target != ignore_index)
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
def load_weights(weight_ptr, cols, inside, dtype: tl.constexpr):
    """w_j of columns; 0 for those that are not inside the row."""
    if weight_ptr is None:
        w = inside.to(dtype)
    else:
        w = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(dtype)
    return w


@triton.jit
def load_factor(dloss_ptr, stride_dloss, norm_ptr, rows, active, NORMS: tl.constexpr, dtype: tl.constexpr):
    """r: the incoming gradient, if there is one, over the sum of the parts of the mean's divisor, if there is one."""
    r = active.to(dtype)
    if dloss_ptr is not None:
        r = tl.load(dloss_ptr + rows * stride_dloss, mask=active, other=0.0).to(dtype)
    if norm_ptr is not None:
        r = divide(r, load_norm(norm_ptr, NORMS).to(dtype))
    return r


@triton.jit
def load_norm(norm_ptr, NORMS: tl.constexpr):
    """The mean's divisor from its parts. 0 becomes NaN: nothing to average."""
    n = tl.sum(tl.load(norm_ptr + tl.arange(0, NORMS)), 0)
    return n + nan_unless(n != 0.0, n.dtype)


@triton.jit
def log_normalizer(m, rest, z_y):
    """d, and log d. Where the target is the largest, log1p(rest): Kahan's log(d) * rest / (d - 1), d = fl(1 + rest)."""
    d = rest + exp(z_y - m)
    log_d = tl.log(d)
    exact = tl.where(d == 1.0, rest, log_d * (rest * reciprocal(tl.where(d == 1.0, 1.0, d - 1.0))))
    return d, tl.where(z_y == m, exact, log_d)


@triton.jit
def loss_of_target(m, rest, z_y, c_y):
    """log d, and the part of the loss that c_y = (1 - eps) * w_y weighs."""
    d, log_d = log_normalizer(m, rest, z_y)
    loss = tl.where(c_y == 0.0, d * 0.0, c_y * ((m - z_y) + log_d))  # d * 0: still NaN where there is no softmax
    return log_d, loss


@triton.jit
def weighed_gap(m, z, w):
    """w_j * (m - z_j): a class of weight 0 is left out, whatever its logit."""
    return tl.where(w == 0.0, 0.0, w * (m - z))


@triton.jit
def smoothing(label_smoothing, n_cols, dtype: tl.constexpr):
    """eps, and eps / n_cols."""
    eps = scalar(label_smoothing, dtype)
    return eps, divide(eps, scalar(n_cols, dtype))


@triton.jit
def gradient_of_row(r, rest, m, z_y, w_y, total, eps, share, active):
    """The gradient as scale * exp(z_j - m) - smooth * w_j for j != y, and its value at y. share: eps / n_cols; total:
    sum_j w_j."""
    e_y = exp(z_y - m)
    q = r * reciprocal(rest + e_y)
    a = (1.0 - eps) * w_y + share * total
    at_target = q * (share * total * e_y - (1.0 - eps) * w_y * rest) - r * share * w_y
    return tl.where(active, q * a, 0.0), tl.where(active, r * share, 0.0), tl.where(active, at_target, 0.0)


@triton.jit
def fixed_point(e):
    """Values in [0, 1] as integers of 2^-44, which add up to the same in any order; 2^18 of them to less than 2^63.

    The order of a row's values in a tile depends on where in its granule the row starts, and its loss must not.
    """
    return (e * 2.0**44).to(tl.int64)


@triton.jit
def from_fixed_point(n):
    return n.to(tl.float32) * 2.0**-44


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def keep(x):
    """16-bit values behind a move that the compiler cannot see through (PTX): it has to hold the packed registers
    across it, and not the float32 values that it unpacked before, which are twice as many."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def whole_granules(row_ptr, n_cols, GRANULE: tl.constexpr, ODD: tl.constexpr):
    """How many columns of a row lie before its first whole granule of 16 bytes, and how many in whole granules.

    A row of odd length starts anywhere, which leaves Triton loads and stores of one value each. So the whole granules
    of a row are accessed as such, and its ends, which lie in granules of its neighbours too, apart (`edges`).
    """
    skip = 0
    if ODD:
        before = row_ptr.to(tl.int64) // (16 // GRANULE) % GRANULE
        skip = tl.minimum((GRANULE - before) % GRANULE, n_cols).to(tl.int32)
    return skip, (n_cols - skip) // GRANULE * GRANULE


@triton.jit
def first_granule(row_ptr, skip, GRANULE: tl.constexpr):
    """What Triton cannot see by itself: that this address is a multiple of 16."""
    row_ptr += skip
    if GRANULE > 1:
        row_ptr = tl.multiple_of(row_ptr, 16)
    return row_ptr


@triton.jit
def edges(edge, n_cols, skip, whole, GRANULE: tl.constexpr):
    """The columns before and after a row's whole granules, for edge in [0, 2 * GRANULE); and which there are."""
    before = edge < GRANULE
    cols = tl.where(before, edge, skip + whole + edge - GRANULE)
    return cols, (before & (edge < skip)) | ((edge >= GRANULE) & (cols < n_cols))

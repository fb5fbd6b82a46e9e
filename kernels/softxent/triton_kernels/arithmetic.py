"""What numbers the formula is computed with: exponentials, divisions and tanh, as exact as their dtype, and safe at
infinities."""

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
def log_of(d, rest, apart):
    """log d; with `apart`, d = fl(1 + rest), log1p(rest): Kahan's log(d) * rest / (d - 1)."""
    log_d = tl.log(d)
    exact = tl.where(d == 1.0, rest, log_d * (rest * reciprocal(tl.where(d == 1.0, 1.0, d - 1.0))))
    return tl.where(apart, exact, log_d)


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
def moment_of(e, gap):
    """exp(z_j - m) * (m - z_j), of which the entropy is made: 0 * log 0 is 0."""
    return tl.where(e == 0.0, 0.0, e * gap)


@triton.jit
def raised(total, risen):
    """What sum_j u_j * (m - z_j) gains where m rises: nothing if it does not, whatever sum_j u_j is."""
    return tl.where(risen == 0.0, 0.0, total * risen)

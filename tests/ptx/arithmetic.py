"""What instructions compute, of decoded values: rounded as the PTX ISA has it, where NumPy does not by itself."""

import numpy as np

from .formats import Array, to_odd


def flush(x: Array) -> Array:
    """Subnormal float32 are 0 of their sign (.ftz)."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b and its error, which is exact (Knuth)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b and its error (Dekker), exact as long as neither that nor a split overflows or is subnormal."""

    def split(x: Array) -> tuple[Array, Array]:
        big = x * 134217729.0
        high = big - (big - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of floats of at most 32 bits, as a float64 rounded to odd: the product is exact there."""
    return to_odd(*two_sum(np.asarray(a, np.float64) * b, np.asarray(c, np.float64)))


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once. A sum rounded to float64 first does the same, unless it came to lie in the middle
    between two float32, or is subnormal."""
    total = np.asarray(a, np.float64) * b + c
    middle = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == 0x10000000
    if middle.any() or (np.abs(total) < 2.0**-125).any():
        total = fma_to_odd(a, b, c)
    return total.astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once (Boldo and Melquiond, 2008, "Emulation of FMA and correctly rounded sums"), where
    `two_product` is exact; beyond, in two roundings."""
    product, low = two_product(a, b)
    rest, low = two_sum(c + np.zeros_like(low), low)
    total, middle = two_sum(product, rest)
    exact = total + to_odd(*two_sum(low, middle))
    return np.where(np.isfinite(exact), exact, a * b + c)


def smaller(a: Array, b: Array) -> Array:
    """The one that is a number; -0 before 0."""
    return _of_zeros(np.fmin(a, b), a, b, True) if a.dtype.kind == "f" else np.minimum(a, b)


def larger(a: Array, b: Array) -> Array:
    return _of_zeros(np.fmax(a, b), a, b, False) if a.dtype.kind == "f" else np.maximum(a, b)


def _of_zeros(out: Array, a: Array, b: Array, negative: bool) -> Array:
    zeros = (out == 0) & (a == b)
    return np.where(zeros & (np.signbit(a) == negative), a, np.where(zeros, b, out)) if zeros.any() else out


def or_nan(function: object, a: Array, b: Array) -> Array:
    """`smaller` or `larger`, but NaN where either is (.NaN)."""
    return np.where(np.isnan(a) | np.isnan(b), np.nan, function(a, b)).astype(a.dtype)  # type: ignore[operator]


def unsigned_quotient(a: Array, b: Array) -> Array:
    """All bits set for a divisor of 0, which the ISA leaves open."""
    return np.where(b == 0, ~np.zeros_like(a), a // np.where(b == 0, 1, b).astype(b.dtype))


def shifted_left(x: Array, by: Array) -> Array:
    """0 beyond the width."""
    width = 8 * x.dtype.itemsize
    return np.where(by >= width, np.zeros_like(x), x << np.minimum(by, width - 1).astype(x.dtype))


def shifted_right(x: Array, by: Array) -> Array:
    """Beyond the width 0, or of a negative number -1."""
    width = 8 * x.dtype.itemsize
    out = x >> np.minimum(by, width - 1).astype(x.dtype)
    return out if x.dtype.kind == "i" else np.where(by >= width, np.zeros_like(x), out)


def field_of(x: Array, start: Array, length: Array) -> Array:
    """Bits [start, start + length) of 32 (bfe), of a signed number with their sign: the last bit that there is."""
    start, length = (np.minimum(v & 255, 32).astype(np.int64) for v in (start, length))
    wide = x.astype(np.int64)  # beyond its end of the sign, as the ISA has it
    field = (wide >> start) & ((np.int64(1) << length) - 1)
    if x.dtype.kind == "i":
        sign = (wide >> (start + length - 1)) & 1
        field = np.where((sign == 1) & (length > 0), field | (np.int64(-1) << length), field)
    return field.astype(x.dtype)


def gross_reciprocal(x: Array) -> Array:
    """1 / x of float64 from the first 32 bits to the first 32 bits (rcp.approx.ftz.f64)."""

    def first_half(y: Array) -> Array:
        y = np.where(np.abs(y) < 2.0**-1022, np.copysign(0.0, y), y)
        return (y.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)

    return first_half(np.asarray(1.0 / first_half(x)))

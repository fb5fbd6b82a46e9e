"""The emulator's instructions at their edges, against exact numbers: Python's integers and fractions, or values that
were worked out by hand. With --device cuda a GPU's instructions, against the same."""

import itertools
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import written_ptx
from ptx import Unmodelled, exchange, transfers
from ptx.formats import RAW, TYPES, Array
from ptx.instructions import FORMS
from written_ptx import evaluate, run

assert exchange and transfers  # which list their instructions in FORMS

NAN32, NAN64 = 0x7FFFFFFF, 0x7FFFFFFFFFFFFFFF
EDGES = {16: (0, 1, 2, 7, 0x7FFF, 0x8000, 0x8001, 0xFFFF)}
EDGES |= {n: (0, 1, 7, (1 << n - 1) - 1, 1 << n - 1, (1 << n) - 1, 0x12345678, 0xF0F0F0F0 << n - 32) for n in (32, 64)}
FLOATS: tuple[float, ...] = (0.0, -0.0, 1.0, -1.5, 3.1415927, 2.0**-126, 2.0**-140, -(2.0**-149), 3.4e38, -3.4e38)
FLOATS += (float("inf"), float("-inf"), float("nan"), 1e-20, 16777216.0, 1.0000001)
tested: set[str] = set()
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def of_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_ptx, "ON_GPU", device.type == "cuda")


def op(opcode: str, into: int, *operands: Any, to: str | None = None) -> Array:
    tested.add(opcode)
    return evaluate(opcode, into, *operands, to=to)


def edges(size: int, n: int) -> list[Array]:
    """All combinations of n edges."""
    return [np.array(x, RAW[size // 8]) for x in zip(*itertools.product(EDGES[size], repeat=n), strict=True)]


def number(bits: int, kind: str) -> int:
    size = int(kind[1:])
    bits &= (1 << size) - 1
    return bits - (1 << size) if kind[0] == "s" and bits >> (size - 1) else bits


def expected(function: Callable[..., int], kind: str, arrays: list[Array], into: str = "") -> Array:
    size = int((into or kind)[1:])
    values = [function(*(number(int(x), kind) for x in row)) & ((1 << size) - 1) for row in zip(*arrays, strict=True)]
    return np.array(values, RAW[size // 8])


def floats(kind: str, n: int) -> list[Array]:
    """All combinations of n edges, as raw bits."""
    rows = zip(*itertools.product(FLOATS, repeat=n), strict=True)
    with np.errstate(over="ignore"):
        return [TYPES[kind].encode(np.array(x, np.float64 if kind == "f64" else np.float32)) for x in rows]


def nearest(exact: Fraction, kind: str) -> int:
    """The bits of the float nearest to a number that is not 0; ties to even."""
    size = TYPES[kind].size
    infinity = {"f32": 0x7F800000, "f64": 0x7FF << 52, "bf16": 0x7F80, "f16": 0x7C00}[kind]

    def value(bits: int) -> Fraction:
        if bits == infinity:  # as if the exponents went on
            return 2 * value(infinity - 1) - value(infinity - 2)
        return Fraction(float(TYPES[kind].decode(np.array([bits], RAW[size]))[0]))

    low, high = 0, infinity
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) <= abs(exact) else (low, middle)
    down, up = abs(exact) - value(low), value(high) - abs(exact)
    bits = low if down < up or (down == up and low % 2 == 0) else high
    return bits | (1 << (8 * size - 1) if exact < 0 else 0)


def assert_same(actual: Array, wanted: Array, *operands: Array) -> None:
    wrong = np.flatnonzero(actual != wanted)
    assert not len(wrong), [[hex(int(x[i])) for x in (*operands, actual, wanted)] for i in wrong[:4]]


KINDS = ("s32", "u32", "s64", "u64")


@pytest.mark.parametrize("kind", ("s16", "u16", *KINDS))
def test_integers_wrap(kind: str) -> None:
    a, b = edges(int(kind[1:]), 2)
    functions: dict[str, Callable[..., int]] = {"add": operator.add, "sub": operator.sub, "min": min, "max": max}
    for name, function in functions.items():
        assert_same(op(f"{name}.{kind}", a.itemsize, a, b), expected(function, kind, [a, b]), a, b)
    assert_same(op(f"mul.lo.{kind}", a.itemsize, a, b), expected(operator.mul, kind, [a, b]), a, b)
    if kind[0] == "s":
        (c,) = edges(int(kind[1:]), 1)
        assert_same(op(f"neg.{kind}", a.itemsize, c), expected(operator.neg, kind, [c]), c)
        assert_same(op(f"abs.{kind}", a.itemsize, c), expected(abs, kind, [c]), c)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_wide_or_wrap_with_their_sum(kind: str) -> None:
    a, b = edges(int(kind[1:]), 2)
    (c,) = edges(64, 1)
    if kind.endswith("32"):
        wide = kind[0] + "64"
        c = np.resize(c, len(a))
        assert_same(op(f"mul.wide.{kind}", 8, a, b), expected(operator.mul, kind, [a, b], wide), a, b)
        product = expected(operator.mul, kind, [a, b], wide)
        assert_same(op(f"mad.wide.{kind}", 8, a, b, c), product + c, a, b, c)
    product = expected(operator.mul, kind, [a, b])
    assert_same(op(f"mad.lo.{kind}", a.itemsize, a, b, a), product + a, a, b)


@pytest.mark.parametrize("kind", ("u32", "u64"))
def test_quotients(kind: str) -> None:
    a, b = edges(int(kind[1:]), 2)
    ones = (1 << int(kind[1:])) - 1
    assert_same(op(f"div.{kind}", a.itemsize, a, b), expected(lambda x, y: x // y if y else ones, kind, [a, b]), a, b)
    assert_same(op(f"rem.{kind}", a.itemsize, a, b), expected(lambda x, y: x % y if y else x, kind, [a, b]), a, b)


@pytest.mark.parametrize("size", (16, 32, 64))
def test_bits(size: int) -> None:
    kind = f"b{size}"
    a, b = edges(size, 2)
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        assert_same(op(f"{name}.{kind}", size // 8, a, b), expected(function, kind, [a, b]), a, b)
    assert_same(op(f"not.{kind}", size // 8, a), ~a, a)


@pytest.mark.parametrize("size", (16, 32, 64))
def test_shifts_beyond_the_width_leave_nothing_but_the_sign(size: int) -> None:
    values, shifts = EDGES[size], (0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 2**31, 2**32 - 1)
    a, by = zip(*itertools.product(values, shifts), strict=True)
    x, n = np.array(a, RAW[size // 8]), np.array(by, np.uint32)
    capped = np.minimum(n, size)
    for kind in (f"u{size}", f"s{size}", f"b{size}"):
        right = [number(int(v), kind) >> int(s) for v, s in zip(x, capped, strict=True)]
        wanted = np.array([v & ((1 << size) - 1) for v in right], x.dtype)
        assert_same(op(f"shr.{kind}", size // 8, x, n), wanted, x, n)
    left = [int(v) << int(s) & ((1 << size) - 1) for v, s in zip(x, capped, strict=True)]
    assert_same(op(f"shl.b{size}", size // 8, x, n), np.array(left, x.dtype), x, n)


@pytest.mark.parametrize("kind", ("u32", "s32"))
def test_bit_fields_end_with_the_word(kind: str) -> None:
    def field(x: int, start: int, length: int) -> int:
        """As the ISA writes it down."""
        start, length = start & 255, length & 255
        sign = 0 if kind[0] == "u" or length == 0 else x >> min(start + length - 1, 31) & 1
        out = 0
        for i in range(32):
            bit = x >> (start + i) & 1 if i < length and start + i <= 31 else sign
            out |= bit << i
        return out

    rows = itertools.product(EDGES[32], (0, 1, 5, 31, 32, 40, 256), (0, 1, 3, 31, 32, 33, 255))
    x, start, length = (np.array(column, np.uint32) for column in zip(*rows, strict=True))
    wanted = np.array([field(*map(int, row)) for row in zip(x, start, length, strict=True)], np.uint32)
    assert_same(op(f"bfe.{kind}", 4, x, start, length), wanted, x, start, length)


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


@pytest.mark.parametrize("kind", ("s16", "u16", *KINDS, "b32"))
def test_comparisons_of_integers(kind: str) -> None:
    a, b = edges(int(kind[1:]), 2)
    names = dict(COMPARISONS)
    if kind[0] == "b":
        names = {name: names[name] for name in ("eq", "ne")}
    if kind[0] == "u":
        names |= {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
    for name, function in names.items():
        wanted = [function(number(int(x), kind), number(int(y), kind)) for x, y in zip(a, b, strict=True)]
        assert_same(op(f"setp.{name}.{kind}", 0, a, b), np.array(wanted), a, b)


@pytest.mark.parametrize("kind", ("f32", "f64", "f16", "bf16"))
def test_comparisons_of_floats_say_what_they_do_with_nan(kind: str) -> None:
    a, b = floats(kind, 2)
    x, y = TYPES[kind].decode(a), TYPES[kind].decode(b)
    nan = np.isnan(x) | np.isnan(y)
    for name, function in COMPARISONS.items():
        ordered = np.array([function(*row) for row in zip(x, y, strict=True)])
        assert_same(op(f"setp.{name}.{kind}", 0, a, b), ordered & ~nan, a, b)
        assert_same(op(f"setp.{name}u.{kind}", 0, a, b), ordered | nan, a, b)
    assert_same(op(f"setp.num.{kind}", 0, a, b), ~nan, a, b)
    assert_same(op(f"setp.nan.{kind}", 0, a, b), nan, a, b)


def test_a_comparison_of_two_has_two_results_and_a_flushing_one_no_subnormals() -> None:
    a, b = np.array([0x3F800000, 0x00003F80, 0x3F803F80], np.uint32), np.array([0x3F803F80] * 3, np.uint32)
    assert op("setp.eq.bf16x2", 0, a, b, to="%p11|%p10").tolist() == [True, False, True]  # the high halves
    assert op("setp.eq.bf16x2", 0, a, b, to="%p10|%p11").tolist() == [False, True, True]
    small = np.array([1, 0x80000001], np.uint32)
    assert op("setp.eq.ftz.f32", 0, small, np.zeros(2, np.uint32)).all()
    assert not op("setp.eq.f32", 0, small, np.zeros(2, np.uint32)).any()


def canonical(values: Array) -> Array:
    size = values.dtype.itemsize
    bits: Array = np.where(np.isnan(values), RAW[size](NAN32 if size == 4 else NAN64), values.view(RAW[size]))
    return bits


@pytest.mark.parametrize("kind", ("f32", "f64"))
def test_sums_and_products_are_rounded_once_and_their_nan_is_one(kind: str) -> None:
    a, b = floats(kind, 2)
    x, y = TYPES[kind].decode(a), TYPES[kind].decode(b)
    with np.errstate(all="ignore"):
        for name, wanted in (("add", x + y), ("sub", x - y), ("mul", x * y)):
            for rounding in ("", ".rn"):
                assert_same(op(f"{name}{rounding}.{kind}", a.itemsize, a, b), canonical(wanted), a, b)
        assert_same(op(f"div.rn.{kind}", a.itemsize, a, b), canonical(x / y), a, b)


def flushed(x: Array) -> Array:
    zero: Array = np.copysign(np.float32(0), x)
    return np.where(np.abs(x) < np.float32(2**-126), zero, x)


def test_flushing_takes_subnormals_for_zero_before_and_after() -> None:
    a, b = floats("f32", 2)
    x, y = flushed(a.view(np.float32)), flushed(b.view(np.float32))
    with np.errstate(all="ignore"):
        for name, wanted in (("add", x + y), ("sub", x - y), ("mul", x * y)):
            assert_same(op(f"{name}.ftz.f32", 4, a, b), canonical(flushed(wanted)), a, b)
    assert_same(op("abs.ftz.f32", 4, a[~np.isnan(x)]).view(np.float32), np.abs(x[~np.isnan(x)]), a)
    half = np.array([0x00800000], np.uint32)  # the smallest normal number, times one half
    assert op("fma.rn.ftz.f32", 4, half, "0f3F000000", "0f80000000").tolist() == [0]
    assert op("fma.rn.f32", 4, half, "0f3F000000", "0f80000000").tolist() == [0x00400000]


def hard_products(kind: str, n: int = 250) -> list[Array]:
    """a, b, c whose a * b + c is near the middle between two floats, or cancels, or is subnormal."""
    random = np.random.default_rng(0)
    bits = {"f32": 24, "f64": 53, "bf16": 8, "f16": 11}[kind]
    a = random.integers(1 << bits - 1, 1 << bits, n).astype(np.float64) * (-1.0) ** random.integers(0, 2, n)
    b = random.integers(1 << bits - 1, 1 << bits, n).astype(np.float64)
    scale = {"f32": -70, "f64": -500, "bf16": -66, "f16": -11}[kind]
    tiny = random.integers(0, 3, n) == 0
    a, b = (
        np.where(tiny, np.ldexp(a, scale), np.ldexp(a, -bits)),
        np.where(tiny, np.ldexp(b, scale), np.ldexp(b, -bits)),
    )
    c = np.where(random.integers(0, 2, n) == 0, -(a * b), np.ldexp(a * b, random.integers(-bits - 3, bits + 3, n)))
    c = np.where(random.integers(0, 4, n) == 0, np.ldexp(1.0, random.integers(-20, 20, n)), c)
    u, half = 2.0 ** (1 - bits), bits // 2
    low, high = 2.0**-half * (1 + u), 2.0 ** (half - bits) * (1 - u)  # whose product is just below half of u
    rows = [(low, high, 1 + u), (low, -high, -1 - u), (-low, high, 1 + 3 * u)]  # so the third is the nearest
    rows += [(1.5, 1 + u, -(2.0**-24)), (-1.5, 1 + u, 2.0**-24), (1.5, 1 + 3 * u, 2.0**-24)]  # beside the middle
    rows += [] if kind == "f16" else [(x, y, z * 2.0**-60) for x, y, z in rows[3:]]
    a, b, c = (np.append(column, x) for column, x in zip(zip(*rows, strict=True), (a, b, c), strict=True))
    with np.errstate(over="ignore"):
        raw = [TYPES[kind].encode(x) for x in (a, b, c)]
    finite = np.all([np.isfinite(TYPES[kind].decode(x)) for x in raw], axis=0)
    return [x[finite][:100] for x in raw]


@pytest.mark.parametrize("kind", ("f32", "f64", "bf16", "f16"))
def test_fma_rounds_once(kind: str) -> None:
    a, b, c = hard_products(kind)
    if kind == "f64":  # whose products of subnormal tails are not exact
        keep = np.abs(a.view(np.float64) * b.view(np.float64)) > 2.0**-900
        a, b, c = a[keep], b[keep], c[keep]
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(*(TYPES[kind].decode(v) for v in (a, b, c)), strict=True)
    ]
    wanted = np.array([nearest(x, kind) if x else 0 for x in exact], a.dtype)
    assert_same(op(f"fma.rn.{kind}", a.itemsize, a, b, c), wanted, a, b, c)
    if kind in ("f32", "f64"):
        assert_same(op(f"contracted.add.{kind}", a.itemsize, a, b, c), wanted, a, b, c)
        negative = c ^ a.dtype.type(1 << (8 * a.itemsize - 1))
        assert_same(op(f"contracted.sub.{kind}", a.itemsize, a, b, negative), wanted, a, b, c)
        opposite = a ^ a.dtype.type(1 << (8 * a.itemsize - 1))
        assert_same(op(f"contracted.from.{kind}", a.itemsize, opposite, b, c), wanted, a, b, c)
    if kind == "bf16":  # nearer to 1 than to 1 + 2^-7 by 2^-30, which float32 does not hold
        assert op("fma.rn.bf16", 2, np.array([0x3F80], np.uint16), "0x3B80", "0x3F80").tolist() == [0x3F80]
        assert op("fma.rn.bf16", 2, np.array([0x3F81], np.uint16), "0x3B80", "0x3F80").tolist() == [0x3F81]


def test_products_of_short_floats_are_rounded_once() -> None:
    for kind, wide in (("bf16", "bf16x2"), ("f16", "f16x2")):
        a, b, _ = hard_products(kind)
        exact = [
            Fraction(float(x)) * Fraction(float(y))
            for x, y in zip(*(TYPES[kind].decode(v) for v in (a, b)), strict=True)
        ]
        wanted = np.array([nearest(x, kind) for x in exact], np.uint16)
        assert_same(op(f"mul.{kind}", 2, a, b), wanted, a, b)
        pairs = [v.view(np.uint32) for v in (a, b, wanted)]
        assert_same(op(f"mul.{wide}", 4, *pairs[:2]), pairs[2], *pairs[:2])


def test_two_floats_in_a_register_are_two() -> None:
    a, b, c = (x.view(np.uint64) for x in hard_products("f32"))
    halves = [x.view(np.uint32) for x in (a, b, c)]
    for name in ("add", "sub", "mul"):
        wanted = op(f"{name}.f32", 4, *halves[:2]).view(np.uint64)
        assert_same(op(f"{name}.f32x2", 8, a, b), wanted, a, b)
    assert_same(op("fma.rn.f32x2", 8, a, b, c), op("fma.rn.f32", 4, *halves).view(np.uint64), a, b, c)
    two = (np.array([0x3F80], np.uint32) << 16 | 0x4000).astype(np.uint32)  # 1 above 2
    assert op("fma.rn.bf16x2", 4, two, two, two).tolist() == [0x40000000 | 0x40C0]


def test_a_short_float_is_added_to_a_float32_as_it_is() -> None:
    h, x = np.array([0x3F80, 0x7F80, 0x0001], np.uint16), np.array([0x33800000, 0x3F800000, 0x80000000], np.uint32)
    one_and = np.array([0x3F800000, 0x7F800000, 0x00010000], np.uint32)
    assert_same(op("add.rn.f32.bf16", 4, h, x), one_and, h, x)
    assert op("sub.rn.f32.bf16", 4, h[:1], np.array([0x3F800000], np.uint32)).tolist() == [0]
    half = np.array([0x3C00], np.uint16)
    assert op("add.rn.f32.f16", 4, half, np.array([0x3F800000], np.uint32)).tolist() == [0x40000000]
    assert op("sub.rn.f32.f16", 4, half, np.array([0x40000000], np.uint32)).tolist() == [0xBF800000]


@pytest.mark.parametrize("kind", ("f32", "f64"))
def test_extremes_leave_nan_out_and_know_the_sign_of_zero(kind: str) -> None:
    a, b = floats(kind, 2)
    x, y = TYPES[kind].decode(a), TYPES[kind].decode(b)

    def chosen(least: bool, both: bool) -> Array:
        out = []
        for u, v in zip(x, y, strict=True):
            numbers = [w for w in (u, v) if not np.isnan(w)]
            pick = (min if least else max)(numbers, key=lambda w: (w, not np.signbit(w)), default=np.nan)
            out.append(np.nan if both and len(numbers) < 2 else pick)
        return canonical(np.array(out, x.dtype))

    for name in ("min", "max"):
        assert_same(op(f"{name}.{kind}", a.itemsize, a, b), chosen(name == "min", False), a, b)
        if kind == "f32":
            assert_same(op(f"{name}.NaN.f32", 4, a, b), chosen(name == "min", True), a, b)
            three = op(f"{name}.f32", 4, a, b, "0f3F800000")
            assert_same(three, op(f"{name}.f32", 4, op(f"{name}.f32", 4, a, b), "0f3F800000"), a, b)
    small = np.array([1], np.uint32)
    assert op("max.ftz.f32", 4, small, "0f80000000").tolist() == [0]


def test_signs_change_whatever_the_number() -> None:
    for kind, top in (("f32", 1 << 31), ("f64", 1 << 63)):
        (a,) = floats(kind, 1)
        a = a[~np.isnan(TYPES[kind].decode(a))]
        assert_same(op(f"neg.{kind}", a.itemsize, a), a ^ a.dtype.type(top), a)
        assert_same(op(f"abs.{kind}", a.itemsize, a), a & a.dtype.type(top - 1), a)


def test_approximations_are_near_and_exact_where_they_must_be() -> None:
    x = np.array([0, -0.0, 1, -1, 10, -126, -127, 128, np.inf, -np.inf], np.float32)
    wanted = np.array([1, 1, 2, 0.5, 1024, 2.0**-126, 0, np.inf, np.inf, 0], np.float32)
    assert_same(op("ex2.approx.ftz.f32", 4, x.view(np.uint32)), wanted.view(np.uint32))
    assert op("ex2.approx.ftz.f32", 4, np.array([0x7FC00000], np.uint32)).tolist() == [NAN32]
    y = np.array([0.3, -17.25], np.float32)
    near = op("ex2.approx.ftz.f32", 4, y.view(np.uint32)).view(np.float32)
    assert np.allclose(near, np.exp2(y.astype(np.float64)), rtol=2.0**-22)
    third = op("div.full.f32", 4, np.array([1, 1], np.float32).view(np.uint32), np.array([3, 0], np.float32).view("u4"))
    assert third.view(np.float32)[0] == np.float32(1 / 3) and third.view(np.float32)[1] == np.inf
    z = np.array([1.5, -3.0, 0.0, np.inf, 1e-310], np.float64)
    gross = op("rcp.approx.ftz.f64", 8, z.view(np.uint64))
    assert (gross & np.uint64(0xFFFFFFFF) == 0).all()
    found = gross.view(np.float64)
    assert np.allclose(found[:2], 1 / z[:2], rtol=2.0**-19) and found[2] == np.inf and found[3] == 0
    assert found[4] == np.inf  # of a subnormal number, which is 0


def test_integers_are_extended_by_their_sign_or_cut() -> None:
    a = np.array(EDGES[32], np.uint32)
    assert_same(op("cvt.u64.u32", 8, a), a.astype(np.uint64), a)
    assert_same(op("cvt.s64.s32", 8, a), a.view(np.int32).astype(np.int64).view(np.uint64), a)
    b = np.array(EDGES[64], np.uint64)
    assert_same(op("cvt.u32.u64", 4, b), b.astype(np.uint32), b)
    assert_same(op("cvt.s64.s32", 8, b), b.astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64), b)
    c = np.array(EDGES[16], np.uint16)
    assert_same(op("cvt.u32.u16", 4, c), c.astype(np.uint32), c)
    assert_same(op("cvt.s32.s16", 4, c), c.view(np.int16).astype(np.int32).view(np.uint32), c)


@pytest.mark.parametrize("kind", KINDS)
def test_integers_become_the_nearest_float(kind: str) -> None:
    size = int(kind[1:])
    values = (
        *EDGES[size],
        2**24 + 1,
        2**24 + 3,
        2**31 - 64,
        2**31 - 65,
        *((2**53 + 1, 2**53 + 3) if size == 64 else ()),
    )
    a = np.array(values, RAW[size // 8])
    for into in ("f32", "f64"):
        exact = [number(int(x), kind) for x in a]
        wanted = np.array([nearest(Fraction(x), into) if x else 0 for x in exact], RAW[TYPES[into].size])
        assert_same(op(f"cvt.rn.{into}.{kind}", TYPES[into].size, a), wanted, a)


@pytest.mark.parametrize(("into", "of"), [("f32", "f64"), ("bf16", "f32"), ("f16", "f32")])
def test_floats_become_the_nearest_shorter_one(into: str, of: str) -> None:
    random, size = np.random.default_rng(1), TYPES[of].size
    a = random.integers(0, 1 << 62, 200, np.uint64).astype(RAW[size])
    shift = {"f32": 29, "bf16": 16, "f16": 13}[into]  # every fourth in the middle between two
    a[::4] = (a[::4] >> shift << shift) | RAW[size](1 << (shift - 1))
    exponent = {"f32": (1, 2046), "bf16": (0, 254), "f16": (100, 144)}[into]
    mantissa = {"f64": 52, "f32": 23}[of]
    a = (a & RAW[size]((1 << mantissa) - 1)) | (random.integers(*exponent, 200).astype(RAW[size]) << mantissa)
    a[1::2] |= RAW[size](1 << (8 * size - 1))
    with np.errstate(over="ignore"):
        exact = [Fraction(float(x)) for x in TYPES[of].decode(a)]
    wanted = np.array([nearest(x, into) for x in exact], RAW[TYPES[into].size])
    assert_same(op(f"cvt.rn.{into}.{of}", TYPES[into].size, a), wanted, a)
    special = TYPES[of].encode(np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float64))
    nan = {"f32": NAN32, "bf16": 0x7FFF, "f16": 0x7FFF}[into]
    top = {"f32": 0x7F800000, "bf16": 0x7F80, "f16": 0x7C00}[into]
    minus = 1 << (8 * TYPES[into].size - 1)
    assert op(f"cvt.rn.{into}.{of}", TYPES[into].size, special).tolist() == [0, minus, top, minus | top, nan]


def test_floats_become_longer_as_they_are() -> None:
    every = np.arange(1 << 16, dtype=np.uint32)[::37].astype(np.uint16)
    wide = every.astype(np.uint32) << 16
    assert_same(op("cvt.f32.bf16", 4, every), wide, every)
    number_ = every[~np.isnan(every.view(np.float16))]
    assert_same(op("cvt.f32.f16", 4, number_).view(np.float32), number_.view(np.float16).astype(np.float32), number_)
    (a,) = floats("f32", 1)
    a = a[~np.isnan(a.view(np.float32))]
    assert_same(op("cvt.f64.f32", 8, a).view(np.float64), a.view(np.float32).astype(np.float64), a)


def test_two_floats_become_short_the_first_above() -> None:
    one, two = np.array([0x3F800000], np.uint32), np.array([0x40000000], np.uint32)
    assert op("cvt.rn.bf16x2.f32", 4, one, two).tolist() == [0x3F804000]
    assert op("cvt.rn.f16x2.f32", 4, one, two).tolist() == [0x3C004000]


def test_predicates_and_choices() -> None:
    p, q = np.array([False, False, True, True]), np.array([False, True, False, True])
    assert op("and.pred", 0, p, q).tolist() == [False, False, False, True]
    assert op("or.pred", 0, p, q).tolist() == [False, True, True, True]
    assert op("xor.pred", 0, p, q).tolist() == [False, True, True, False]
    assert op("not.pred", 0, p).tolist() == [True, True, False, False]
    assert op("mov.pred", 0, "-1").tolist() == [True]
    for size, x, y in ((2, 7, 9), (4, 0x7F800001, 9), (8, 1 << 63, 9)):  # a NaN passes as it is
        a, b = np.full(2, x, RAW[size]), np.full(2, y, RAW[size])
        for letter in "b" if size == 2 else "bf":
            assert op(f"selp.{letter}{8 * size}", size, a, b, np.array([True, False])).tolist() == [x, y]


def test_moves_take_registers_apart_and_put_them_together() -> None:
    x = np.array([0x1122334455667788], np.uint64)
    assert op("mov.b64", 4, x, to="{%r10, %r11}").tolist() == [0x55667788]
    assert op("mov.b64", 4, x, to="{_, %r10}").tolist() == [0x11223344]
    assert op("mov.b32", 2, x.astype(np.uint32), to="{%h11, %h10}").tolist() == [0x5566]
    out = np.zeros(1, np.uint64)
    run("mov.b32 %r1, 1; mov.u32 %r2, 0x2; mov.b64 %d1, {%r1, %r2}; st.global.b64 [%d0], %d1;", out, threads=1)
    assert out.tolist() == [2 << 32 | 1]
    assert op("mov.b16", 2, "-128").tolist() == [0xFF80]


@pytest.mark.parametrize("how", ("bfly", "idx"))
def test_shuffles(how: str) -> None:
    x = np.arange(64, dtype=np.uint32) * 3
    other = np.arange(64) ^ 5 if how == "bfly" else np.arange(64) // 32 * 32 + 5
    assert op(f"shfl.sync.{how}.b32", 4, x, "5", "31", "-1").tolist() == x[other].tolist()


def test_a_warp_s_least_and_greatest() -> None:
    x = np.arange(64, dtype=np.int32) * 7 % 64 - 32
    raw = x.view(np.uint32)
    for name, function in (("min", np.min), ("max", np.max)):
        wanted = np.repeat([function(x[:32]), function(x[32:])], 32)
        assert op(f"redux.sync.{name}.s32", 4, raw, "-1").view(np.int32).tolist() == wanted.tolist()
        assert_same(op(f"redux.sync.{name}.u32", 4, raw, "-1")[:32], np.full(32, function(raw[:32])))
    y = x.astype(np.float32)
    y[3], y[40:] = np.nan, -0.0
    y[32:40], y[41] = -0.0, 0.0
    found = op("redux.sync.max.f32", 4, y.view(np.uint32), "-1")
    assert found.view(np.float32)[0] == np.nanmax(y[:32]) and found[32] == 0
    found = op("redux.sync.min.f32", 4, y.view(np.uint32), "-1")
    assert found.view(np.float32)[0] == np.nanmin(y[:32]) == -32 and found[32] == 0x80000000
    assert op("redux.sync.max.NaN.f32", 4, y.view(np.uint32), "-1")[0] == NAN32
    assert op("redux.sync.min.f32", 4, np.full(32, 0x7FC00001, np.uint32), "-1")[0] == NAN32


def test_loads_extend_and_stores_cut() -> None:
    given, out = np.array([0xFF, 0x80, 0x01, 0x7F] * 2, np.uint8), np.zeros(4, np.uint64)
    body = "ld.global.s8 %r1, [%d0+1]; ld.global.b8 %h1, [%d0]; ld.global.s32 %d5, [%d0]; ld.global.u32 %d6, [%d0];"
    body += "cvt.s64.s32 %d7, %r1; cvt.u64.u16 %d8, %h1; st.global.v2.b64 [%d1], {%d7, %d8};"
    run(body + "st.global.v2.b64 [%d1+16], {%d5, %d6}; st.global.b8 [%d1+31], %h1;", given, out, threads=1)
    word = 0x7F0180FF
    assert out.tolist() == [2**64 - 128, 0xFF, word, 0xFF << 56 | word]


def test_matrices_lie_by_rows_and_in_lanes_by_fours() -> None:
    """Row 3 of the second matrix lies where lane 11 says; its last 4 bytes are lane 15's."""
    out = np.zeros((4, 8, 4), np.uint32)
    move = "mad.wide.u32 %d9, %r0, 16, %d0; shl.b32 %r8, %r0, 4; xor.b32 %r9, %r8, 16; "  # neighbours swapped
    names = [f"%r{k + 1}" for k in range(4)]
    fill = " ".join(f"add.s32 {name}, %r0, {100 * k};" for k, name in enumerate(names))
    registers = "{" + ", ".join(names) + "}"
    for before, after in (("9", "8"), ("8", "9")):
        store = f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r{before}], {registers}; bar.sync 0;"
        load = f"ld.shared.v4.b32 {registers}, [%r{after}]; st.global.v4.b32 [%d9], {registers};"
        assert not run(move + fill + store + load, out, shared=512).faults
        assert (out == 100 * np.arange(4)[:, None, None] + np.arange(32).reshape(8, 4)[np.arange(8) ^ 1]).all()
    store = f"st.shared.v4.b32 [%r8], {registers}; bar.sync 0;"
    load = "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r5, %r6}, [%r9];"
    assert not run(move + fill + store + load + "st.global.v2.b32 [%d9], {%r5, %r6};", out, shared=512).faults
    rows = out.reshape(32, 4)[:, :2]  # by lanes; each row holds its number and hundreds
    lanes = np.arange(32)
    for k in range(2):
        assert (rows[:, k] == (8 * k + (lanes // 4 ^ 1)) + 100 * (lanes % 4)).all()
    some = "setp.lt.u32 %p1, %r0, 16; @%p1 "
    one = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [{}], {{%r0}};"
    assert run(move + some + one.format("%r8"), shared=512).kinds == {"absent"}
    assert run(move + one.format("%r8+4"), shared=512).kinds == {"alignment"}
    tested.update(("ldmatrix.sync.aligned.m8n8.x2.shared.b16", "stmatrix.sync.aligned.m8n8.x4.shared.b16"))


def test_hints_change_nothing() -> None:
    given, out = np.arange(4, dtype=np.uint32), np.zeros(4, np.uint32)
    policy = "createpolicy.fractional.L2::evict_first.b64 %d5, 1.0; "
    load = "ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+0], %d5; "
    run(policy + load + "st.global.L1::evict_last.v4.b32 [%d1], {%r1, %r2, %r3, %r4};", given, out, threads=1)
    assert out.tolist() == given.tolist()
    tested.update(("createpolicy.fractional.L2::evict_first.b64", "ld.global.b32", "st.global.b32"))


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r1, %r2, %r3",
        "cvt.rzi.s32.f32 %r1, %r2",
        "cvt.rn.relu.bf16x2.f32 %r1, %r2, %r3",
        "cvt.rn.sat.f16.f32 %h1, %r2",
        "setp.eq.and.s32 %p1, %r1, %r2, %p2",
        "setp.lo.s32 %p1, %r1, %r2",
        "setp.lt.b32 %p1, %r1, %r2",
        "ld.volatile.global.b32 %r1, [%d0]",
        "ld.global.nc.b32 %r1, [%d0]",
        "ld.b32 %r1, [%d0]",
        "ld.local.b32 %r1, [%d0]",
        "ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%d0]",
        "st.release.gpu.global.b32 [%d0], %r1",
        "st.global.L2::cache_hint.b32 [%d0], %r1",
        "atom.global.add.u32 %r1, [%d0], %r2",
        "cp.async.cg.shared.global [%r1], [%d0], 16",
        "shfl.sync.up.b32 %r1, %r2, 1, 0, -1",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 7, -1",
        "bar.sync 1",
        "bar.arrive 0, 64",
        "ex2.approx.f32 %r1, %r2",
        "mul.rz.f32 %r1, %r2, %r3",
        "fma.rn.sat.f32 %r1, %r2, %r3, %r4",
        "add.ftz.f64 %d1, %d2, %d3",
        "add.f32 %r1, %r2, 1",
        "add.s32 %r1, %r2, 4294967296",
        "add.s32 %r1, %d2, %r3",
        "add.s32 %d1, %r2, %r3",
        "add.s32 %r1, %r2",
        "add.s32 %r1, %r2, %unknown",
        "mov.u32 %r1, %smid",
        "mov.b32 %r1, 0d3FF0000000000000",
        "bra nowhere",
        "call.uni f",
        ".reg .b32 %r<5>; .shared .b8 a[4]",
    ],
)
def test_what_is_not_modelled_is_an_error(line: str) -> None:
    with pytest.raises(Unmodelled):
        run(line + ";", np.zeros(8, np.uint32))


def test_every_form_is_tested() -> None:
    """The tests above are run again here, since each may run in a process of its own."""
    for name, test in list(globals().items()):
        if name.startswith("test_") and name != "test_every_form_is_tested":
            marks = getattr(test, "pytestmark", [])
            for parameters in marks[0].args[1] if marks else [()]:
                test(*(parameters if isinstance(parameters, tuple) else (parameters,)))
    elsewhere = {"bra", "ret", "bar.sync", "ld.param.b64"}  # test_ptx_checks.py
    left = [form.pattern for form, _ in FORMS if not any(form.fullmatch(x) for x in tested | elsewhere)]
    assert not left

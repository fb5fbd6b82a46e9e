"""Types: how many bytes a value has, what its bits mean, and how a result becomes bits.

`decode` makes of raw bits [n] what is computed with: integers and floats [n], bfloat16 and float16 as float32, and of
two values in a register [n, 2]. `encode` is the way back, rounded to nearest even, NaN as a GPU writes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NAN: dict[str, Any] = {"f32": np.uint32(0x7FFFFFFF), "f64": np.uint64(0x7FFFFFFFFFFFFFFF)}


class Type(NamedTuple):
    size: int  # bytes; 0 of a predicate
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]
    is_float: bool = False


def to_odd(total: Array, error: Array) -> Array:
    """A float64 sum and what it was rounded by: of the two float64 beside the exact one that with the odd last bit,
    which rounds to any shorter format as the exact one does."""
    inexact = (error != 0) & np.isfinite(total) & (total.view(np.uint64) & np.uint64(1) == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, (total.view(np.int64) + step).view(np.float64), total)


def bfloat16_bits(x: Array) -> Array:
    """The nearest, ties to even, of float32 or float64."""
    short = np.asarray(x).astype(np.float32)
    if x.dtype == np.float64:  # by way of a float32 rounded to odd
        wide = short.astype(np.float64)
        even = (wide != x) & np.isfinite(wide) & (short.view(np.uint32) & 1 == 0)
        up = (np.abs(x) > np.abs(wide)) | (short == 0)
        step = np.where(up, 1, -1).astype(np.int32)
        short = np.where(even, (short.view(np.int32) + step).view(np.float32), short)
    bits = np.ascontiguousarray(short).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(short), np.uint32(0x7FFF), rounded).astype(np.uint16)


def bfloat16_value(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float16_bits(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def _plain(size: int, dtype: Any) -> Type:
    """decode and encode are views."""
    is_float = np.issubdtype(dtype, np.floating)
    return Type(
        size,
        lambda raw: raw.view(dtype),
        lambda x: np.ascontiguousarray(x, dtype).view(RAW[size]),
        is_float,
    )


def _pair(single: Type) -> Type:
    def decode(raw: Array) -> Array:
        return single.decode(np.ascontiguousarray(raw).view(RAW[single.size])).reshape(-1, 2)

    def encode(x: Array) -> Array:
        return np.ascontiguousarray(single.encode(x.reshape(-1))).view(RAW[2 * single.size])

    return Type(2 * single.size, decode, encode, True)


TYPES = {"pred": Type(0, lambda raw: raw, lambda x: x.astype(bool))}
for _size in RAW:
    for _letter, _kind in (("b", "u"), ("u", "u"), ("s", "i")):
        TYPES[f"{_letter}{8 * _size}"] = _plain(_size, np.dtype(f"{_kind}{_size}"))
TYPES |= {
    "f32": _plain(4, np.float32),
    "f64": _plain(8, np.float64),
    "f16": Type(2, lambda raw: raw.view(np.float16).astype(np.float32), float16_bits, True),
    "bf16": Type(2, bfloat16_value, bfloat16_bits, True),
}
TYPES |= {f"{name}x2": _pair(TYPES[name]) for name in ("f32", "f16", "bf16")}

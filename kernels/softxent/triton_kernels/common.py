"""What the kernels share: exp, log1p, scalars, and one step of the running maximum."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x. In float32 as exp2 with log2(e) folded in: one instruction, where tl.exp takes five."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        e = tl.exp2(x * LOG2E)
    return e


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to a few ulp for tiny x too: Kahan's log(w) * x / (w - 1), where w = fl(1 + x)."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A float argument as `dtype`. The sum is for the interpreter, where it is a Python float still: no .to()."""
    return (value + tl.zeros((), dtype)).to(dtype)


@triton.jit
def finite_or_zero(m):
    """The running maximum as a shift: 0 while only -inf was seen, since -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)

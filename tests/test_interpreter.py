"""Triton's interpreter as the tests quicken it computes what Triton's own does."""

import itertools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="of the interpreter")

NUMBERS = (0, 2, -3, 2**31, -(2**40), True, 0.5, -0.0, 1e-45, 1e300, float("inf"))


def tensors() -> list[Any]:
    """Scalars and blocks of types that operands are promoted among."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    made = []
    for dtype in (tl.int1, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64):
        for shape in ((), (4,), (1, 4), (4, 1), (1,)):
            data = (np.arange(np.prod(shape or (1,))) % 2 + 1).reshape(shape or (1,)).astype(_get_np_dtype(dtype))
            type = tl.block_type(dtype, list(shape)) if shape else dtype
            made.append(tl.tensor(TensorHandle(data, dtype), type))
    return made


def seen(value: Any) -> Any:
    data = value.handle.data
    return str(value.type), value.handle.dtype, data.dtype, data.shape, data.tobytes()


def test_operands_are_promoted_as_triton_promotes_them() -> None:
    from triton.runtime.interpreter import interpreter_semantic

    import quick_interpreter

    at_once, everything = 0, [*tensors(), *NUMBERS]
    with np.errstate(over="ignore"):
        for left, right in itertools.product(everything, repeat=2):
            found = quick_interpreter.of_one_type(left, right)
            at_once += found is not None
            for divides in (False, True) if found else ():
                expected = quick_interpreter.promote(interpreter_semantic, left, right, False, False, True, divides)
                for mine, tritons in zip(found, expected, strict=True):
                    assert seen(mine) == seen(tritons), (left, right)
    assert at_once > 200


def test_a_kernel_computes_the_same_at_once() -> None:
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, out_ptr, scalar, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, BLOCK)
        x, y, first = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(x_ptr)
        tl.store(out_ptr + i, x - y)
        tl.store(out_ptr + BLOCK + i, x / y)
        tl.store(out_ptr + 2 * BLOCK + i, (1 - x) * scalar + 3)
        tl.store(out_ptr + 3 * BLOCK + i, 2.0 / x - first)
        tl.store(out_ptr + 4 * BLOCK + i, first / x + 1 - i)
        tl.store(out_ptr + 5 * BLOCK + i, tl.where(x < y, x, 0.25))
        tl.store(out_ptr + 6 * BLOCK + i, tl.where(x < first, first, y))
        tl.store(out_ptr + 7 * BLOCK + i, tl.where(x < y, first, 0.5))

    for dtype in (torch.float32, torch.float64):
        x, y = torch.randn(2, 8, dtype=dtype)
        i = torch.arange(8)
        out = torch.empty(8, 8, dtype=dtype)
        kernel[(1,)](x, y, out, 0.7, BLOCK=8)
        scalar = torch.tensor(0.7, dtype=dtype)
        expected = (
            x - y,
            x / y,
            (1 - x) * scalar + 3,
            2 / x - x[0],
            x[0] / x + 1 - i,
            x.where(x < y, 0.25),
            torch.where(x < x[0], x[0], y),
            torch.where(x < y, x[0], 0.5),
        )
        assert torch.equal(out, torch.stack(expected))

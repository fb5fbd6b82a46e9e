"""Triton's interpreter as the tests quicken it computes what Triton's own does."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="of the interpreter")

NUMBERS = (0, 2, -3, 2**31, -(2**40), True, 0.5, -0.0, 1e-45, 1e300, float("inf"))


def tensors(*dtypes: Any) -> list[Any]:
    """Scalars and blocks of these types, and scalars as the interpreter makes them of arguments and comparisons."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    made = []
    for dtype in dtypes:
        for shape in ((), (4,), (1, 4), (4, 1), (1,)):
            data = (np.arange(np.prod(shape or (1,))) % 2 + 1).reshape(shape or (1,)).astype(_get_np_dtype(dtype))
            type = tl.block_type(dtype, list(shape)) if shape else dtype
            made.append(tl.tensor(TensorHandle(data, dtype), type))
    if tl.int64 in dtypes:
        made.append(tl.tensor(TensorHandle(np.array([2**32 - 1], np.uint32), tl.int64), tl.int64))
    if tl.int1 in dtypes:
        made.append(tl.tensor(TensorHandle(np.array([True]), tl.int32), tl.int1))
    return made


def outcome(function: Any, *args: Any) -> Any:
    """What a function gives, or the exception that it raises."""
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = function(*args)
    except Exception as error:
        return type(error), str(error)
    if found is None:
        return None
    return [
        (str(value.type), value.handle.data.dtype, value.handle.data.shape, value.handle.data.tobytes())
        for value in (found if isinstance(found, tuple) else (found,))
    ]


def test_operands_are_promoted_as_triton_promotes_them() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_semantic

    import quick_interpreter

    dtypes = tl.int1, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64
    at_once = 0
    for left, right in itertools.product([*tensors(*dtypes), *NUMBERS], repeat=2):
        at_once += outcome(quick_interpreter.of_one_type, left, right) is not None
        for divides in (False, True):
            args = interpreter_semantic, left, right, False, False, True, divides
            assert outcome(quick_interpreter.operands, *args) == outcome(quick_interpreter.promote, *args)
    assert at_once > 200


def test_floats_are_added_and_multiplied_as_triton_does() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_semantic

    import quick_interpreter

    methods = quick_interpreter.arithmetic_at_once()
    floats = tensors(tl.float32, tl.float64)
    at_once = 0
    for left, right in itertools.product(floats, [*floats, *NUMBERS]):
        if outcome(quick_interpreter.of_one_type, left, right) is None:
            continue
        at_once += 1
        for name in ("add", "sub", "mul", "truediv"):
            tritons, more = getattr(interpreter_semantic, name), (() if name == "truediv" else (True,))
            assert outcome(methods[f"__{name}__"], left, right) == outcome(tritons, left, right, *more)
            assert outcome(methods[f"__r{name}__"], left, right) == outcome(tritons, right, left, *more)
    assert at_once > 50


def test_where_chooses_as_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_semantic

    import quick_interpreter

    values = [*tensors(tl.int32, tl.float32), 0.5, -3]
    cases = list(itertools.product(tensors(tl.int1, tl.int32), values, values))
    found = [outcome(quick_interpreter.choose, interpreter_semantic, *case) for case in cases]
    monkeypatch.setattr(quick_interpreter.Semantic, "binary_op_type_checking_impl", quick_interpreter.promote)
    assert found == [outcome(quick_interpreter.where, interpreter_semantic, *case) for case in cases]


KERNELS = """
import torch
import triton
import triton.language as tl
from triton.language import core

@triton.jit
def of_tl(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    tl.store(out_ptr, tl.sum(x, 0) + tl.max(x, 0))

@triton.jit
def of_both(x_ptr, out_ptr):
    x = core.load(x_ptr + tl.arange(0, 4))
    core.store(out_ptr, tl.sum(x, 0) + tl.max(x, 0))
"""
LAUNCHES = """
import interpreter
interpreter.install()
import torch
import kernels_of_tl
import kernels_of_both

x, out = torch.arange(4.0), torch.zeros(2)
for i, kernel in enumerate((kernels_of_tl.of_tl, kernels_of_both.of_both, kernels_of_tl.of_tl)):
    kernel[(1,)](x, out[i % 2])
print(*out.tolist())
"""


def test_the_language_is_patched_whatever_was_launched_before(tmp_path: Path) -> None:
    """tl.sum and tl.max know both names of the language, where a kernel before them knows one."""
    (tmp_path / "kernels_of_both.py").write_text(KERNELS)
    (tmp_path / "kernels_of_tl.py").write_text(KERNELS.replace("from triton.language import core\n", ""))
    folders = os.pathsep.join(str(folder) for folder in (tmp_path, Path(__file__).parent))
    env = os.environ | {"PYTHONPATH": folders, "TRITON_INTERPRET": "1"}
    process = subprocess.run([sys.executable, "-c", LAUNCHES], env=env, capture_output=True, text=True)
    assert process.stdout.split() == ["9.0", "9.0"], process.stderr[-2000:]


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

"""Triton's interpreter, made to notice what it lets pass, and the launches counted.

    rounding     float32 to bfloat16 truncates there, float64 loses all; a GPU rounds to nearest even. So it does here
    reductions   with a function of ours are done value by value in Python there; here pair by pair, all pairs at once
    bfloat16     is added and multiplied as the integers that its bits are; here as floats, rounded
    fma          is two roundings there; here, as on a GPU, one
    names        of the language that a module has under its own, `cast = tl.cast`, work too
    bounds       a pointer outside the tensors of the launch reads whatever is there; here it is an error
    launches()   the names of the kernels launched meanwhile

Works with Triton 3.6 to 3.9. Import after TRITON_INTERPRET=1 is set.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

import quick_interpreter

Builder = triton_interpreter.InterpreterBuilder
Grid = triton_interpreter.GridExecutor
_launched: list[str] = []
_bounds: list[tuple[int, int]] = []


class OutOfBounds(Exception):
    pass


def install() -> None:
    """Once a process."""
    apply_impl = triton_interpreter.ReduceOps.apply_impl
    cast, call = Builder.cast_impl, Grid.__call__
    load, store = Builder.create_masked_load, Builder.create_masked_store
    binary_op = Builder.binary_op

    def get_bf16(self: Any, value: Any) -> Any:
        return triton_interpreter.TensorHandle(round_to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary_op(self, left, right, op)
        out = op(from_bfloat16(left.data), from_bfloat16(right.data))
        return triton_interpreter.TensorHandle(out if out.dtype == bool else round_to_bfloat16(out), tl.bfloat16)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar in (tl.float32, tl.float64) and to.scalar == tl.bfloat16:
            return triton_interpreter.TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, to)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = np.longdouble if x.data.dtype == np.float64 else np.float64
        exact = np.asarray(x.data, wide) * np.asarray(y.data, wide) + np.asarray(z.data, wide)
        return triton_interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    def reduce(self: Any, inputs: Any) -> Any:
        values = inputs[0] if isinstance(inputs, tuple) else inputs
        if not self.combine_fn.fn.__module__.startswith("triton."):
            out = reduce_in_pairs(self, (values,) if values is inputs else inputs)
            return out[0] if values is inputs else out
        if values.dtype.scalar == tl.bfloat16 and (values is inputs or len(inputs) == 1):
            wide = self.to_tensor(from_bfloat16(values.handle.data), tl.float32)
            out = apply_impl(self, wide if values is inputs else (wide,))
            return self.to_tensor(round_to_bfloat16(out.handle.data), tl.bfloat16)
        return apply_impl(self, inputs)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check_bounds(pointers, mask)
        return load(self, pointers, as_bool(mask), *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check_bounds(pointers, mask)
        return store(self, pointers, value, as_bool(mask), *rest)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        _launched.append(self.fn.__name__)
        bind_late(self.fn.__globals__)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))  # some come in tuples
        storages = [value.untyped_storage() for value in leaves if isinstance(value, torch.Tensor)]
        _bounds[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # -inf - -inf and the like are tested by their results
            return call(self, *args, **kwargs)

    Builder.cast_impl, Builder.create_fma = cast_impl, create_fma
    Builder.get_bf16, Builder.binary_op = get_bf16, binary
    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    triton_interpreter.ReduceOps.apply_impl = reduce
    Grid.__call__ = launch
    quick_interpreter.install()


def reduce_in_pairs(reduction: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Neighbours are combined, then what came of them with its neighbour, until one is left: in order, as it need not
    commute."""
    dtypes, axis = [value.dtype for value in inputs], reduction.axis
    left = [
        np.moveaxis(value.handle.data, axis, 0) if axis is not None else value.handle.data.ravel() for value in inputs
    ]
    while len(left[0]) > 1:
        pairs = [
            reduction.to_tensor(data[i::2], dtype) for i in (0, 1) for data, dtype in zip(left, dtypes, strict=True)
        ]
        out = reduction.combine_fn.fn(*pairs)
        left = [value.handle.data for value in (out if isinstance(out, tuple) else (out,))]
    if reduction.keep_dims:
        rank = inputs[0].handle.data.ndim
        left = [np.moveaxis(data, 0, axis) if axis is not None else data.reshape((1,) * rank) for data in left]
    else:
        left = [data[0] for data in left]
    return [reduction.to_tensor(data, dtype) for data, dtype in zip(left, dtypes, strict=True)]


def bind_late(names: dict[str, Any]) -> None:
    """The interpreter replaces tl.cast while a kernel runs, and not what else that function is called."""
    for name, value in list(names.items()):
        own = getattr(value, "__name__", "") if getattr(value, "__triton_builtin__", False) else ""
        if own and getattr(tl, own, None) is value:
            names[name] = lambda *args, _own=own, **kwargs: getattr(tl, _own)(*args, **kwargs)


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    _launched.clear()
    yield _launched


def as_bool(mask: Any) -> Any:
    """In 3.9 a scalar of bool & a block of bool is a block of int64, which its load and store refuse."""
    return triton_interpreter.TensorHandle(np.asarray(mask.data, bool), mask.dtype)


def check_bounds(pointers: Any, mask: Any) -> None:
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    left = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data))]
    for low, high in _bounds:
        if left.size == 0:
            return
        left = left[(left < low) | (left + np.uint64(size) > high)]
    if left.size:
        raise OutOfBounds(
            f"{left.size} of {np.size(pointers.data)} accesses in {_launched[-1]} are outside its tensors"
        )


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.reshape(np.shape(values)))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)

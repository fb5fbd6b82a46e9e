"""Triton's interpreter without the time that it loses between an operator of the language and NumPy's function.

    patches      the language is patched there at every call of a function, after a search; here once a launch, as found
    types        and shapes are made there anew for every value; here they are remembered
    operands     are promoted and broadcast there step by step; here, where they are of one type, at once

The values are the same. Works with Triton 3.6 to 3.9. Import after TRITON_INTERPRET=1 is set.
"""

import functools
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

Grid = triton_interpreter.GridExecutor
Semantic = triton_interpreter.TritonSemantic
promote, where = Semantic.binary_op_type_checking_impl, Semantic.where  # Triton's
ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide}
FLOATS = {id(tl.float32), id(tl.float64)}
NUMBERS = FLOATS | {id(tl.int32), id(tl.int64)}
PROMOTED = NUMBERS | {id(tl.int1)}  # to themselves, whatever the operation


def install() -> None:
    """Once a process."""
    patch_once_a_launch()
    remember_types()
    Semantic.binary_op_type_checking_impl, Semantic.where = operands, choose


def patch_once_a_launch() -> None:
    call, patch = Grid.__call__, triton_interpreter._patch_lang
    patched: dict[frozenset[str], Any] = {}  # in this launch, by the modules of the language that a function knows
    changes: dict[tuple[Any, ...], list[tuple[Any, str, Any]]] = {}  # which that takes after those patched before it

    @functools.cache
    def language_of(function: Any) -> frozenset[str]:
        names = function.__globals__.values()
        return frozenset(value.__name__ for value in names if value is tl or value is tl.core)

    def patch_lang(function: Any) -> Any:
        language = language_of(function)
        if language in patched:
            return patched[language]
        if (known := changes.get((*patched, language))) is None:
            scope = patch(function)
            for name, method in () if patched else arithmetic_at_once().items():
                scope.set_attr(tl.tensor, name, method)
            known = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
            changes[*patched, language] = known
        else:
            scope = triton_interpreter._LangPatchScope()
            for owner, name, value in known:
                scope.set_attr(owner, name, value)
        patched[language] = scope
        return scope

    def patch_attr(owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # which does not ask for the semantic that it is given here

        def interpreted(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
            return function(*args, **kwargs, _semantic=triton_interpreter.interpreter_semantic)

        scope.set_attr(owner, name, interpreted)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        finally:
            patched.clear()

    Grid.__call__ = launch
    triton_interpreter._patch_lang, triton_interpreter._patch_attr = patch_lang, patch_attr


def arithmetic_at_once() -> dict[str, Any]:
    """+ - * / of floats of one type."""

    def at_once(name: str, of_numpy: Any, turned: bool) -> Any:
        of_any_type = getattr(tl.tensor, name)

        def method(self: Any, other: Any) -> Any:
            dtype = self.dtype
            pair = of_one_type(self, other) if id(dtype) in FLOATS else None
            if pair is None:
                return of_any_type(self, other)
            left, right = pair[::-1] if turned else pair
            data = of_numpy(left.handle.data, right.handle.data)
            return tl.tensor(triton_interpreter.TensorHandle(data, dtype), left.type)

        return method

    return {
        name: at_once(name, of_numpy, turned)
        for short, of_numpy in ARITHMETIC.items()
        for name, turned in ((f"__{short}__", False), (f"__r{short}__", True))
    }


def operands(self: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> Any:
    return of_one_type(left, right) or promote(self, left, right, *args, **kwargs)


def choose(self: Any, condition: Any, x: Any, y: Any) -> Any:
    pair = of_one_type(x, y) if condition.dtype is tl.int1 else None
    if pair is None or shape_of(condition) != shape_of(pair[0]):
        return where(self, condition, x, y)
    data = np.where(condition.handle.data, pair[0].handle.data, pair[1].handle.data)
    return tl.tensor(triton_interpreter.TensorHandle(data, pair[0].dtype), pair[0].type)


def of_one_type(left: Any, right: Any) -> Any:
    """Both operands as Triton would convert them, where that is seen at once; else None."""
    is_tensor = type(left) is tl.tensor, type(right) is tl.tensor
    if all(is_tensor):
        if left.dtype is not right.dtype or id(left.dtype) not in PROMOTED:
            return None
        shapes = shape_of(left), shape_of(right)
        if shapes[0] == shapes[1]:
            return left, right
        if all(shapes) or left.dtype is tl.int1:  # what compared integers is of their type to NumPy
            return None
        return (left, splat(right.handle.data[0], left)) if shapes[0] else (splat(left.handle.data[0], right), right)
    if not any(is_tensor):
        return None
    of, number = (left, right) if is_tensor[0] else (right, left)
    if type(number) is int and -(2**31) <= number < 2**31:
        known = NUMBERS
    else:
        known = FLOATS if type(number) is float else set()
    if id(of.dtype) not in known or (number == 0 and math.copysign(1, number) < 0):  # -0 is 0 to Triton before 3.9
        return None
    constant = splat(number, of)
    return (left, constant) if is_tensor[0] else (constant, right)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """() of a scalar, whose data has the shape of a block of one."""
    return tensor.handle.data.shape if tensor.type.is_block() else ()


def splat(value: Any, like: Any) -> Any:
    data = np.full(like.handle.data.shape, value, triton_interpreter._get_np_dtype(like.dtype))
    return tl.tensor(triton_interpreter.TensorHandle(data, like.dtype), like.type)


def remember_types() -> None:
    tl.tensor.__init__ = remembered(tl.tensor.__init__, shape_of_type, ("handle", "type", "dtype"))
    tl.block_type.__init__ = remembered(tl.block_type.__init__, block_of, ())
    of_scalar = functools.cache(triton_interpreter._get_np_dtype)
    triton_interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    )


def remembered(init: Any, key: Any, own: tuple[str, ...]) -> Any:
    """An __init__ of two arguments on whose key all attributes depend but an object's own, which are made anew."""
    known: dict[Any, dict[str, Any]] = {}

    def __init__(self: Any, first: Any, second: Any) -> None:
        found = known.get(of := key(first, second))
        if found is None:  # a key of None is never known
            init(self, first, second)
            if of is not None:
                known[of] = {name: value for name, value in vars(self).items() if name not in own}
            return
        vars(self).update(found)
        if own:
            self.handle, self.type, self.dtype = first, second, second.scalar

    return __init__


def shape_of_type(_: Any, type: Any) -> Any:
    return tuple(type.shape) if type.is_block() else ()


def block_of(element: Any, shape: Any) -> Any:
    return (element.name, *shape) if type(element) is tl.dtype else None

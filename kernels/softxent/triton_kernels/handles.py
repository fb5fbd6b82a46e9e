"""Launches by a handle: what Triton has compiled for such arguments is asked for once.

Triton's own launch, kernel[grid](...), finds out anew for every argument what the code is specialised for. That is most
of what a launch takes on the host, and where a batch is tiny the host is what a step waits for. Here the compiled
kernel is remembered by its arguments: integers and constants by value, tensors by dtype, if they start at a multiple of
16 bytes. That tells apart more than Triton does, for CUDA. Other launches go through Triton, as do all on AMD, where
the size of a tensor's storage counts as well. A compiled kernel is launched as Triton's tutorial does it (02-fused-
softmax), with its hooks; but its settings, such as TRITON_DEBUG, are those of the first launch.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel

ON = True
MOST = 1024  # handles of a kernel: one for each number of rows, among others


def cached_launch(kernel: Any) -> Any:
    """A decorator above triton.jit: the kernel, launched by handles. In the interpreter the kernel as it is."""
    return kernel if triton.knobs.runtime.interpret else Kernel(kernel)


class Kernel:
    """kernel[grid](*arguments, **constants): all constexpr arguments by name, and last in the kernel's signature."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.handles: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            if not (ON and by_alignment_alone()):
                self.kernel[grid](*arguments, **constants)
                return
            key = [arguments[0].get_device(), *constants, *constants.values()]
            aligned = describe(arguments, key) % 16 == 0
            handle = self.handles.get(tuple(key)) if aligned else None
            if handle is not None:
                compiled, constexprs = handle
                compiled[(*grid, 1, 1)](*arguments, *constexprs)
                return
            compiled = self.kernel[grid](*arguments, **constants)
            if aligned and isinstance(compiled, CompiledKernel):  # and not yet to be compiled
                if len(self.handles) == MOST:
                    self.handles.clear()
                names = self.kernel.arg_names[len(arguments) :]
                self.handles[tuple(key)] = compiled, [constants[name] for name in names]

        return launch


def describe(arguments: Iterable[Any], key: list[Any]) -> int:
    """Adds to the key what the code may depend on. Returns the addresses of the tensors, or-ed."""
    addresses = 0
    for x in arguments:
        if x is None or isinstance(x, int):
            key.append(x)
        elif isinstance(x, Tensor):
            key.append(x.dtype)
            addresses |= x.data_ptr()
        elif isinstance(x, tuple):
            addresses |= describe(x, key)
        else:
            key.append(type(x))  # a float, whose value is none of the compiler's business
    return addresses


@cache
def by_alignment_alone() -> bool:
    """Whether tensors of one dtype differ for the compiler by the alignment of their address alone."""
    return bool(triton.runtime.driver.active.get_current_target().backend == "cuda")

"""Launches by a handle: what Triton has compiled for such arguments is asked for once.

Triton's own launch, kernel[grid](...), finds out anew for every argument what the code is specialised for. That is most
of what a launch takes on the host, and where a batch is tiny the host is what a step waits for. Here the compiled
kernel is remembered by what of its arguments Triton specialises for on CUDA, and launched as Triton's tutorial does it
(02-fused-softmax), with its hooks. On AMD, where the size of a tensor's storage counts too, launches go through Triton.
Past are what only Triton's own launch looks at: pre-run and inspection hooks, settings of its sanitizers, and whether a
global of the kernel has changed.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

ON = True
MOST = 1024  # handles of a kernel


def cached_launch(kernel: Any) -> Any:
    """A decorator above triton.jit: the kernel, launched by handles. In the interpreter the kernel as it is."""
    return kernel if knobs.runtime.interpret else Kernel(kernel)


class Kernel:
    """kernel[grid](*arguments, **constants) on the device of the tensors, which must be the current one.

    constants: all constexpr arguments, which are the last in the kernel's signature, and Triton's options.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.handles: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            if not (ON and specialised_as_here()):
                self.kernel[grid](*arguments, **constants)
                return
            key = [knobs.runtime.debug, knobs.compilation.instrumentation_mode]
            key += *constants, *constants.values()
            specialise(arguments, key)
            handle = self.handles.get(tuple(key))
            if handle is not None:
                compiled, constexprs = handle
                compiled[(*grid, 1, 1)](*arguments, *constexprs)
                return
            compiled = self.kernel[grid](*arguments, **constants)
            if isinstance(compiled, CompiledKernel):  # and not yet to be compiled
                if len(self.handles) >= MOST:
                    self.handles.clear()
                names = self.kernel.arg_names[len(arguments) :]
                self.handles[tuple(key)] = compiled, [constants[name] for name in names]

        return launch


def specialise(arguments: Iterable[Any], key: list[Any]) -> None:
    """Adds to the key what the code may depend on: of tensors the device, the dtype and whether their address is a
    multiple of 16; of integers whether they are, but 1, and those beyond 32 bits, themselves; of floats that they are.
    """
    for x in arguments:
        if x is None:
            key.append(x)
        elif isinstance(x, int):
            key.append(x if x == 1 or not -(2**31) <= x < 2**31 else "any" if x % 16 else "multiple of 16")
        elif isinstance(x, Tensor):
            key += x.get_device(), x.dtype, x.data_ptr() % 16 == 0
        elif isinstance(x, tuple):
            specialise(x, key)
        else:
            key.append(type(x))


@cache
def specialised_as_here() -> bool:
    """Whether the compiler is CUDA's."""
    return bool(triton.runtime.driver.active.get_current_target().backend == "cuda")

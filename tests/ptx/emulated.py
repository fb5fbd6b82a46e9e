"""Runs Triton's kernels on CPU tensors as the PTX that Triton compiles for an NVIDIA GPU.

    with Emulated(90) as launches:                       # sm_90
        fused_softmax_xent(logits, target).backward()
    for launch in launches:
        assert not launch.report.faults

In a process without TRITON_INTERPRET. The operation's own host code runs, as it would for that GPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget

from offline import constants_of, intercepted

from .contraction import contracted
from .formats import RAW, Array
from .grid import launch
from .memory import APART, Region
from .report import Report
from .text import Kernel, parse

NUMBERS: dict[str, Any] = {
    "i1": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "u64": np.uint64,
    "fp32": np.float32, "fp64": np.float64,
}  # fmt: skip


@dataclass
class Launch:
    name: str  # module.kernel
    constants: dict[str, Any]
    grid: tuple[int, ...]
    ptx: str
    code: bytes  # for the GPU
    report: Report
    seconds: float


class Emulated:
    """seed: of the noise that registers and shared memory start as. contract: as ptxas may. change: what is run instead
    of a kernel's PTX, change(name, ptx)."""

    def __init__(
        self,
        arch: int = 90,
        seed: int = 0,
        contract: bool = False,
        change: Callable[[str, str], str] | None = None,
    ) -> None:
        self.target, self.seed, self.contract, self.change = GPUTarget("cuda", arch, 32), seed, contract, change

    def __enter__(self) -> list[Launch]:
        self.launches: list[Launch] = []
        self.intercepted = intercepted(self.target, self._launched)
        self.intercepted.__enter__()
        return self.launches

    def __exit__(self, *_: object) -> None:
        self.intercepted.__exit__(None, None, None)

    def _launched(self, name: str, binary: Any, values: dict[str, Any], grid: tuple[int, ...]) -> None:
        ptx = binary.asm["ptx"]
        ptx = self.change(name, ptx) if self.change else ptx
        kernel = contracted(parse(ptx)) if self.contract else parse(ptx)
        given = [x for key, kind in binary.src.signature.items() for x in _flat(kind, values[key])]
        arguments, regions = _in_memory(given)
        _add_scratch(kernel, arguments)
        began = time.perf_counter()
        report = launch(kernel, grid, arguments, regions, binary.metadata.shared, self.seed)
        seconds = time.perf_counter() - began
        self.launches.append(Launch(name, constants_of(values), grid, ptx, binary.asm["cubin"], report, seconds))


def _flat(kind: Any, value: Any) -> list[tuple[str, Any]]:
    """A kernel's arguments with their types: tuples one by one, and not what is a constant of the code."""
    if isinstance(kind, tuple):
        return [x for sub, one in zip(kind, value, strict=True) for x in _flat(sub, one)]
    return [] if kind == "constexpr" else [(kind, value)]


def _in_memory(given: list[tuple[str, Any]]) -> tuple[list[Array], list[Region]]:
    """The arguments' bits, and a region for each storage, from the first value of its tensors to the last."""
    storages: dict[int, list[torch.Tensor]] = {}
    for _, x in given:
        if isinstance(x, torch.Tensor) and x.numel():
            storages.setdefault(x.untyped_storage().data_ptr(), []).append(x)
    regions = {}
    for number, (start, tensors) in enumerate(storages.items(), 1):
        low = min(x.data_ptr() for x in tensors) - start
        high = max(x.data_ptr() + _extent(x) for x in tensors) - start
        storage = torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage())
        name = f"a tensor of {str(tensors[0].dtype).removeprefix('torch.')} {list(tensors[0].shape)}"
        regions[start] = Region(name, (number << APART) + start % 16, storage.numpy()[:high], low)
    arguments: list[Array] = []
    for kind, x in given:
        if isinstance(x, torch.Tensor):
            start = x.untyped_storage().data_ptr()
            address = regions[start].base + x.data_ptr() - start if x.numel() else 0
            arguments.append(np.array([address], np.uint64))
        else:
            bits = np.array([x], NUMBERS[kind])
            arguments.append(bits.view(RAW[bits.dtype.itemsize]))
    return arguments, list(regions.values())


def _extent(x: torch.Tensor) -> int:
    """Bytes from the first value to the end of the last."""
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.itemsize


def _add_scratch(kernel: Kernel, arguments: list[Array]) -> None:
    """Triton's own last parameters, pointers to scratch memory, of which none was asked."""
    arguments += [np.zeros(1, np.uint64)] * min(2, len(kernel.parameters) - len(arguments))

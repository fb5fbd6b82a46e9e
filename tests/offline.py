"""Compile the kernels that an operation launches, for GPUs that are not there, and read what the compiler made.

    with Offline("cuda", 90) as compiled:
        fused_softmax_xent(logits, target).backward()         # on CPU tensors: nothing runs
    compiled[0].registers, compiled[0].spill_bytes, ...

The operation's own host code runs, so each kernel gets the specialisation it would have on the device. Triton's wheel
carries the whole tool chain. Must be used in a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from softxent import dispatch

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass
class Compiled:
    kernel: str
    registers: int
    spill_bytes: int  # stored and loaded a thread
    stack_bytes: int
    wide_loads: int  # 16 bytes
    loads: int
    wide_stores: int
    stores: int

    as_dict = asdict


class _Driver(DriverBase):  # type: ignore[misc]
    """Just enough of a driver for Triton's launch path up to the compiled kernel."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Offline:
    def __init__(self, backend: str, arch: int | str) -> None:
        self.target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        self.seen: dict[str, Compiled] = {}

    def __enter__(self) -> list[Compiled]:
        self.compiled: list[Compiled] = []
        self.run, self.active, self.interpret = JITFunction.run, driver._active, dispatch.INTERPRET
        driver.set_active(_Driver(self.target))
        dispatch.INTERPRET = True  # send CPU tensors to the kernels, which are real ones in this process

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
            binary = self.run(kernel, *args, grid=grid, warmup=True, **options)
            if binary.hash not in self.seen:
                self.seen[binary.hash] = self._inspect(f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}", binary)
                self.compiled.append(self.seen[binary.hash])
            return binary

        JITFunction.run = run
        return self.compiled

    def __exit__(self, *_: object) -> None:
        JITFunction.run, dispatch.INTERPRET = self.run, self.interpret
        driver.set_active(self.active)

    def _inspect(self, name: str, binary: Any) -> Compiled:
        if self.target.backend == "hip":
            text = binary.asm["amdgcn"]
            registers = _last_int(r"\.vgpr_count:\s+(\d+)", text)
            spills = 4 * (
                _last_int(r"\.vgpr_spill_count:\s+(\d+)", text) + _last_int(r"\.sgpr_spill_count:\s+(\d+)", text)
            )
            stack = _last_int(r"\.private_segment_fixed_size:\s+(\d+)", text)
            memory = r"(?:global|buffer)_{}_dwordx4", r"(?:global|buffer)_{}_"
        else:
            text = binary.asm["ptx"]
            log = _ptxas(text, self.target.arch)
            registers = _last_int(r"Used (\d+) registers", log)
            spills = _last_int(r"(\d+) bytes spill stores", log) + _last_int(r"(\d+) bytes spill loads", log)
            stack = _last_int(r"(\d+) bytes stack frame", log)
            memory = r"\b{}\.global[^\s;]*\.v(?:4\.b32|2\.b64)", r"\b{}\.global"
        verbs = ("load", "store") if self.target.backend == "hip" else ("ld", "st")
        counts = [len(re.findall(pattern.format(verb), text)) for verb in verbs for pattern in memory]
        return Compiled(name, registers, spills, stack, *counts)


def _ptxas(ptx: str, arch: int | str) -> str:
    """What ptxas says of registers and spills, with the flags that this Triton gives it."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        flags = ["-v", "-lineinfo", *(["--regAllocOptLevel=2"] if TRITON >= (3, 7) else [])]
        name = f"--gpu-name={sm_arch_from_capability(int(arch))}"
        command = [get_ptxas(int(arch)).path, *flags, name, file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _last_int(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0

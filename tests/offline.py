"""Compile the kernels that an operation launches, for GPUs that are not there, and read what the compiler made.

    with Offline("cuda", 90) as compiled:
        fused_softmax_xent(logits, target).backward()         # on CPU tensors: nothing runs
    compiled[0].registers, compiled[0].spill_bytes, ...

The operation's own host code runs, so each kernel gets the specialisation it would have on the device. Triton's wheel
carries the whole tool chain. Must be used in a process without TRITON_INTERPRET.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from softxent import dispatch
from softxent.triton_kernels import handles

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass
class Compiled:
    kernel: str
    constants: dict[str, Any]  # the kernel's constexpr arguments
    threads: int  # in a program
    registers: int  # of 32 bits, a thread
    shared_bytes: int  # a program
    spill_bytes: int  # stored and loaded a thread
    stack_bytes: int
    wide_loads: int  # 16 bytes
    loads: int
    wide_stores: int
    stores: int
    code: str | bytes  # AMD's assembly, or a cubin

    def as_dict(self) -> dict[str, Any]:
        """All but the code."""
        return {name: value for name, value in asdict(self).items() if name != "code"}

    def opcodes(self) -> tuple[list[str], list[list[str]]]:
        return opcodes(self.code)


def opcodes(code: str | bytes) -> tuple[list[str], list[list[str]]]:
    """The instructions of AMD's assembly, or a cubin, and those of each innermost loop. The disassembler takes most of
    a second."""
    return _loops(_amdgcn(code) if isinstance(code, str) else _sass(code))


class _Launcher:
    """Where a launch ends: in a call of this, instead of the driver's."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        return "module", name, 0, 0, 1024  # module, function, registers, spills, threads in a program at most


class Driver(DriverBase):  # type: ignore[misc]
    """Just enough of a driver for Triton's launch path up to the launcher."""

    utils, launcher_cls = _Utils(), _Launcher
    stream = 0

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
        return self.stream


@contextlib.contextmanager
def pretended(target: GPUTarget) -> Iterator[None]:
    """CPU tensors go to the kernels, which are real in this process: compiled for this GPU, launched nowhere.

    One NVIDIA target a process: what was compiled is remembered by the device, not by its kind.
    """
    before = driver._active, dispatch.INTERPRET

    def choose(active: DriverBase, to_kernels: bool) -> None:
        driver.set_active(active)
        dispatch.INTERPRET = to_kernels
        for answer in (dispatch.kernel_module("rows")._warp_size, handles.specialised_as_here):
            answer.cache_clear()

    choose(Driver(target), True)
    try:
        yield
    finally:
        choose(*before)


_compiled_for: dict[JITFunction, GPUTarget] = {}


@contextlib.contextmanager
def intercepted(target: GPUTarget, launched: Callable[[str, Any, dict[str, Any], Any], None]) -> Iterator[None]:
    """Each launch on CPU tensors is compiled for this GPU, and ends in launched(name, compiled kernel, arguments by
    their names, grid) instead of there."""
    compile_for = JITFunction.run

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        if _compiled_for.get(kernel) != target:  # what is remembered is of the same device, as far as Triton knows
            kernel.device_caches.clear()
            _compiled_for[kernel] = target
        binary = compile_for(kernel, *args, grid=grid, warmup=True, **options)
        name = f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"
        launched(name, binary, dict(zip(kernel.arg_names, args, strict=False)) | options, grid)
        return binary

    with pretended(target):
        JITFunction.run, handles.ON = run, False
        try:
            yield
        finally:
            JITFunction.run, handles.ON = compile_for, True


class Offline:
    def __init__(self, backend: str, arch: int | str) -> None:
        self.target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        self.seen: dict[str, Compiled] = {}

    def __enter__(self) -> list[Compiled]:
        self.compiled: list[Compiled] = []
        self.intercepted = intercepted(self.target, self._launched)
        self.intercepted.__enter__()
        return self.compiled

    def __exit__(self, *_: object) -> None:
        self.intercepted.__exit__(None, None, None)

    def _launched(self, name: str, binary: Any, arguments: dict[str, Any], grid: Any) -> None:
        if binary.hash not in self.seen:
            self.seen[binary.hash] = self._inspect(name, constants_of(arguments), binary)
            self.compiled.append(self.seen[binary.hash])

    def _inspect(self, name: str, constants: dict[str, Any], binary: Any) -> Compiled:
        if self.target.backend == "hip":
            text = code = binary.asm["amdgcn"]
            registers = _last_int(r"\.vgpr_count:\s+(\d+)", text)
            spills = 4 * _last_int(r"\.vgpr_spill_count:\s+(\d+)", text)  # scalar registers spill into others
            stack = _last_int(r"\.private_segment_fixed_size:\s+(\d+)", text)
            memory = r"(?:global|buffer)_{}_dwordx4", r"(?:global|buffer)_{}_"
        else:
            text, code = binary.asm["ptx"], binary.asm["cubin"]
            used = _tool("cuobjdump", "-res-usage", code)
            registers, stack, spills = _last_int(r"REG:(\d+)", used), _last_int(r"STACK:(\d+)", used), 0
            if stack:
                log = _ptxas(text, self.target.arch)
                spills = _last_int(r"(\d+) bytes spill stores", log) + _last_int(r"(\d+) bytes spill loads", log)
            memory = r"\b{}\.global[^\s;]*\.v(?:4\.b32|2\.b64)", r"\b{}\.global"
        verbs = ("load", "store") if self.target.backend == "hip" else ("ld", "st")
        counts = [len(re.findall(pattern.format(verb), text)) for verb in verbs for pattern in memory]
        threads = self.target.warp_size * binary.metadata.num_warps
        wide_loads, loads, wide_stores, stores = counts
        accesses = wide_loads, loads, wide_stores, stores
        return Compiled(name, constants, threads, registers, binary.metadata.shared, spills, stack, *accesses, code)


def constants_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a launch that are written in capitals, constants of the kernel, and Triton's options."""
    found = arguments | (arguments["tile"]._asdict() if "tile" in arguments else {})
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, bool | int) and (key.isupper() or key in ("num_warps", "enable_fp_fusion"))
    }


def _ptxas(ptx: str, arch: int | str) -> str:
    """What ptxas says of spills, with the flags that this Triton gives it."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        flags = ["-v", "-lineinfo", *(["--regAllocOptLevel=2"] if TRITON >= (3, 7) else [])]
        name = f"--gpu-name={sm_arch_from_capability(int(arch))}"
        command = [get_ptxas(int(arch)).path, *flags, name, file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _tool(name: str, flag: str, cubin: bytes) -> str:
    """What one of CUDA's tools prints."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(get_ptxas(90).path).with_name(name)
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def _sass(cubin: bytes) -> list[tuple[str, str]]:
    """The instructions of a cubin: ("label", its name), ("branch", where to) or ("", opcode)."""
    text = _tool("nvdisasm", "-c", cubin)
    code = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            code.append(("label", label[1]))
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            if found[1] != "NOP":
                code.append(("branch", target[0]) if target else ("", found[1]))
    return code


def _amdgcn(text: str) -> list[tuple[str, str]]:
    code = []
    for line in text.split("s_endpgm")[0].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            code.append(("label", label[1]))
        elif found := re.match(r"\t([a-z]+_\w+)\s*(\S*)", line):
            code.append(("branch", found[2]) if "branch" in found[1] else ("", found[1]))
    return code


def _loops(code: list[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Its instructions, and those of each loop that contains no other; a branch to itself is no loop."""
    found: list[str] = []
    labels, loops = {}, []
    for kind, text in code:
        if kind == "label":
            labels[text] = len(found)
            continue
        found.append(kind or text)
        if kind == "branch" and len(found) - labels.get(text, len(found)) > 1:
            loops.append((labels[text], len(found)))
    inner = [found[a:b] for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return found, inner


def _last_int(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0

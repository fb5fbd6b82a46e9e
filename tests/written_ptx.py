"""Kernels written by hand, for the tests of the emulator: a body of PTX, run on arrays."""

import ctypes
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptx import Region, Report, launch, parse
from ptx.formats import RAW, Array
from ptx.memory import APART

LETTER = {2: "h", 4: "r", 8: "d"}  # of registers, by their bytes
MOST = 1024  # threads of a program on a GPU
ON_GPU = False  # whether `evaluate` asks a GPU, which is right, in the place of the emulator
# Not of sm_90: `contracted` is the emulator's own, ptxas takes no such constants, and sm_100 is the first of the rest.
NOT_THERE = re.compile(
    r"contracted|fma\.rn\.bf16 .*0x|.*f32x2|(add|sub)\.rn\.f32\.b?f16|redux\.sync\.m\S+\.f32|(min|max)\.f32 (\S+, ){3}"
)


def run(
    body: str,  # of registers %p %h %r %f %d, pointers %d0, %d1, ... to the arrays, and the thread's number %r0
    *arrays: Array,  # read and written
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    seed: int = 0,
) -> Report:
    regions = [
        Region(f"array {k}", (k + 1) << APART, array.reshape(-1).view(np.uint8)) for k, array in enumerate(arrays)
    ]
    addresses = [np.array([region.base], np.uint64) for region in regions]
    return launch(parse(written(body, len(arrays), threads)), (programs,), addresses, regions, shared, seed)


def written(body: str, arrays: int, threads: int) -> str:
    pointers = ", ".join(f".param .u64 .ptr .global .align 1 p{k}" for k in range(arrays))
    loads = "".join(f"ld.param.b64 %d{k}, [p{k}];\n" for k in range(arrays))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry written({pointers})
.reqntid {threads}
{{
    .reg .pred %p<40>;
    .reg .b16 %h<40>;
    .reg .b32 %r<40>;
    .reg .b64 %d<40>;
    {loads}
    mov.u32 %r0, %tid.x;
    {body}
    ret;
}}
"""


def run_on_gpu(body: str, *arrays: Array) -> None:
    """A thread for each value, which is the last array's too."""
    for start in range(0, len(arrays[-1]), MOST):
        some = slice(start, start + MOST)
        parts = [torch.from_numpy(array[some].view(np.uint8)).cuda() for array in arrays]
        launch_on_gpu(written(body, len(parts), len(arrays[-1][some])), parts, len(arrays[-1][some]))
        arrays[-1][some] = parts[-1].cpu().numpy().view(arrays[-1].dtype)


def launch_on_gpu(ptx: str, tensors: list[torch.Tensor], threads: int) -> None:
    """By CUDA's driver, in torch's context, on its default stream. Raises RuntimeError with the driver's number."""
    cuda = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    given = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(x) for x in pointers))
    torch.cuda.synchronize()
    for call, *arguments in (
        (cuda.cuModuleLoadData, ctypes.byref(module), assembled(ptx)),
        (cuda.cuModuleGetFunction, ctypes.byref(function), module, b"written"),
        (cuda.cuLaunchKernel, function, 1, 1, 1, threads, 1, 1, 0, None, given, None),
        (cuda.cuCtxSynchronize,),
        (cuda.cuModuleUnload, module),
    ):
        if error := call(*arguments):
            raise RuntimeError(f"{call.__name__}: CUDA error {error}\n{ptx}")


def assembled(ptx: str) -> bytes:
    """By Triton's ptxas, as the kernels are. Raises CalledProcessError."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "written.ptx"), Path(folder, "written.cubin")
        source.write_text(ptx)
        subprocess.run([get_ptxas(90).path, "--gpu-name=sm_90a", source, "-o", built], check=True)
        return built.read_bytes()


def evaluate(opcode: str, into: int, *operands: Any, to: str | None = None) -> Array:
    """What the instruction gives in a register of `into` bytes, or in a predicate (0), or where `to` says, for each of
    the operands' values: arrays of raw bits, or of bool, or text as it is."""
    arrays = [x for x in operands if not isinstance(x, str)]
    n = max((len(x) for x in arrays), default=1)
    body, names = "", []
    memory: list[Array] = []
    for k, x in enumerate(operands):
        if isinstance(x, str):
            names.append(x)
            continue
        size = 4 if x.dtype == bool else x.dtype.itemsize
        register = f"%{LETTER[size]}{k + 20}"
        body += f"mad.wide.u32 %d30, %r0, {size}, %d{len(memory)};\nld.global.b{8 * size} {register}, [%d30];\n"
        memory.append(np.resize(x, n).astype(np.uint32) if x.dtype == bool else np.resize(x, n).view(RAW[size]))
        if x.dtype == bool:
            body += f"setp.ne.b32 %p{k}, {register}, 0;\n"
            register = f"%p{k}"
        names.append(register)
    out = np.zeros(n, RAW[into or 4])
    result = f"%{LETTER[into or 4]}10"
    statement = f"{opcode} {to or (result if into else '%p10')}, {', '.join(names)};\n"
    body += statement
    if not into:
        body += f"selp.b32 {result}, 1, 0, %p10;\n"
    body += f"mad.wide.u32 %d30, %r0, {into or 4}, %d{len(memory)};\nst.global.b{8 * (into or 4)} [%d30], {result};"
    if ON_GPU and not NOT_THERE.match(statement):
        run_on_gpu(body, *memory, out)
    else:
        report = run(body, *memory, out, threads=n)
        assert not report.faults, report.faults
    return out if into else out.astype(bool)

"""Kernels written by hand, for the tests of the emulator: a body of PTX, run on arrays."""

from typing import Any

import numpy as np

from ptx import Region, Report, launch, parse
from ptx.formats import RAW, Array
from ptx.memory import APART

LETTER = {2: "h", 4: "r", 8: "d"}  # of registers, by their bytes


def run(
    body: str,  # of registers %p %h %r %f %d, pointers %d0, %d1, ... to the arrays, and the thread's number %r0
    *arrays: Array,  # read and written
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    seed: int = 0,
) -> Report:
    pointers = ", ".join(f".param .u64 .ptr .global .align 1 p{k}" for k in range(len(arrays)))
    loads = "".join(f"ld.param.b64 %d{k}, [p{k}];\n" for k in range(len(arrays)))
    text = f"""
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
    regions = [
        Region(f"array {k}", (k + 1) << APART, array.reshape(-1).view(np.uint8)) for k, array in enumerate(arrays)
    ]
    addresses = [np.array([region.base], np.uint64) for region in regions]
    return launch(parse(text), (programs,), addresses, regions, shared, seed)


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
    body += f"{opcode} {to or (result if into else '%p10')}, {', '.join(names)};\n"
    if not into:
        body += f"selp.b32 {result}, 1, 0, %p10;\n"
    body += f"mad.wide.u32 %d30, %r0, {into or 4}, %d{len(memory)};\nst.global.b{8 * (into or 4)} [%d30], {result};"
    report = run(body, *memory, out, threads=n)
    assert not report.faults, report.faults
    return out if into else out.astype(bool)

"""Loads and stores."""

import re
from collections.abc import Sequence

import numpy as np

from .batch import ALL_LANES, WARP, Batch, Stop
from .formats import RAW, TYPES, Array
from .instructions import Step, form
from .operands import Machine
from .text import Address, Instruction, Operand, Unmodelled

SPACE = r"(global|shared)"
HINTS = r"(?:\.L1::evict_(?:first|last))?(\.L2::cache_hint)?"
VALUES = r"(?:\.v([24]))?\.([busf](?:8|16|32|64))"


@form(r"ld\.param\.([busf](?:8|16|32|64))")
def _parameter(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    to, address = instruction.operands
    kind = found[1]
    if not isinstance(address, Address) or address.base not in machine.parameters or address.offset:
        raise Unmodelled(instruction.text)
    bits = machine.parameters[address.base]
    if bits.dtype.itemsize != TYPES[kind].size:
        raise Unmodelled(f"{instruction.text}: a parameter of {bits.dtype.itemsize} bytes")
    write, value = machine.write(to, kind, wider=True), TYPES[kind].decode(bits)
    return lambda batch: write(batch, value)


def _names(operand: Operand, count: int) -> tuple[str, ...]:
    names = operand if isinstance(operand, tuple) else (operand,)
    if isinstance(operand, Address) or len(names) != count:
        raise ValueError
    return names  # type: ignore[return-value]


@form(rf"ld\.{SPACE}{HINTS}{VALUES}")
def _load(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    space, hint, many, kind = found.groups()
    to, address, *policy = instruction.operands
    _check(machine, instruction, space, hint, policy)
    size, decode, *_ = TYPES[kind]
    names = _names(to, int(many or 1))
    writes = [machine.write(name, kind, wider=True) for name in names]
    where = machine.address(address)

    def step(batch: Batch) -> None:
        values = batch.spaces[space].load(batch, where(batch), size, len(writes))
        for write, value in zip(writes, values, strict=True):
            write(batch, decode(value))

    return step


@form(rf"st\.{SPACE}{HINTS}{VALUES}")
def _store(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    space, hint, many, kind = found.groups()
    address, given, *policy = instruction.operands
    _check(machine, instruction, space, hint, policy)
    size = TYPES[kind].size
    reads = [machine.raw(name, size, wider=True) for name in _names(given, int(many or 1))]
    where = machine.address(address)

    def step(batch: Batch) -> None:
        values: list[Array] = [np.ascontiguousarray(batch.full(read(batch)), RAW[size]) for read in reads]
        batch.spaces[space].store(batch, where(batch), size, values)

    return step


@form(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")
def _matrices(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    """Matrices of 8 rows of 16 bytes: lane 8 k + j says where row j of the k-th lies. A lane has 4 bytes of each, the
    (lane % 4)-th of row lane // 4."""
    loads, count = found[1] == "ld", int(found[2])
    registers, address = instruction.operands if loads else reversed(instruction.operands)
    names, where = _names(registers, count), machine.address(address)
    writes = [machine.write(name, "b32") for name in names] if loads else []
    reads = [] if loads else [machine.raw(name, 4) for name in names]

    def step(batch: Batch) -> None:
        batch.meet(ALL_LANES)
        lane, at, shared = batch.of_active(batch.lane), where(batch), batch.spaces["shared"]
        number = np.arange(len(lane))
        if (lane != number % WARP).any():
            raise Stop
        shared.align(batch, at[lane < 8 * count], 16)
        for k in range(count):
            place = at[number - lane + 8 * k + lane // 4] + lane % 4 * 4
            if loads:
                writes[k](batch, shared.load(batch, place, 4, 1)[0])
            else:
                shared.store(batch, place, 4, [np.ascontiguousarray(batch.full(reads[k](batch)))])

    return step


def _check(machine: Machine, instruction: Instruction, space: str, hint: str | None, policy: Sequence[Operand]) -> None:
    """Hints change nothing, but they have to be right."""
    if len(policy) != (1 if hint else 0) or ("evict" in instruction.opcode and space != "global"):
        raise Unmodelled(instruction.text)
    for one in policy:
        machine.read(one, "b64")

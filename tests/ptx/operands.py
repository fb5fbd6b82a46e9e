"""Operands: what an instruction reads, and where it writes."""

import re
from collections.abc import Callable
from functools import partial

import numpy as np

from .batch import Batch, canonical
from .formats import RAW, TYPES, Array
from .text import Address, Kernel, Operand, Unmodelled

Read = Callable[[Batch], Array]
Write = Callable[[Batch, Array], None]
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")
# whose results are NaN as a GPU has it, where NumPy keeps what the NaN of an operand says
ARITHMETIC = re.compile(r"(?:(?:add|sub|mul|fma|contracted|min|max|div|rcp|ex2|redux)\b.*?|cvt\.rn)\.(f32|f64)")


class Machine:
    """A kernel as its instructions are decoded for it."""

    def __init__(self, kernel: Kernel, parameters: dict[str, Array]) -> None:
        self.kernel, self.parameters = kernel, parameters
        self.computed: dict[str, str] = {}  # registers that arithmetic writes: f32 or f64
        for one in kernel.code:
            found = ARITHMETIC.match(one.opcode)
            if found and isinstance(one.operands[0], str):
                self.computed[one.operands[0]] = found[1]

    def size_of(self, name: str) -> int:
        """Bytes of a register."""
        if SPECIAL.fullmatch(name):
            return 4
        if name not in self.kernel.registers:
            raise Unmodelled(f"operand {name}")
        return TYPES[self.kernel.registers[name]].size

    def bits(self, operand: Operand, size: int, wider: bool = False) -> Read:
        """An operand's bits; wider: it may be a wider register, of which these are the lower bits."""
        if not isinstance(operand, str):
            raise Unmodelled(f"operand {operand}")
        constant = literal(operand, size)
        if constant is None and operand in self.kernel.shared and size in (4, 8):
            constant = np.zeros(1, RAW[size])
        if constant is not None:
            return lambda _: constant
        width = self.size_of(operand)
        if width == size:
            return lambda batch: batch.get(operand)
        if not (wider and width > size > 0):
            raise Unmodelled(f"{operand} of {width} bytes as {size} bytes")
        return lambda batch: batch.get(operand).astype(RAW[size])

    def read(self, operand: Operand, kind: str, wider: bool = False) -> Read:
        """An operand's values: numbers of that type."""
        size, decode, _, is_float = TYPES[kind]
        constant = literal(operand, size) if isinstance(operand, str) else None
        if constant is not None:
            if is_float and size > 2 and not str(operand).lower().startswith(("0d", "0f")):
                raise Unmodelled(f"{operand} as {kind}")
            value = decode(constant)
            return lambda _: value
        bits = self.bits(operand, size, wider)
        computed = self.computed.get(operand) if isinstance(operand, str) else None
        if computed and not is_float:
            return lambda batch: decode(canonical(bits(batch), computed))
        if kind == "pred":
            return bits
        return lambda batch: decode(bits(batch))

    def raw(self, operand: Operand, size: int, wider: bool = False) -> Read:
        """Bits as another instruction, or memory, gets to see them."""
        return self.read(operand, f"b{8 * size}" if size else "pred", wider)

    def write(self, operand: Operand, kind: str, wider: bool = False) -> Write:
        """Where a result goes; wider: into a wider register, extended as its type says."""
        if not isinstance(operand, str) or operand in self.kernel.shared:
            raise Unmodelled(f"result {operand}")
        size, _, encode, is_float = TYPES[kind]
        if operand == "_":
            return lambda batch, values: None
        width = self.size_of(operand)
        if width == size:
            return lambda batch, values: batch.put(operand, encode(values))
        if not (wider and width > size > 0) or is_float:
            raise Unmodelled(f"{operand} of {width} bytes for {kind}")
        dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width}")
        return lambda batch, values: batch.put(operand, values.astype(dtype).view(RAW[width]))

    def address(self, operand: Operand) -> Read:
        """Of [register + offset] or [array + offset], int64."""
        if not isinstance(operand, Address):
            raise Unmodelled(f"address {operand}")
        if operand.base in self.kernel.shared:
            constant = np.array([operand.offset], np.int64)
            return lambda batch: batch.full(constant)
        return partial(_moved, self.bits(operand.base, self.size_of(operand.base)), operand.offset)


def _moved(base: Read, offset: int, batch: Batch) -> Array:
    return batch.full(base(batch).astype(np.int64) + offset)


def literal(operand: str, size: int) -> Array | None:
    """A number's bits, [1]; of a float those that it is written with."""
    if operand[0] not in "-0123456789":
        return None
    if found := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", operand):
        if len(found[2]) != (8 if found[1] in "fF" else 16) or len(found[2]) != 2 * size:
            raise Unmodelled(f"{operand} in {size} bytes")
        return np.array([int(found[2], 16)], RAW[size])
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        return None
    number = int(operand.rstrip("U"), 0)
    if size == 0:
        return np.array([number != 0])
    if not -(1 << (8 * size - 1)) <= number < 1 << (8 * size):
        raise Unmodelled(f"{operand} in {size} bytes")
    return np.array([number & ((1 << 8 * size) - 1)], RAW[size])

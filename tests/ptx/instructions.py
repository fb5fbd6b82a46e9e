"""Instructions of one thread: arithmetic, comparisons, conversions, moves, and where they go on.

FORMS lists every opcode that is modelled, by an expression that matches all of it, with what makes a step of it. What
no expression matches is `Unmodelled`, as are operands of another number, kind or width.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from . import arithmetic as do
from .batch import Batch
from .formats import RAW, TYPES, Array
from .operands import Machine
from .text import Instruction, Unmodelled

BARRIER, EXIT = -1, -2  # what a step returns, or the instruction to go on at, or None: the next
Step = Callable[[Batch], int | None]
Build = Callable[[Machine, Instruction, "re.Match[str]"], Step]
FORMS: list[tuple["re.Pattern[str]", Build]] = []


def form(pattern: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        FORMS.append((re.compile(pattern), build))
        return build

    return add


def decode(machine: Machine, instruction: Instruction) -> Step:
    known = _form_of(instruction.opcode)
    if known is None:
        raise Unmodelled(instruction.text)
    build, found = known
    try:
        return build(machine, instruction, found)
    except ValueError as error:  # of another number of operands
        raise Unmodelled(instruction.text) from error


@cache
def _form_of(opcode: str) -> tuple[Build, "re.Match[str]"] | None:
    for pattern, build in FORMS:
        if found := pattern.fullmatch(opcode):
            return build, found
    return None


def elementwise(
    machine: Machine, instruction: Instruction, function: Callable[..., Array], into: str, *of: str, wider: bool = False
) -> Step:
    """The first operand becomes function(the others)."""
    to, *given = instruction.operands
    reads = [machine.read(operand, kind, wider) for operand, kind in zip(given, of, strict=True)]
    write = machine.write(to, into, wider)
    if len(reads) == 2:
        first, second = reads
        return lambda batch: write(batch, function(first(batch), second(batch)))
    return lambda batch: write(batch, function(*[read(batch) for read in reads]))


def flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: do.flush(function(*(do.flush(x) for x in values)))


# Arithmetic

UNARY: dict[str, Callable[..., Array]] = {"neg": np.negative, "abs": np.abs, "not": np.invert}
BINARY: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": do.smaller, "max": do.larger,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@form(r"(add|sub|min|max)\.([us](?:16|32|64))|(mul)\.lo\.([us](?:16|32|64))|(and|or|xor)\.(pred|b(?:16|32|64))")
def _integers(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, kind = (group for group in found.groups() if group)
    return elementwise(machine, instruction, BINARY[name], kind, kind, kind)


@form(r"(neg|abs)\.(s(?:16|32|64))|(not)\.(pred|b(?:16|32|64))")
def _integer(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, kind = (group for group in found.groups() if group)
    return elementwise(machine, instruction, UNARY[name], kind, kind)


@form(r"(mul|mad)\.wide\.([us])(16|32)|(mad)\.lo\.([us])(32|64)")
def _products(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, letter, size = (group for group in found.groups() if group)
    kind = letter + size
    wide = kind if found[4] else f"{letter}{2 * int(size)}"
    dtype = TYPES[wide].decode(np.zeros(1, RAW[TYPES[wide].size])).dtype

    def function(a: Array, b: Array, *c: Array) -> Array:
        product: Array = a.astype(dtype) * b.astype(dtype)
        return product + c[0] if c else product

    return elementwise(machine, instruction, function, wide, kind, kind, *([wide] if name == "mad" else []))


@form(r"(div|rem)\.(u(?:32|64))")
def _quotients(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    def rest(a: Array, b: Array) -> Array:
        return np.where(b == 0, a, a - do.unsigned_quotient(a, b) * b)

    kind = found[2]
    return elementwise(machine, instruction, do.unsigned_quotient if found[1] == "div" else rest, kind, kind, kind)


@form(r"(shl)\.(b(?:16|32|64))|(shr)\.([usb](?:16|32|64))")
def _shifts(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, kind = (group for group in found.groups() if group)
    function = do.shifted_left if name == "shl" else do.shifted_right
    return elementwise(machine, instruction, function, kind, kind, "u32")


@form(r"bfe\.([us]32)")
def _field(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    return elementwise(machine, instruction, do.field_of, found[1], found[1], "u32", "u32")


@form(r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.(f32|f64|f32x2)")
def _floats(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, ftz, kind = found.groups()
    if ftz and kind == "f64":
        raise Unmodelled(instruction.text)
    function = flushing(BINARY[name]) if ftz else BINARY[name]
    return elementwise(machine, instruction, function, kind, kind, kind)


@form(r"(add|sub)(?:\.rn)?\.f32\.(f16|bf16)")
def _mixed(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    return elementwise(machine, instruction, BINARY[found[1]], "f32", found[2], "f32")


@form(r"(mul)(?:\.rn)?\.(bf16|bf16x2|f16|f16x2)")
def _short_products(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    kind = found[2]
    return elementwise(machine, instruction, lambda a, b: a.astype(np.float64) * b, kind, kind, kind)


@form(r"fma\.rn(\.ftz)?\.(f32|f64|f32x2)|fma\.rn\.()(bf16|bf16x2|f16|f16x2)")
def _fma(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    kind = found[2] or found[4]
    function = do.fma_to_odd if found[4] else do.fma64 if kind == "f64" else do.fma32
    if found[1]:
        if kind == "f64":
            raise Unmodelled(instruction.text)
        function = flushing(function)
    return elementwise(machine, instruction, function, kind, kind, kind, kind)


@form(r"contracted\.(add|sub|from)\.(f32|f64|f32x2)")
def _contracted(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    """a * b + c, a * b - c, c - a * b in one rounding: what contraction.py makes."""
    how, kind = found.groups()
    fma = do.fma64 if kind == "f64" else do.fma32
    function = {"add": fma, "sub": lambda a, b, c: fma(a, b, -c), "from": lambda a, b, c: fma(-a, b, c)}[how]
    return elementwise(machine, instruction, function, kind, kind, kind, kind)


@form(r"(min|max)(\.ftz)?(\.NaN)?\.(f32|f64)")
def _extremes(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, ftz, nan, kind = found.groups()
    if kind == "f64" and (ftz or nan):
        raise Unmodelled(instruction.text)
    two = BINARY[name]
    if nan:
        two = lambda a, b: do.or_nan(BINARY[name], a, b)  # noqa: E731
    three = len(instruction.operands) == 4 and kind == "f32"
    function: Any = (lambda a, b, c: two(two(a, b), c)) if three else two
    return elementwise(machine, instruction, flushing(function) if ftz else function, kind, *[kind] * (2 + three))


@form(r"(neg|abs)(\.ftz)?\.(f32|f64)")
def _signs(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, ftz, kind = found.groups()
    if ftz and kind == "f64":
        raise Unmodelled(instruction.text)
    return elementwise(machine, instruction, flushing(UNARY[name]) if ftz else UNARY[name], kind, kind)


@form(r"div\.(?:full|rn)\.f32|div\.rn\.(f64)")
def _division(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    kind = found[1] or "f32"
    return elementwise(machine, instruction, np.divide, kind, kind, kind)


@form(r"ex2\.approx\.ftz\.f32|rcp\.approx\.ftz\.(f64)")
def _approximations(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    function = do.gross_reciprocal if found[1] else flushing(np.exp2)
    return elementwise(machine, instruction, function, found[1] or "f32", found[1] or "f32")


# Comparisons and choices

COMPARE: dict[str, Callable[..., Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@form(
    r"setp\.(eq|ne)\.(b(?:16|32|64))|setp\.(eq|ne|lt|le|gt|ge)\.([us](?:16|32|64))|setp\.(lo|ls|hi|hs)\.(u(?:16|32|64))"
)
def _compare(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, kind = (group for group in found.groups() if group)
    return elementwise(machine, instruction, COMPARE[name], "pred", kind, kind)


@form(r"setp\.(?:(eq|ne|lt|le|gt|ge)(u?)|(num|nan))(\.ftz)?\.(f32|f64|f16|bf16|f16x2|bf16x2)")
def _compare_floats(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    name, unordered, numbers, ftz, kind = found.groups()
    if ftz and kind != "f32":
        raise Unmodelled(instruction.text)

    def function(a: Array, b: Array) -> Array:
        if ftz:
            a, b = do.flush(a), do.flush(b)
        nan = np.isnan(a) | np.isnan(b)
        if numbers:
            return ~nan if numbers == "num" else nan
        return COMPARE[name](a, b) | nan if unordered else COMPARE[name](a, b) & ~nan

    if not kind.endswith("x2"):
        return elementwise(machine, instruction, function, "pred", kind, kind)
    to, *given = instruction.operands
    low, high = (machine.write(one, "pred") for one in str(to).split("|"))
    first, second = (machine.read(operand, kind) for operand in given)

    def step(batch: Batch) -> None:
        both = function(first(batch), second(batch))
        low(batch, both[:, 0])
        high(batch, both[:, 1])

    return step


@form(r"selp\.([busf](?:16|32|64))")
def _select(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    size = int(found[1][1:]) // 8
    if found[1] == "f16":
        raise Unmodelled(instruction.text)
    to, a, b, choice = instruction.operands
    reads = [machine.read(a, found[1]), machine.read(b, found[1]), machine.read(choice, "pred")]
    write, dtype = machine.write(to, f"b{8 * size}"), RAW[size]

    def step(batch: Batch) -> None:
        yes, no, chosen = (read(batch) for read in reads)
        write(batch, np.where(chosen, yes.view(dtype), no.view(dtype)))

    return step


# Conversions and moves


@form(r"cvt\.([us](?:16|32|64))\.([us](?:16|32|64))")
def _between_integers(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    return elementwise(machine, instruction, lambda x: x, *found.groups(), wider=True)


@form(r"cvt\.rn\.(f32|f64)\.([us](?:32|64))")
def _from_integers(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    return elementwise(machine, instruction, lambda x: x, *found.groups())


@form(r"cvt\.rn\.(f32)\.(f64)|cvt\.rn\.(bf16|f16)\.(f32)|cvt\.(f32)\.(bf16|f16)|cvt\.(f64)\.(f32)")
def _between_floats(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    into, of = (group for group in found.groups() if group)
    return elementwise(machine, instruction, lambda x: x, into, of)


@form(r"cvt\.rn\.(f16x2|bf16x2)\.f32")
def _two_floats(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    def function(high: Array, low: Array) -> Array:
        return np.stack(np.broadcast_arrays(low, high), axis=1)

    return elementwise(machine, instruction, function, found[1], "f32", "f32")


@form(r"mov\.(pred)|mov\.[busf](16|32|64)")
def _move(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    to, given = instruction.operands
    size = int(found[2] or 0) // 8
    if isinstance(to, tuple):
        return _taken_apart(machine, to, machine.raw(given, size), size)
    if isinstance(given, tuple):
        return _put_together(machine, to, given, size)
    read, write = machine.raw(given, size), machine.write(to, f"b{8 * size}" if size else "pred")
    return lambda batch: write(batch, read(batch))


def _taken_apart(machine: Machine, to: tuple[Any, ...], read: Callable[[Batch], Array], size: int) -> Step:
    part = size // len(to)
    writes = [machine.write(name, f"b{8 * part}") for name in to]

    def step(batch: Batch) -> None:
        parts = np.ascontiguousarray(read(batch)).view(RAW[part]).reshape(-1, len(to))
        for k, write in enumerate(writes):
            write(batch, parts[:, k])

    return step


def _put_together(machine: Machine, to: Any, given: tuple[Any, ...], size: int) -> Step:
    reads = [machine.raw(name, size // len(given)) for name in given]
    write = machine.write(to, f"b{8 * size}")

    def step(batch: Batch) -> None:
        parts = np.broadcast_arrays(*(read(batch) for read in reads))
        write(batch, np.stack(parts, axis=1).view(RAW[size])[:, 0])

    return step


@form(r"createpolicy\.fractional\.L2::evict_(?:first|last)\.b64")
def _policy(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    """A hint to the cache: no number that anything is computed from."""
    to, fraction = instruction.operands
    if fraction != "1.0":
        raise Unmodelled(instruction.text)
    write = machine.write(to, "b64")
    return lambda batch: write(batch, np.zeros(1, np.uint64))


# Where threads go on


@form(r"bra(?:\.uni)?")
def _branch(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    (label,) = instruction.operands
    if label not in machine.kernel.labels:
        raise Unmodelled(instruction.text)
    target = machine.kernel.labels[str(label)]
    return lambda batch: target


@form(r"ret|exit")
def _exit(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    () = instruction.operands
    return lambda batch: EXIT


@form(r"bar\.sync|barrier\.sync(?:\.aligned)?")
def _barrier(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    if instruction.operands != ("0",):
        raise Unmodelled(instruction.text)
    return lambda batch: BARRIER

"""Instructions of a warp's lanes: each gets what others have. All that the mask names have to take part."""

import re

import numpy as np

from .batch import WARP, Batch
from .formats import Array
from .instructions import Step, form
from .operands import Machine, literal
from .text import Instruction, Operand, Unmodelled


def _mask(operand: Operand) -> int | None:
    """The lanes, where the text says them."""
    bits = literal(str(operand), 4)
    return None if bits is None else int(bits[0])


@form(r"shfl\.sync\.(bfly|idx)\.b32")
def _shuffle(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    """Lane i gets what i ^ b has, or what b has, of 32 lanes."""
    to, given, lane, clamp, members = instruction.operands
    mask = _mask(members)
    if clamp not in ("31", "0x1f") or mask is None:
        raise Unmodelled(instruction.text)
    write, read, of = machine.write(to, "b32"), machine.raw(given, 4), machine.read(lane, "u32")
    butterfly = found[1] == "bfly"

    def step(batch: Batch) -> None:
        batch.meet(mask)
        mine = batch.of_active(batch.lane)
        other = of(batch).astype(np.int64) & (WARP - 1)
        source = mine ^ other if butterfly else np.broadcast_to(other, mine.shape)
        if batch.active is None and batch.kernel.threads % WARP == 0:
            at = batch.threads - mine + source
            write(batch, batch.full(read(batch))[at])
            return
        everyone = batch.random.integers(0, 1 << 32, batch.warps * WARP, np.uint32)  # where nobody is, anything
        warp = batch.of_active(batch.warp) * WARP
        everyone[warp + mine] = read(batch)
        write(batch, everyone[warp + source])

    return step


@form(r"redux\.sync\.(min|max)(\.NaN)?\.(s32|u32|f32)")
def _reduce(machine: Machine, instruction: Instruction, found: "re.Match[str]") -> Step:
    """All get the least, or the greatest."""
    name, nan, kind = found.groups()
    to, given, members = instruction.operands
    if nan and kind != "f32":
        raise Unmodelled(instruction.text)
    write, read, named = machine.write(to, kind), machine.read(given, kind), machine.read(members, "u32")
    least = name == "min"

    def step(batch: Batch) -> None:
        masks = np.unique(named(batch))
        if len(masks) > 1:
            raise Unmodelled(f"{instruction.text}: of several masks")
        batch.meet(int(masks[0]))
        warp, x = batch.of_active(batch.warp), batch.full(read(batch))
        keys = _ordered(x, least != bool(nan)) if kind == "f32" else x
        first = np.diff(warp, prepend=-1) != 0
        out = (np.minimum if least else np.maximum).reduceat(keys, np.flatnonzero(first))[np.cumsum(first) - 1]
        write(batch, _turned(out).view(np.float32) if kind == "f32" else out)

    return step


def _turned(bits: Array) -> Array:
    """Of int32 that are the bits of floats to those in the order of the floats, and back."""
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _ordered(x: Array, nan_last: bool) -> Array:
    """int32 in the order of the floats, -0 before 0, and NaN at an end."""
    return np.where(np.isnan(x), np.int32(2**31 - 1 if nan_last else -(2**31)), _turned(x.view(np.int32)))

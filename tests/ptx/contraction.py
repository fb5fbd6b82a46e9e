"""What ptxas may make of a kernel: one rounding of a product and a sum.

"mul/add sequences with no rounding modifiers may be optimized to use fused-multiply-add instructions" (PTX ISA, add).
It does so also where the product goes elsewhere as it is, into an exchange between lanes for one: each lane then adds
another's rounded product to its own, which is not rounded, and they hold sums of different bits.
"""

import re
from dataclasses import replace

from .text import Instruction, Kernel, Operand

Products = dict[Operand, tuple[Operand, ...]]


def contracted(kernel: Kernel) -> Kernel:
    """The kernel with all that is contracted which may be, within a stretch of code without labels and branches."""
    products: Products = {}
    starts = set(kernel.labels.values())
    code = []
    for one in kernel.code:
        if one.index in starts or one.opcode.startswith("bra"):
            products.clear()
        code.append(_fused(one, products))
        to, *given = one.operands or ("",)
        for name in to if isinstance(to, tuple) else (to,):
            for other in [product for product, of in products.items() if name == product or name in of]:
                del products[other]
        if re.fullmatch(r"mul\.(f32|f64|f32x2)", one.opcode) and not one.guard:
            products[to] = tuple(given)
    return replace(kernel, code=code)


def _fused(one: Instruction, products: Products) -> Instruction:
    found = re.fullmatch(r"(add|sub)\.(f32|f64|f32x2)", one.opcode)
    if not found:
        return one
    to, a, b = one.operands
    if a in products:
        return replace(one, opcode=f"contracted.{found[1]}.{found[2]}", operands=(to, *products[a], b))
    if b in products:
        how = "add" if found[1] == "add" else "from"
        return replace(one, opcode=f"contracted.{how}.{found[2]}", operands=(to, *products[b], a))
    return one

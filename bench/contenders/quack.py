"""QuACK's cross-entropy and softmax, in the CuTe DSL, for Hopper and Blackwell; softmax of rows of 16 bytes' multiples.

By default backward writes into a matrix of its own (inplace_backward=False). Its mean divides by the targets that are
not ignored. It compiles a kernel for each number of columns.
"""

from typing import Any

from bench.cases import Case
from bench.contenders import Contender, Function, Unsupported, need, only, op_of
from bench.contenders.ours import options_of

DISTRIBUTION = "quack-kernels"


def load(name: str, device_type: str) -> Contender:
    module, version = need("quack", DISTRIBUTION, device_type)

    def make(case: Case) -> Function:
        softmax: Any = module.softmax
        if case.op == "softmax":
            if case.n_cols * case.torch_dtype.itemsize % 16:
                raise Unsupported("rows that are no multiple of 16 bytes")
            return lambda logits, _: softmax(logits)
        only(case, "ignored")
        function: Any = module.cross_entropy
        options = options_of(case)
        return lambda logits, target: function(logits, target, **options)

    return Contender(name, op_of(name), version, make)

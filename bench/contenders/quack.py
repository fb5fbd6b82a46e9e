"""QuACK's cross-entropy: quack.cross_entropy, in the CuTe DSL, for Hopper and Blackwell.

By default backward writes into a matrix of its own (inplace_backward=False). Its mean divides by the targets that are
not ignored. It compiles a kernel for each number of columns.
"""

from typing import Any

from bench.cases import Case
from bench.contenders import Contender, Function, need, only
from bench.contenders.ours import options_of

DISTRIBUTION = "quack-kernels"


def load(name: str, device_type: str) -> Contender:
    module, version = need("quack", DISTRIBUTION, device_type)

    def make(case: Case) -> Function:
        only(case, "ignored")
        function: Any = module.cross_entropy
        options = options_of(case)
        return lambda logits, target: function(logits, target, **options)

    return Contender(name, "cross_entropy", version, make)

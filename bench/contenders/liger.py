"""Liger's liger_cross_entropy, its replacement of F.cross_entropy, and liger_softmax, in Triton.

The loss's kernel makes the gradient in forward, over the logits; without autograd too it writes over the ignored rows.
Loss and gradient are those of the mean. It waits for the device in forward and in backward.
"""

from typing import Any

from bench.cases import Case
from bench.contenders import Contender, Function, need, only, op_of
from bench.contenders.ours import options_of

MODULE, DISTRIBUTION = "liger_kernel.transformers.functional", "liger-kernel"


def load(name: str, device_type: str) -> Contender:
    module, version = need(MODULE, DISTRIBUTION, device_type)

    def make(case: Case) -> Function:
        softmax: Any = module.liger_softmax
        if case.op == "softmax":
            return lambda logits, _: softmax(logits)
        only(case, "smoothing", "ignored")
        function: Any = module.liger_cross_entropy
        options = options_of(case)
        return lambda logits, target: function(logits, target, **options)

    return Contender(name, op_of(name), version, make, overwrites=op_of(name) == "cross_entropy")

"""Liger's cross-entropy: liger_cross_entropy, its replacement of F.cross_entropy, in Triton.

Its kernel makes the gradient in forward, over the logits; without autograd too it writes over the ignored rows. Loss
and gradient are those of the mean. It waits for the device in forward and in backward.
"""

from typing import Any

from bench.cases import Case
from bench.contenders import Contender, Function, need, only
from bench.contenders.ours import options_of

MODULE, DISTRIBUTION = "liger_kernel.transformers.functional", "liger-kernel"


def load(name: str, device_type: str) -> Contender:
    module, version = need(MODULE, DISTRIBUTION, device_type)

    def make(case: Case) -> Function:
        only(case, "smoothing", "ignored")
        function: Any = module.liger_cross_entropy
        options = options_of(case)
        return lambda logits, target: function(logits, target, **options)

    return Contender(name, "cross_entropy", version, make, overwrites=True)

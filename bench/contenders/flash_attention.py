"""flash-attention's Triton cross-entropy: flash_attn.ops.triton.cross_entropy, without the package's extensions.

It returns a loss and a z-loss a row; the mean is taken as the package's own module takes it. By default backward writes
into a matrix of its own (inplace_backward=False).
"""

from typing import Any

from bench.cases import IGNORE_INDEX, SMOOTHING, Case
from bench.contenders import Contender, Function, need, only


def load(name: str, device_type: str) -> Contender:
    module, version = need("flash_attn.ops.triton.cross_entropy", "flash-attn", device_type, alone=True)

    def make(case: Case) -> Function:
        only(case, "smoothing", "ignored")
        function: Any = module.cross_entropy_loss
        if case.kind == "smoothing":
            return lambda logits, target: function(logits, target, label_smoothing=SMOOTHING)[0]
        if case.kind == "ignored":
            return lambda logits, target: function(logits, target)[0].sum() / (target != IGNORE_INDEX).sum()
        return lambda logits, target: function(logits, target)[0]

    return Contender(name, "cross_entropy", version, make)

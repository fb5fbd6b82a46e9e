"""Transformer Engine's Triton cross-entropy: parallel_cross_entropy of one device, without the package's extensions.

Logits come as [batch, sequence, classes]. `reduce_loss` gives the mean over the targets that are not ignored. By
default it leaves the logits alone: forward copies them, backward writes the gradient over the copy, once. Before it had
`overwrite_input`, it wrote the gradient over the logits. Arguments are positional, as those versions want them.
"""

import inspect
from typing import Any

from bench.cases import IGNORE_INDEX, SMOOTHING, Case
from bench.contenders import Contender, Function, Unsupported, need, only

MODULE = "transformer_engine.pytorch.cross_entropy"
STAND_INS = {"transformer_engine.pytorch.jit": {"no_torch_dynamo": lambda: lambda function: function}}


def load(name: str, device_type: str) -> Contender:
    module, version = need(MODULE, "transformer-engine", device_type, alone=True, stand_ins=STAND_INS)
    function: Any = module.parallel_cross_entropy

    def make(case: Case) -> Function:
        only(case, "smoothing", "ignored")
        if case.dtype not in ("bfloat16", "float32"):
            raise Unsupported(f"no {case.dtype}")
        options = SMOOTHING if case.kind == "smoothing" else 0.0, True, None, IGNORE_INDEX
        return lambda logits, target: function(logits.unsqueeze(0), target.unsqueeze(0), *options)

    overwrites = "overwrite_input" not in inspect.signature(function).parameters
    return Contender(name, "cross_entropy", version, make, overwrites)

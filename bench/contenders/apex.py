"""NVIDIA apex's cross-entropy: contrib.xentropy, in CUDA, of a build with --xentropy. No registry serves it.

It returns a loss a row; the mean is the suite's. `padding_idx` is its ignore_index, 0 if left out: a class. It reads
the logit of a target before it looks whether the target is ignored, so only a class can be. Losses are float32, which
its backward accepts for 16-bit logits only after half_to_float. Backward writes into a matrix of its own.
"""

from typing import Any

from bench.cases import IGNORE_INDEX, SMOOTHING, Case
from bench.contenders import Contender, Function, Unavailable, need, only


def load(name: str, device_type: str) -> Contender:
    module, version = need("apex.contrib.xentropy", "apex", device_type)
    if not hasattr(module, "SoftmaxCrossEntropyLoss"):
        raise Unavailable(f"{version} was built without --xentropy")

    def make(case: Case) -> Function:
        only(case, "smoothing")
        smoothing = SMOOTHING if case.kind == "smoothing" else 0.0
        function: Any = module.SoftmaxCrossEntropyLoss.apply
        half_to_float = case.torch_dtype.itemsize == 2
        return lambda logits, target: function(logits, target, smoothing, IGNORE_INDEX, half_to_float)

    return Contender(name, "cross_entropy", version, make)

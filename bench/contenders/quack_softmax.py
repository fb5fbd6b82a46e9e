"""QuACK's softmax: quack.softmax, in the CuTe DSL, of rows that are a multiple of 16 bytes."""

from typing import Any

from bench.cases import Case
from bench.contenders import Contender, Function, Unsupported, need
from bench.contenders.quack import DISTRIBUTION


def load(name: str, device_type: str) -> Contender:
    module, version = need("quack", DISTRIBUTION, device_type)

    def make(case: Case) -> Function:
        if case.n_cols * case.torch_dtype.itemsize % 16:
            raise Unsupported("rows that are no multiple of 16 bytes")
        function: Any = module.softmax
        return lambda logits, _: function(logits)

    return Contender(name, "softmax", version, make)

"""Liger's softmax: liger_softmax, in Triton, a program a row."""

from typing import Any

from bench.cases import Case
from bench.contenders import Contender, Function, need
from bench.contenders.liger import DISTRIBUTION, MODULE


def load(name: str, device_type: str) -> Contender:
    module, version = need(MODULE, DISTRIBUTION, device_type)

    def make(case: Case) -> Function:
        function: Any = module.liger_softmax
        return lambda logits, _: function(logits)

    return Contender(name, "softmax", version, make)

"""PyTorch as it is: F.cross_entropy and F.softmax."""

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.contenders import Contender, Function, op_of
from bench.contenders.ours import options_of


def load(name: str, device_type: str) -> Contender:
    return Contender(name, op_of(name), torch.__version__, make)


def make(case: Case) -> Function:
    if case.op == "softmax":
        return lambda logits, _: F.softmax(logits, 1)
    options = options_of(case)
    return lambda logits, target: F.cross_entropy(logits, target, **options)

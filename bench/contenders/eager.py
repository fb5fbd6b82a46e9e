"""PyTorch as it is: F.cross_entropy."""

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.contenders import Contender, Function
from bench.contenders.ours import options_of


def load(name: str, device_type: str) -> Contender:
    return Contender(name, "cross_entropy", torch.__version__, make)


def make(case: Case) -> Function:
    options = options_of(case)
    return lambda logits, target: F.cross_entropy(logits, target, **options)

"""PyTorch as it is: F.softmax."""

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.contenders import Contender, Function


def load(name: str, device_type: str) -> Contender:
    return Contender(name, "softmax", torch.__version__, make)


def make(case: Case) -> Function:
    return lambda logits, _: F.softmax(logits, 1)

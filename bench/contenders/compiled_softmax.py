"""torch.compile of F.softmax, as `compiled` does it."""

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.contenders import Contender, Function
from bench.contenders.compiled import compile_anew, need_compiler


def load(name: str, device_type: str) -> Contender:
    need_compiler(device_type)
    return Contender(name, "softmax", torch.__version__, make)


def make(case: Case) -> Function:
    return compile_anew(lambda logits, _: F.softmax(logits, 1))

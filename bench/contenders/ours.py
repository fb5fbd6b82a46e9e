"""softxent's own: the Triton kernels on a GPU, torch operations on a CPU."""

from typing import Any

import softxent
from bench.cases import IGNORE_INDEX, SMOOTHING, Case
from bench.contenders import Contender, Function, op_of


def load(name: str, device_type: str) -> Contender:
    return Contender(name, op_of(name), softxent.__version__, make)


def make(case: Case, **options: Any) -> Function:
    if case.op == "softmax":
        return lambda logits, _: softxent.softmax(logits, 1)
    options |= options_of(case)
    return lambda logits, target: softxent.fused_softmax_xent(logits, target, **options)


def options_of(case: Case) -> dict[str, Any]:
    """In F.cross_entropy's arguments."""
    options: dict[str, dict[str, Any]] = {
        "smoothing": {"label_smoothing": SMOOTHING},
        "ignored": {"ignore_index": IGNORE_INDEX},
    }
    return options.get(case.kind, {})

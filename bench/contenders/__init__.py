"""Who is compared: one small file each, registered here by name.

A file has one function, `load`, which imports what it needs with `need` and returns a Contender. What cannot run here
is said, never left out: `Unavailable` carries the reason. A peer's public function runs with its defaults.

Of those that start from hidden states, whose logits never exist, is bench/linear.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType

from torch import Tensor

from bench.alone import StandIns, import_alone
from bench.cases import Case

# (logits, target) -> loss, a number or one a row whose mean is the loss; of softmax: (logits, _) -> probabilities
Function = Callable[[Tensor, Tensor], Tensor]

# name: file of this folder
CROSS_ENTROPY = {
    "softxent": "ours",
    "softxent-inplace": "ours_in_place",
    "eager": "eager",
    "compile": "compiled",
    "liger": "liger",
    "quack": "quack",
    "flash-attn": "flash_attention",
    "transformer-engine": "transformer_engine",
    "unsloth": "unsloth",
    "apex": "apex",
}
SOFTMAX = {
    "softxent-softmax": "ours",
    "eager-softmax": "eager",
    "compile-softmax": "compiled",
    "tutorial-softmax": "tutorial_softmax",
    "liger-softmax": "liger",
    "quack-softmax": "quack",
}
REGISTRY = CROSS_ENTROPY | SOFTMAX


class Unavailable(Exception):
    """Why a contender cannot run here: not installed, or needs what this machine has not."""


class Unsupported(Exception):
    """What a contender does not do: the option, dtype or shape."""


@dataclass(frozen=True)
class Contender:
    name: str
    op: str  # "cross_entropy" or "softmax"
    version: str
    make: Callable[[Case], Function]  # raises Unsupported
    overwrites: bool = False  # writes the gradient over the logits, and says so


def op_of(name: str) -> str:
    return "softmax" if name in SOFTMAX else "cross_entropy"


def load(name: str, device_type: str) -> Contender:
    """Raises KeyError where there is no such contender, and Unavailable with the reason where it cannot run."""
    module = import_module(f"{__name__}.{REGISTRY[name]}")
    contender: Contender = module.load(name, device_type)
    return contender


def need(
    module: str, distribution: str, device_type: str, alone: bool = False, stand_ins: StandIns | None = None
) -> tuple[ModuleType, str]:
    """A peer's module, and its version. All peers need a GPU. `alone`: without the packages around the module."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Unavailable("not installed") from None
    need_gpu(device_type)
    try:
        return import_alone(module, stand_ins) if alone else import_module(module), version
    except Exception as error:  # of whatever kind: a missing library, a GPU that is not there, an old torch
        raise Unavailable(f"{version} is installed but cannot be imported: {type(error).__name__}: {error}") from error


def need_gpu(device_type: str) -> None:
    if device_type != "cuda":
        raise Unavailable("needs a GPU")


def only(case: Case, *kinds: str) -> None:
    """Raises Unsupported for a kind of work that is not among these."""
    reasons = {
        "smoothing": "no label smoothing",
        "soft": "no probabilities as targets",
        "ignored": "no ignore_index",
    }
    if case.kind in reasons and case.kind not in kinds:
        raise Unsupported(reasons[case.kind])

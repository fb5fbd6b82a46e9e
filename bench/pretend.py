"""A GPU that is not there, for peers whose kernels are interpreted or compiled offline: their host code may ask for it.

What it asks is answered as a Hopper would; tensors stay on the CPU, and say that they are not.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch

from bench import contenders
from bench.contenders import Contender, Unavailable

ANSWERS = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_properties": SimpleNamespace(
        name="a Hopper",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        memory_clock_rate=2619000,  # kHz
        memory_bus_width=5120,
    ),
}


class Device(nullcontext[None]):
    """torch.cuda.device, which changes nothing."""

    def __init__(self, device: object) -> None:
        super().__init__()
        self.idx = 0


@contextmanager
def gpu() -> Iterator[None]:
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(patch.object(torch.cuda, "device", Device))
        stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True))
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", True))
        yield


NOT_OURS_TO_RUN = {
    "compile": "makes its kernels on a GPU",
    "quack": "its kernels are the CuTe DSL's, not Triton's",
    "apex": "its kernels are CUDA's, not Triton's",
}


def peers(op: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those whose Triton kernels are here, and why the others are not."""
    registry = contenders.CROSS_ENTROPY if op == "cross_entropy" else contenders.SOFTMAX
    found, reasons = {}, {}
    for name in registry:
        own = name.removesuffix("-softmax")
        if own in ("softxent", "softxent-inplace", "eager"):
            continue
        try:
            with gpu():
                contender = contenders.load(name, "cuda")
        except Unavailable as error:
            reasons[name] = str(error)
            continue
        if own in NOT_OURS_TO_RUN:
            reasons[name] = f"{contender.version} needs a GPU: {NOT_OURS_TO_RUN[own]}"
        else:
            found[name] = contender
    return found, reasons


def versions(found: dict[str, Contender], reasons: dict[str, str]) -> Iterator[str]:
    """In lines of Markdown."""
    for name, contender in found.items():
        yield f"- {name} {contender.version}"
    for name, reason in reasons.items():
        yield f"- {name}: {reason}".replace("+cpu", "")

"""A GPU that is not there, for peers whose kernels are interpreted: their host code may ask for it.

What it asks is answered as a Hopper would; tensors stay on the CPU, and say that they are not.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch

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

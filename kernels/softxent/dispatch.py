"""Which implementation serves a tensor: the Triton kernels, or plain torch operations.

    CUDA or ROCm tensor                     the kernels, compiled
    CPU tensor with TRITON_INTERPRET=1      the kernels, in Triton's interpreter
    any other tensor                        torch operations (cpu/)

Triton is imported on first use of the kernels, so that `import softxent` needs torch alone.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch

# Read once, as Triton itself does: after its import the variable has no effect.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
NOTHING = nullcontext()


def uses_kernels(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels serve this tensor."""
    return tensor.is_cuda or (INTERPRET and tensor.device.type == "cpu")


def implementation(logits: torch.Tensor, target: torch.Tensor) -> Any:
    """The module that serves rows of these: of triton_kernels/ or of cpu/."""
    if uses_kernels(logits):
        return kernel_module("rows")
    return cpu_module("soft_target" if target.is_floating_point() else "row_loss")


def softmax_of(z: torch.Tensor) -> Any:
    """The module that serves softmax."""
    return kernel_module("softmax") if uses_kernels(z) else cpu_module("softmax")


@cache
def cpu_module(name: str) -> Any:
    """The module softxent.cpu.<name>."""
    return import_module(f"{__package__}.cpu.{name}")


@cache
def kernel_module(name: str) -> Any:
    """The module softxent.triton_kernels.<name>. Raises ImportError with advice where Triton is missing."""
    try:
        import_module("triton")
    except ImportError as error:
        raise ImportError(
            "softxent's GPU kernels need Triton >= 3.6, which is not installed. On Linux: pip install triton. "
            "CPU tensors work without it."
        ) from error
    return import_module(f"{__package__}.triton_kernels.{name}")


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return NOTHING
    return torch.cuda.device(tensor.device)

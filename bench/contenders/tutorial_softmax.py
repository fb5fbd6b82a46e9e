"""The softmax of Triton's tutorial, written anew: forward only, of rows that one program holds."""

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.contenders import Contender, Function, Unavailable, Unsupported, need_gpu

WIDEST = 65536  # columns
REGISTERS, SHARED_BYTES = 65536, 200_000  # of a multiprocessor; with more shared memory than that, more stages
WARPS = 8  # a program


def load(name: str, device_type: str) -> Contender:
    try:
        import triton
    except ImportError:
        raise Unavailable("Triton is not installed") from None
    need_gpu(device_type)
    return Contender(name, "softmax", triton.__version__, make)


def make(case: Case) -> Function:
    from bench.contenders.tutorial_kernel import softmax_kernel

    if case.mode != "forward":
        raise Unsupported("no backward")
    if case.n_cols > WIDEST:
        raise Unsupported(f"more than {WIDEST} columns")
    block = 1 << (case.n_cols - 1).bit_length()
    found: dict[str, int] = {}  # programs, once it is known how many fit

    def softmax(logits: Tensor, _: Tensor) -> Tensor:
        out = torch.empty_like(logits)
        options: dict[str, Any] = {"BLOCK": block, "STAGES": stages(logits), "num_warps": WARPS}
        arguments = out, logits, out.stride(0), logits.stride(0), *logits.shape
        if not found:
            found["programs"] = programs(softmax_kernel, arguments, options, logits)
        softmax_kernel[(min(found["programs"], case.n_rows),)](*arguments, **options)
        return out

    return softmax


def stages(logits: Tensor) -> int:
    return 4 if logits.device.type == "cuda" and shared_bytes(logits) > SHARED_BYTES else 2


def shared_bytes(logits: Tensor) -> int:
    properties: Any = torch.cuda.get_device_properties(logits.device)
    return int(properties.shared_memory_per_multiprocessor)


def programs(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], logits: Tensor) -> int:
    """As many as the device holds at once, by the registers and the shared memory of the compiled kernel."""
    if logits.device.type == "cpu":
        return 4  # of the interpreter, or of nothing that runs
    compiled: Any = kernel.warmup(*arguments, **options, grid=(1,))
    compiled._init_handles()
    resident: int = REGISTERS // (max(1, compiled.n_regs) * 32 * WARPS)
    if compiled.metadata.shared:
        resident = min(resident, shared_bytes(logits) // compiled.metadata.shared)
    return max(1, resident) * int(torch.cuda.get_device_properties(logits.device).multi_processor_count)

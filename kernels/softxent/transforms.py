"""Whether autograd asks for more than a gradient in reverse mode: then plain torch operations serve (reference.py)."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform(*tensors: Tensor | None) -> bool:
    """Inside torch.func's grad, vmap, jvp and the like, or with a tangent of forward-mode AD on one of the tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():  # what stands for the tensors then has no tangent
        return True
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def in_higher_order_backward(grad_output: Tensor) -> bool:
    """Inside a backward pass that is itself recorded (create_graph), or batched (is_grads_batched, vmap)."""
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(grad_output) or functorch.is_legacy_batchedtensor(grad_output)
    return torch.is_grad_enabled() or batched or torch._C._are_functorch_transforms_active()

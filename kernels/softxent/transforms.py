"""Whether autograd asks for more than a gradient in reverse mode: then plain torch operations serve (reference.py).
And whether somebody records what is done, or does it without data: then registered operators do (compiled.py)."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def in_transform(*tensors: Tensor | None) -> bool:
    """Inside torch.func's grad, vmap, jvp and the like, or with a tangent of forward-mode AD on one of the tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():  # what stands for the tensors then has no tangent
        return True
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_traced(*tensors: Tensor | None) -> bool:
    """By torch.compile or make_fx, or because the tensors have no data: a FakeTensor, a FunctionalTensor, meta."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack():
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        if get_proxy_mode() is not None:
            return True
    for tensor in tensors:
        if tensor is not None and (tensor.is_meta or type(tensor) not in (Tensor, Parameter)):
            from torch._subclasses.fake_tensor import FakeTensor
            from torch._subclasses.functional_tensor import FunctionalTensor

            if tensor.is_meta or isinstance(tensor, (FakeTensor, FunctionalTensor)):
                return True
    return False


def in_higher_order_backward(grad_output: Tensor) -> bool:
    """Inside a backward pass that is itself recorded (create_graph), or batched (is_grads_batched, vmap)."""
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(grad_output) or functorch.is_legacy_batchedtensor(grad_output)
    return torch.is_grad_enabled() or batched or torch._C._are_functorch_transforms_active()

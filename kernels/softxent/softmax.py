"""softmax and log_softmax as differentiable operations, along any dimension."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import dispatch, reference
from .checks import DTYPES
from .transforms import in_higher_order_backward, in_transform, is_traced

# Values in a row: of more, torch sums the exponentials in a few long chains on a CPU, and a softmax to 1 only to some
# hundred roundings of float32.
MANY = 1 << 14


def softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax along `dim`: exp(z_j - m) / sum_k exp(z_k - m) with m = max_k z_k, so that no exponent exceeds 0.

    Args:
        input: floating point, any shape.
        dim: the dimension that sums to 1.
        dtype: cast the input to this first, as torch.nn.functional.softmax does.

    Returns a new tensor of the input's shape. A row with +inf or NaN, or with nothing but -inf, is NaN. On a CPU, under
    torch.func transforms, within torch.compile, and of a DTensor or another tensor that wraps some, it is PyTorch's
    own; float32 rows of more than 16384 values on a CPU are divided by their sum once more, since there PyTorch's drift
    from 1.
    """
    return _along(input, dim, dtype, log=False)


def log_softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """log(softmax(input)) along `dim`, in nats, without the loss of log(0): (z_j - m) - log sum_k exp(z_k - m).

    Arguments and errors as for `softmax`.
    """
    return _along(input, dim, dtype, log=True)


def _along(input: Tensor, dim: int, dtype: torch.dtype | None, log: bool) -> Tensor:
    z = input if dtype is None else input.to(dtype)
    if z.dtype not in DTYPES:
        raise NotImplementedError(f"softmax takes float64, float32, bfloat16 or float16, not {z.dtype}")
    wide = z.dtype == torch.float32 and z.device.type == "cpu" and -z.dim() <= dim < z.dim() and z.shape[dim] > MANY
    ours = (dispatch.uses_kernels(z) or wide) and not is_traced(z)  # a compiler fuses its own with the rest
    if not ours or z.dim() == 0 or z.numel() == 0 or in_transform(z) or is_traceable_wrapper_subclass(z):
        return torch.log_softmax(z, dim) if log else torch.softmax(z, dim)
    rows = z.movedim(dim, -1)
    out: Tensor = Softmax.apply(rows.reshape(-1, rows.shape[-1]), log)
    return out.reshape(rows.shape).movedim(-1, dim)


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, log: bool) -> Tensor:
        ctx.module = dispatch.softmax_of(z)
        out: Tensor = ctx.module.forward(z, log)
        ctx.save_for_backward(out)
        ctx.log = log
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grad_outputs
        (out,) = ctx.saved_tensors
        if in_higher_order_backward(dout):  # `out` is differentiable: so is a gradient computed from it
            formula = reference.log_softmax_gradient if ctx.log else reference.softmax_gradient
            acc = torch.promote_types(out.dtype, torch.float32)
            return formula(dout.to(acc), out.to(acc)).to(out.dtype), None
        return ctx.module.backward(dout, out, ctx.log), None

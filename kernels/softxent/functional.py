"""The public operation: PyTorch's arguments checked and turned into rows, and the rows' losses reduced."""

import math

import torch
from torch import Tensor

from .row_loss import row_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
REDUCTIONS = ("none", "mean", "sum")


def fused_softmax_xent(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between softmax(input) and class indices, in nats: torch.nn.functional.cross_entropy, fused.

        loss_i = -(1 - eps) * w[y_i] * log p_i[y_i] - eps / C * sum_j w_j * log p_i[j],    p_i = softmax(input_i)

    Args:
        input: logits, (N, C), (C) or (N, C, d1, ..., dK): float64, float32, bfloat16 or float16. (N, C) is read in
            place through its strides; classes in the middle of K more dimensions are copied to (N * d1 * ..., C) once.
        target: class indices in [0, C) or `ignore_index`, in the shape of `input` without its class dimension:
            int64, int32 or uint8.
        weight: (C), a weight for each class.
        size_average, reduce: deprecated in PyTorch; they override `reduction` there and here.
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their logits, and do not count in
            the mean.
        reduction: "none" for the loss of each row in the shape of `target`; "sum"; or "mean", which divides the sum
            by that of the targets' weights, and is NaN where there is nothing to divide by.
        label_smoothing: eps in [0, 1].

    Returns the loss in the dtype of `input`, float32 under autocast. Logits of half precision are computed, summed and
    divided in float32, and rounded once at the end. The gradient is exact where the model is confident:
    `miss = 1 - p[y]` is summed from its own terms, never subtracted. Differentiable twice, with respect to `input`.

    Raises PyTorch's exceptions: ValueError for the batch size or the reduction, RuntimeError for other shapes, dtypes,
    devices and label smoothing, IndexError (CPU) for a target out of range, NotImplementedError for logits that are
    not floating point. On a GPU a target out of range gives NaN in that row's loss and gradient.
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    n_cols = _check(input, target, weight, ignore_index, reduction, label_smoothing)
    class_dim = 0 if input.dim() == 1 else 1
    logits = input if input.dim() == 2 else input.movedim(class_dim, -1).reshape(-1, n_cols)
    y = target if target.dim() == 1 else target.reshape(-1)
    autocast = torch.is_autocast_enabled(input.device.type)
    dtype = torch.promote_types(input.dtype, torch.float32) if autocast else input.dtype
    loss = row_loss(logits, y, weight, ignore_index, label_smoothing, reduction, dtype)
    return loss if reduction != "none" else loss.reshape(input.shape[:class_dim] + input.shape[class_dim + 1 :])


def _check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> int:
    """The number of classes, or an error that says what is wrong and with which shapes."""
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(tensor, Tensor) and not (name == "weight" and tensor is None):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"input must be float64, float32, bfloat16 or float16 logits, got {input.dtype}")
    shapes = f"input {tuple(input.shape)} and target {tuple(target.shape)}"
    if input.dim() == 0:
        raise RuntimeError(f"input must have a class dimension: (C), (N, C) or (N, C, d1, ...), got {shapes}")
    if target.shape == input.shape and target.is_floating_point():
        raise NotImplementedError(f"class probabilities as targets are not supported yet, only indices; got {shapes}")
    expected = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.shape != expected and not (input.dim() == 1 and target.shape == (1,)):
        error = ValueError if input.dim() > 1 and target.dim() and len(target) != len(input) else RuntimeError
        raise error(f"expected target of shape {tuple(expected)} to match the batch of the logits, got {shapes}")
    if target.dtype not in TARGET_DTYPES:
        raise RuntimeError(f"target must hold class indices as int64, int32 or uint8, got {target.dtype}")
    n_cols = input.shape[0 if input.dim() == 1 else 1]
    if n_cols == 0 and target.numel() > 0:
        raise IndexError(f"no class to choose from: {shapes}")
    if weight is not None:
        if weight.shape != (n_cols,):
            raise RuntimeError(f"weight must have shape ({n_cols},), one for each class, got {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise RuntimeError(f"weight must be floating point, got {weight.dtype}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("no gradient with respect to weight for class indices: pass weight.detach()")
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"input is on {input.device} but {name} is on {tensor.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction!r} is not a valid value for reduction: use 'none', 'mean' or 'sum'")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be int, not {type(ignore_index).__name__}")
    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be float, not {type(label_smoothing).__name__}")
    if math.isnan(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    return n_cols


def _legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """What torch.nn.functional makes of its deprecated pair."""
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"

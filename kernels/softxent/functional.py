"""The public operation: PyTorch's arguments checked and turned into rows, and the loss in PyTorch's shape and dtype."""

import torch
from torch import Tensor

from . import compiled, reference
from .checks import check_inplace, check_options, check_tensors, legacy_reduction
from .normalizer import normalizer
from .row_loss import row_loss
from .soft_target import soft_target_loss
from .transforms import in_transform


def fused_softmax_xent(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    loss_dtype: torch.dtype | None = None,
    inplace: bool = False,
) -> Tensor:
    """Cross-entropy between softmax(input) and the target, in nats: torch.nn.functional.cross_entropy, fused.

        loss_i = -(1 - eps) * w[y_i] * log p_i[y_i] - eps / C * sum_j w_j * log p_i[j],    p_i = softmax(input_i)
        loss_i = -sum_j w_j * ((1 - eps) * t_i[j] + eps / C) * log p_i[j]                  for probabilities t_i

    Args:
        input: logits, (N, C), (C) or (N, C, d1, ..., dK): float64, float32, bfloat16 or float16. (N, C) is read in
            place through any strides, and K more dimensions where the classes come last in memory (channels_last);
            else they are copied to (N * d1 * ..., C) once.
        target: class indices in [0, C) or `ignore_index`, in the shape of `input` without its class dimension:
            int64, int32 or uint8. Or class probabilities, floating point, in the shape of `input`: they need not sum
            to 1, and get a gradient if they require one.
        weight: (C), a weight for each class.
        size_average, reduce: deprecated in PyTorch; they override `reduction` there and here.
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their logits, and do not count in
            the mean. For class indices only.
        reduction: "none" for the loss of each row in the shape of `input` without its class dimension; "sum"; or
            "mean", which divides the sum by that of the targets' weights, or by the number of rows for probabilities,
            and is NaN where there is nothing to divide by.
        label_smoothing: eps in [0, 1].
        loss_dtype: of the result; default: the dtype of `input`, and float32 under autocast. float32 for logits of
            half precision saves the rounding of the loss, about 1e-3 of it.
        inplace: write the gradient over the logits, which saves a matrix of their size. They must be the result of an
            operation, not a leaf, and nothing may read them after this call; what autograd itself has kept of them for
            another operation's backward pass raises there. One backward pass, no second derivative, no transform, no
            torch.compile. Where `input` has to be copied, the copy is written over; where it is a view, autograd gives
            it a new grad_fn, so that hooks and torch.autograd.grad need one taken before. Without gradients it does
            nothing.

    Logits of half precision are computed, summed and divided in float32, and rounded once at the end. The gradient
    for class indices is exact where the model is confident: 1 - p[y] is summed from its own terms, never subtracted.
    Differentiable any number of times; under torch.func transforms, forward-mode AD and `create_graph`, plain torch
    operations of the same formula (reference.py) serve.

    Raises PyTorch's exceptions: ValueError for the batch size or the reduction, RuntimeError for other shapes, dtypes,
    devices, label smoothing, and `ignore_index` with probabilities, IndexError (CPU) for a target out of range,
    NotImplementedError for logits that are not floating point. On a GPU a target out of range gives NaN in that row's
    loss and gradient.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    n_cols = check_tensors(input, target, weight)
    check_options(target, ignore_index, reduction, label_smoothing, loss_dtype)
    if not isinstance(ignore_index, int):  # numpy's
        ignore_index = int(ignore_index)
    if not isinstance(label_smoothing, float):
        label_smoothing = float(label_smoothing)
    class_dim = 0 if input.dim() == 1 else 1
    shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    logits = _rows(input, class_dim, n_cols)
    inplace = inplace and torch.is_grad_enabled() and input.requires_grad
    if inplace:
        check_inplace(input, logits, weight)
    soft = target.is_floating_point()
    y = _rows(target, class_dim, n_cols) if soft else target if target.dim() == 1 else target.reshape(-1)
    if loss_dtype is None:
        autocast = torch.is_autocast_enabled(input.device.type)
        loss_dtype = torch.promote_types(input.dtype, torch.float32) if autocast else input.dtype
    if torch.compiler.is_compiling():
        loss = _traceable(logits, y, weight, ignore_index, label_smoothing, reduction).to(loss_dtype)
    elif logits.numel() and (in_transform(input, target, weight) or (weight is not None and weight.requires_grad)):
        loss = reference.softmax_xent(logits, y, weight, ignore_index, label_smoothing, reduction).to(loss_dtype)
    elif soft:
        loss = soft_target_loss(logits, y, weight, label_smoothing, inplace)
        if reduction != "none":
            loss = loss.sum()
        n = len(y) if n_cols else 0  # as torch: nothing to average without classes
        loss = (loss / n if reduction == "mean" else loss).to(loss_dtype)
    else:
        loss = row_loss(logits, y, weight, ignore_index, label_smoothing, reduction, loss_dtype, inplace)
    return loss.reshape(shape) if reduction == "none" else loss


def _traceable(
    logits: Tensor, y: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str
) -> Tensor:
    """The loss for torch.compile to trace: registered operators, and torch operations that it can fuse."""
    n: Tensor | int = len(logits)
    eps = None if label_smoothing == 0 else torch.ones((), dtype=torch.float64) * label_smoothing
    if y.is_floating_point():
        loss: Tensor = compiled.soft_target_loss(logits, y, weight, eps)[0]
    else:
        loss = compiled.row_loss(logits, y, weight, ignore_index, eps)
        n = normalizer(y, weight, ignore_index, loss.dtype)
    if reduction == "none":
        return loss
    return loss.sum() / n if reduction == "mean" else loss.sum()


def _rows(tensor: Tensor, class_dim: int, n_cols: int) -> Tensor:
    """[n_rows, n_cols]: the tensor itself, or its classes moved to the end, in a copy where no view will do."""
    if tensor.dim() == 2:
        return tensor
    moved = tensor.movedim(class_dim, -1)
    return moved.reshape(moved.shape[:-1].numel(), n_cols)

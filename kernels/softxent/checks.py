"""What the arguments must be. PyTorch's exception types, and messages with the shapes and the values."""

import numbers
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .transforms import in_transform, is_traced

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
REDUCTIONS = ("none", "mean", "sum")
REAL, INTEGRAL = (float, int, numbers.Real), (int, numbers.Integral)  # Python's own are found at once


def check_tensors(input: Tensor, target: Tensor, weight: Tensor | None, shard: bool = False) -> int:
    """The number of classes, or an error. shard: of classes, so that there may be none."""
    _check_are_tensors(input, target, weight)
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"input must be float64, float32, bfloat16 or float16 logits, got {input.dtype}")
    if input.dim() == 0:
        raise RuntimeError(
            f"input must have a class dimension: (C), (N, C) or (N, C, d1, ...), {_shapes(input, target)}"
        )
    if target.shape == input.shape and target.is_floating_point():
        if target.dtype not in DTYPES:
            raise RuntimeError(f"probabilities must be float64, float32, bfloat16 or float16, got {target.dtype}")
    else:
        _check_indices(input, target)
    n_cols = input.shape[0 if input.dim() == 1 else 1]
    if n_cols == 0 and target.numel() > 0 and not shard:
        raise IndexError(f"no class to choose from: {_shapes(input, target)}")
    if weight is not None:
        if weight.shape != (n_cols,):
            raise RuntimeError(f"weight must have shape ({n_cols},), one for each class, got {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise RuntimeError(f"weight must be floating point, got {weight.dtype}")
        if weight.requires_grad and torch.is_grad_enabled() and not target.is_floating_point():
            raise RuntimeError("no gradient with respect to weight for class indices: pass weight.detach()")
        if weight.device != input.device:
            raise RuntimeError(f"input is on {input.device} but weight is on {weight.device}")
    if target.device != input.device:
        raise RuntimeError(f"input is on {input.device} but target is on {target.device}")
    return n_cols


def is_dtensor(x: Any) -> bool:
    if type(x) in (Tensor, Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # of which there is none before it is imported
    return module is not None and isinstance(x, module.DTensor)


def _check_are_tensors(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if type(tensor) is Tensor or (name == "weight" and tensor is None):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
        if is_traceable_wrapper_subclass(tensor) and not is_traced(tensor):
            if is_dtensor(tensor):
                raise NotImplementedError(
                    f"{name} is a DTensor beside an input that is none: make one of the logits, DTensor.from_local(), "
                    f"or pass {name}.to_local() or {name}.full_tensor()"
                )
            raise NotImplementedError(
                f"{name} is a {type(tensor).__name__}, which is not supported: pass a plain tensor, such as its "
                "to_local()"
            )


def _check_indices(input: Tensor, target: Tensor) -> None:
    expected = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.shape != expected and not (input.dim() == 1 and target.shape == (1,)):
        if input.dim() > 1:
            of_batch = target.dim() == 0 or len(target) != len(input)
        else:
            of_batch = target.dim() == 1 and target.shape != input.shape and not target.is_floating_point()
        error = ValueError if of_batch else RuntimeError
        hint = ""
        if target.shape == input.shape:
            hint = ". Probabilities must be floating point: target.float()"
        elif input.dim() > 2 and target.shape == input.shape[:-1]:
            hint = ". Classes are dimension 1: input.flatten(0, -2) and target.flatten(), if they are the last"
        raise error(f"expected a target of shape {tuple(expected)} to match the logits: {_shapes(input, target)}{hint}")
    if target.dtype not in INDEX_DTYPES:
        raise RuntimeError(f"target must hold class indices as int64, int32 or uint8, got {target.dtype}")


def check_options(target: Tensor, ignore_index: int, reduction: str, loss_dtype: torch.dtype | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction!r} is not a valid value for reduction: use 'none', 'mean' or 'sum'")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, INTEGRAL):
        raise TypeError(f"ignore_index must be int, not {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise RuntimeError(f"ignore_index must fit into int64, got {ignore_index}")
    if ignore_index >= 0 and target.is_floating_point():
        raise RuntimeError(f"ignore_index is for class indices: {ignore_index} with a target of probabilities")
    if loss_dtype is not None and loss_dtype not in DTYPES:
        raise RuntimeError(f"loss_dtype must be float64, float32, bfloat16 or float16, got {loss_dtype}")


def check_label_smoothing(label_smoothing: float | Tensor, input: Tensor) -> float | Tensor:
    eps = _constant("label_smoothing", label_smoothing, input)
    if not isinstance(eps, Tensor) and not 0 <= eps <= 1:  # NaN neither
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, got {eps}")
    return eps


def check_z_loss(z_loss: float | Tensor, input: Tensor) -> float | Tensor:
    zeta = _constant("z_loss", z_loss, input)
    if not isinstance(zeta, Tensor) and not 0 <= zeta < float("inf"):  # NaN neither
        raise RuntimeError(f"z_loss must be a finite number of at least 0, got {zeta!r}")
    return zeta


def check_softcap(softcap: float | Tensor | None, input: Tensor) -> float | Tensor | None:
    if softcap is None:
        return None
    cap = _constant("softcap", softcap, input)
    # What multiplies: float32 has room for its inverse. No constants of the module, which a compiler would guard.
    if not isinstance(cap, Tensor) and not 2.0**-100 <= cap <= 2.0**100:
        raise RuntimeError(f"softcap must be above 0 and at most 2**100, or None for no cap, got {cap!r}")
    return cap


def check_normalizer(normalizer: float | Tensor | None, reduction: str, input: Tensor) -> float | Tensor | None:
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(f"normalizer is what a mean divides by: it does not go with reduction={reduction!r}")
    return _number("normalizer", normalizer, input)


def check_logit_scale(logit_scale: float | Tensor, input: Tensor) -> float | Tensor:
    scale = _number("logit_scale", logit_scale, input)
    if not isinstance(scale, Tensor) and not 2.0**-100 <= scale <= 2.0**100:
        raise RuntimeError(f"logit_scale must be above 0 and at most 2**100, got {logit_scale!r}")
    return scale


def _constant(name: str, value: float | Tensor, input: Tensor) -> float | Tensor:
    """`_number` of what gets no gradient; of a tensor on the CPU, which can be read without waiting, its value."""
    number = _number(name, value, input)
    if not isinstance(number, Tensor):
        return number
    if number.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"no gradient with respect to {name}: pass {name}.detach()")
    return number if number.device.type != "cpu" or is_traced(number, input) else float(number.item())


def _number(name: str, value: float | Tensor, input: Tensor) -> float | Tensor:
    """A number as float; a tensor of one as a tensor [] on the device of the logits, or as float if it is elsewhere."""
    if type(value) is float:  # or, while compiling, a symbol, which float() would fix
        return value
    if torch.compiler.is_compiling() and not isinstance(value, (Tensor, *REAL)):  # numpy's, which it has as an array
        value = torch.as_tensor(value)
    if isinstance(value, REAL):  # np.float64 is a float too
        return float(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor of one, not {type(value).__name__}")
    if value.numel() != 1 or value.is_complex():
        raise RuntimeError(f"{name} must be one real number, got {value.dtype} of shape {tuple(value.shape)}")
    if value.device != input.device:
        if value.device.type != "cpu":
            raise RuntimeError(f"input is on {input.device} but {name} is on {value.device}")
        if (value.requires_grad and torch.is_grad_enabled()) or is_traced(value, input):
            return value.to(input.device).reshape(())
        return float(value.item())
    return value.reshape(())


def check_sample_weight(sample_weight: Tensor, input: Tensor, target: Tensor, shape: torch.Size) -> Tensor:
    """The weights of rows as floating point."""
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be a Tensor, not {type(sample_weight).__name__}")
    if sample_weight.shape != shape and not (sample_weight.shape == target.shape != input.shape):
        raise RuntimeError(
            f"sample_weight must have shape {tuple(shape)}, one for each row, got {tuple(sample_weight.shape)}"
        )
    if sample_weight.device != input.device:
        raise RuntimeError(f"input is on {input.device} but sample_weight is on {sample_weight.device}")
    if sample_weight.is_complex():
        raise RuntimeError(f"sample_weight must be real, got {sample_weight.dtype}")
    acc = torch.promote_types(input.dtype, torch.float32)
    return sample_weight if sample_weight.is_floating_point() else sample_weight.to(acc)


def check_stats(stats: Iterable[str], known: tuple[str, ...], target: Tensor, inplace: bool) -> tuple[str, ...]:
    wanted = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in wanted:
        if name not in known:
            raise ValueError(f"{name!r} is not one of the stats: {', '.join(known)}")
        if name in ("target_logprob", "correct") and isinstance(target, Tensor) and target.is_floating_point():
            raise RuntimeError(f"{name} is for class indices: with probabilities ask for lse, entropy and prediction")
    if inplace:
        raise RuntimeError(
            "inplace=True writes the gradient over the logits that stats are computed from: leave it out"
        )
    return wanted


def check_inplace(
    input: Tensor, logits: Tensor, weight: Tensor | None, logit_scale: float | Tensor, **read: Any
) -> None:
    """Whether the gradient may be written over `logits`, which are the rows of `input` or a copy of them.

    read: the other arguments, by name.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("inplace=True does not go with torch.export: leave it out there")
    if in_transform(input):
        raise RuntimeError("inplace=True does not go with torch.func transforms or forward-mode AD: leave it out there")
    if weight is not None and weight.requires_grad:
        raise RuntimeError("inplace=True does not go with a weight that requires a gradient: pass weight.detach()")
    if isinstance(logit_scale, Tensor) and logit_scale.requires_grad:
        raise RuntimeError("inplace=True does not go with a logit_scale that requires a gradient: it is of the logits")
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "inplace=True would write over logits that are a leaf, or a view of one, and require a gradient: "
            "it is for the result of an operation"
        )
    n_rows, n_cols = logits.shape
    if n_cols > 1 and (logits.stride(1) != 1 or (n_rows > 1 and logits.stride(0) < n_cols)):
        raise RuntimeError(
            "inplace=True needs the classes of a row side by side in memory, and rows that do not overlap: "
            f"got strides {logits.stride()}"
        )
    for name, tensor in (read | {"weight": weight, "logit_scale": logit_scale}).items():
        if isinstance(tensor, Tensor) and _overlap(logits, tensor):
            raise RuntimeError(f"inplace=True would write over {name}, which lies in the memory of the logits")
    if any(_overlap(logits, tensor) for tensor in _kept_by_compiled(base)):
        raise RuntimeError(
            "inplace=True would write over logits that the compiled function which made them keeps for its backward "
            "pass: leave it out"
        )


def _kept_by_compiled(output: Tensor) -> tuple[Tensor, ...]:
    """What the compiled graph that `output` comes from keeps for backward. Of an output, or a view of one, it may keep
    another view, whose version does not change with the output's: autograd would not see it written over."""
    node = output.grad_fn
    if type(node).__name__ != "CompiledFunctionBackward":
        return ()
    try:
        kept = node.saved_tensors  # type: ignore[union-attr]
    except RuntimeError:  # freed by a backward pass
        return ()
    return (*kept, *getattr(node, "_tensors_no_vc_check", ()))


def _overlap(rows: Tensor, other: Tensor) -> bool:
    """Whether writing `rows` may change `other`: not if it lies before, behind, or all of it between the rows."""
    if other.numel() == 0 or other.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr():
        return False

    def extent(x: Tensor, dims: slice) -> int:  # bytes from the first value to the end of the last
        pairs = zip(x.shape[dims], x.stride()[dims], strict=True)
        return (sum((n - 1) * stride for n, stride in pairs) + 1) * x.itemsize

    apart = other.data_ptr() - rows.data_ptr()
    if apart >= extent(rows, slice(None)) or -apart >= extent(other, slice(None)):
        return False
    period = rows.stride(0) * rows.itemsize
    if other.stride()[:1] != (period // other.itemsize,) or period % other.itemsize:
        return True
    return apart % period < extent(rows, slice(1, None)) or apart % period + extent(other, slice(1, None)) > period


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """What torch.nn.functional makes of its deprecated pair."""
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def _shapes(input: Tensor, target: Tensor) -> str:
    return f"input {tuple(input.shape)} and target {tuple(target.shape)}"

"""Logits that are not made: what a model's head hands on to the loss in the place of hidden @ weight.T + bias.

Models scale their logits, cap, cast, slice and flatten them on the way to the loss, each in its own way. LinearLogits
follows these steps, and gives `fused_linear_softmax_xent` what they amount to. Asked for anything else it raises: a
model never trains on another loss than its own.

    z = cap * tanh(scale * x / cap)     x = hidden @ weight.T + bias;  z = scale * x before a tanh

Plain Python, no tensor: nothing can read what is not there, and torch.compile looks through it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import fused_linear_softmax_xent


class NotFollowed(AttributeError, RuntimeError):
    """An AttributeError too, since libraries ask hasattr()."""


class HeadInput:
    """The hidden states (..., H) on their way into an nn.Linear, which returns `LinearLogits` of them.

    Args:
        owner: whom an error names.
        options: for `fused_linear_softmax_xent`.
    """

    def __init__(self, hidden: Tensor, owner: str, options: dict[str, Any]) -> None:
        self.hidden, self.owner, self.options = hidden, owner, options

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> "LinearLogits":
        x = next(arg for arg in args if isinstance(arg, HeadInput))
        if func is not F.linear:
            raise _refusal(x.owner, func.__name__)
        _, weight, bias = args
        return LinearLogits(x.hidden.to(weight.device), weight, bias, x.owner, x.options)


class LinearLogits:
    """Logits of shape (..., C), to be given to `loss`, to F.cross_entropy or to nn.CrossEntropyLoss."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        owner: str,
        options: dict[str, Any],
        scale: float | Tensor = 1.0,
        cap: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.owner, self.options = hidden, weight, bias, owner, options
        self.scale, self.cap = scale, cap
        self.dtype = hidden.dtype if dtype is None else dtype  # as the model sees it; the loss has its own

    def loss(self, target: Tensor, **options: Any) -> Tensor:
        """`fused_linear_softmax_xent` of all of them, target (...)."""
        return fused_linear_softmax_xent(
            self.hidden,
            self.weight,
            target,
            self.bias,
            softcap=self.cap,
            logit_scale=self.scale,
            **self.options,
            **options,
        )

    # What they would be.

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    def dim(self) -> int:
        return self.hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def is_contiguous(self) -> bool:
        return True

    # What becomes of them.

    def contiguous(self) -> "LinearLogits":
        return self

    def float(self) -> "LinearLogits":
        return self._with(dtype=torch.float32)

    def to(self, to: Any) -> "LinearLogits":
        if isinstance(to, torch.dtype):
            return self._with(dtype=to)
        if to == self.device:
            return self
        raise self._refusal(f"to({to})")

    def tanh(self) -> "LinearLogits":
        if self.cap is not None:
            raise self._refusal("a second tanh")
        return self._with(cap=1.0)

    def __mul__(self, factor: Any) -> "LinearLogits":
        if isinstance(factor, Tensor) and factor.numel() != 1:
            raise self._refusal(f"a product with a tensor {tuple(factor.shape)}")
        return self._with(scale=self.scale * factor, cap=None if self.cap is None else self.cap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "LinearLogits":
        return self.__mul__(1 / divisor)

    def __add__(self, bias: Any) -> "LinearLogits":
        """A bias that is kept beside the head, as BART's: (C), or (1, C)."""
        n_cols, pristine = self.weight.shape[0], self.cap is None and isinstance(self.scale, float) and self.scale == 1
        if not isinstance(bias, Tensor) or bias.shape[-1:] != (n_cols,) or bias.numel() != n_cols or not pristine:
            raise self._refusal("a sum")
        bias = bias.reshape(-1)
        return self._with(bias=bias if self.bias is None else self.bias + bias)

    def view(self, *shape: Any) -> "LinearLogits":
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        *rows, n_cols = sizes
        if n_cols != self.weight.shape[0] and (n_cols != -1 or math.prod(rows) != math.prod(self.shape[:-1])):
            raise self._refusal(f"view{tuple(sizes)} of {tuple(self.shape)}")
        return self._with(hidden=self.hidden.reshape(*rows, self.hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> "LinearLogits":
        """Of positions, not of classes."""
        index = index if isinstance(index, tuple) else (index,)
        last, aligned_right = index[-1], any(i is Ellipsis for i in index)
        taken = sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None for i in index)
        if last is not Ellipsis and (aligned_right or taken >= self.dim()):
            if not isinstance(last, slice) or last != slice(None):
                raise self._refusal("an index of classes")
        return self._with(hidden=self.hidden[index])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, LinearLogits):
            if func is F.cross_entropy:
                return _cross_entropy(*args, **(kwargs or {}))
            if func is torch.tanh:
                return first.tanh()
        owners = [x.owner for x in args if isinstance(x, LinearLogits)]
        raise _refusal(owners[0] if owners else "a model", func.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise self._refusal(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._refusal("an assignment")

    def __sub__(self, other: Any) -> Any:
        raise self._refusal("a difference")

    def _with(self, **changed: Any) -> "LinearLogits":
        same: dict[str, Any] = {
            name: getattr(self, name) for name in ("hidden", "weight", "bias", "owner", "options", "scale", "cap")
        }
        return LinearLogits(**{**same, "dtype": self.dtype, **changed})

    def _refusal(self, what: str) -> NotFollowed:
        return _refusal(self.owner, what)


def _cross_entropy(
    logits: LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """With the arguments of F.cross_entropy."""
    if logits.dim() > 2 or size_average is not None or reduce is not None:
        raise logits._refusal(f"a cross_entropy of {tuple(logits.shape)}, whose classes are dimension 1,")
    return logits.loss(
        target, weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _refusal(owner: str, what: str) -> NotFollowed:
    return NotFollowed(
        f"{owner}: it asks its logits for {what}. linear=True does not make them, and cannot follow there: "
        "use_fused_xent(model) without it takes the logits as they come"
    )

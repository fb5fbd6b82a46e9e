"""The operations as modules."""

from typing import Any

import torch
from torch import Tensor, nn

from .functional import fused_softmax_xent
from .linear import check_head, fused_linear_softmax_xent

torch.fx.wrap("fused_softmax_xent")  # one call in a symbolic trace
torch.fx.wrap("fused_linear_softmax_xent")


class FusedSoftmaxXent(nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss(weight, size_average, ignore_index, reduce, reduction, label_smoothing), fused, and more:

    Args:
        z_loss, softcap, logit_scale, loss_dtype, inplace: as for `fused_softmax_xent`. A logit_scale that is a
            parameter becomes one of the module's, and is trained; one that is a tensor becomes a buffer.

    Shapes, dtypes and errors are those of `fused_softmax_xent`. A subclass, so that code which asks
    `isinstance(criterion, nn.CrossEntropyLoss)` goes on working, and with the same state_dict.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | Tensor = 1.0,
        loss_dtype: torch.dtype | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap = z_loss, softcap
        if isinstance(logit_scale, Tensor) and not logit_scale.is_leaf:
            raise ValueError(
                "logit_scale is computed from something else, of which the module would keep one value and its graph: "
                "pass it to forward, or keep a parameter"
            )
        if isinstance(logit_scale, Tensor) and not isinstance(logit_scale, nn.Parameter):
            self.register_buffer("logit_scale", logit_scale)
        else:
            self.logit_scale = logit_scale
        self.loss_dtype, self.inplace = loss_dtype, inplace

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (N, C), (C) or (N, C, d1, ...) against class indices or probabilities.

        sample_weight, normalizer: of this batch, as for `fused_softmax_xent`. logit_scale: in the place of the
        module's, such as the exponential of a parameter of the model.
        """
        return fused_softmax_xent(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale if logit_scale is None else logit_scale,
            sample_weight=sample_weight,
            normalizer=normalizer,
            loss_dtype=self.loss_dtype,
            inplace=self.inplace,
        )

    def __prepare_scriptable__(self) -> None:  # torch.jit.script asks for it
        raise NotImplementedError(
            "torch.jit.script does not take FusedSoftmaxXent: use torch.compile or torch.export, or script without it"
        )

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        options: dict[str, Any] = {
            "z_loss": 0.0,
            "softcap": None,
            "logit_scale": 1.0,
            "loss_dtype": None,
            "inplace": False,
        }
        options |= {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
        values = {name: getattr(self, name) for name in options}
        named = (f"{name}={x!r}" for name, x in values.items() if isinstance(x, Tensor) or x != options[name])
        return ", ".join(named)


class FusedLinearSoftmaxXent(FusedSoftmaxXent):
    """nn.LinearCrossEntropyLoss(in_features, num_classes, ...): a linear layer and the loss, without the logits.

    Args:
        bias, device, dtype: of the layer, `self.linear`, whose parameters have nn.Linear's keys under `linear.`. The
            weight may be tied: `criterion.linear.weight = embedding.weight`.
        weight: of the classes, a buffer.
        the others: as for `fused_linear_softmax_xent`; logit_scale as for `FusedSoftmaxXent`.

    Raises RuntimeError where `self.linear` has become more than a linear layer (adapters, hooks, another forward).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | Tensor = 1.0,
        loss_dtype: torch.dtype | None = None,
        shift: bool = False,
        max_logits_bytes: int | None = None,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            loss_dtype=loss_dtype,
        )
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.shift, self.max_logits_bytes, self.accum_dtype = shift, max_logits_bytes, accum_dtype

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        valid_rows: int | None = None,
    ) -> Tensor:
        """The loss of hidden states (..., in_features) against class indices (...) or probabilities (..., num_classes).

        sample_weight, normalizer, logit_scale, valid_rows: of this batch, as for `fused_linear_softmax_xent`.
        """
        check_head(self.linear)
        return fused_linear_softmax_xent(
            input,
            self.linear.weight,
            target,
            self.linear.bias,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale if logit_scale is None else logit_scale,
            sample_weight=sample_weight,
            normalizer=normalizer,
            loss_dtype=self.loss_dtype,
            shift=self.shift,
            valid_rows=valid_rows,
            max_logits_bytes=self.max_logits_bytes,
            accum_dtype=self.accum_dtype,
        )

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        options = {"shift": False, "max_logits_bytes": None, "accum_dtype": None}
        named = (f"{name}={getattr(self, name)!r}" for name, x in options.items() if getattr(self, name) != x)
        return ", ".join(filter(None, (super().extra_repr(), *named)))

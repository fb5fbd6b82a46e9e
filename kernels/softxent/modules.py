"""The operation as a module."""

from torch import Tensor, nn

from .functional import fused_softmax_xent


class FusedSoftmaxXent(nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss(weight, size_average, ignore_index, reduce, reduction, label_smoothing), fused.

    Shapes, dtypes and errors are those of `fused_softmax_xent`. A subclass, so that code which asks
    `isinstance(criterion, nn.CrossEntropyLoss)` goes on working, and with the same state_dict.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return fused_softmax_xent(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

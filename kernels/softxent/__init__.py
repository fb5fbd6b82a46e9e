"""Fused softmax and cross-entropy for PyTorch, forward and backward, in Triton."""

from .functional import LossAndStats, fused_softmax_xent, fused_softmax_xent_with_stats
from .modules import FusedSoftmaxXent
from .softmax import log_softmax, softmax

__all__ = [
    "FusedSoftmaxXent",
    "LossAndStats",
    "fused_softmax_xent",
    "fused_softmax_xent_with_stats",
    "log_softmax",
    "softmax",
]
__version__ = "0.1.0"

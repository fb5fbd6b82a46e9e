"""Fused softmax and cross-entropy for PyTorch, forward and backward, in Triton."""

from .functional import fused_softmax_xent
from .modules import FusedSoftmaxXent
from .softmax import log_softmax, softmax

__all__ = ["FusedSoftmaxXent", "fused_softmax_xent", "log_softmax", "softmax"]
__version__ = "0.1.0"

"""Fused softmax and cross-entropy for PyTorch, forward and backward, in Triton."""

from .functional import LossAndStats, fused_softmax_xent, fused_softmax_xent_with_stats
from .linear import fused_linear_softmax_xent, fused_linear_softmax_xent_with_stats, linear_logprobs
from .modules import FusedLinearSoftmaxXent, FusedSoftmaxXent
from .normalizer import global_normalizer
from .parallel.vocab import vocab_parallel_softmax_xent, vocab_parallel_softmax_xent_with_stats
from .softmax import log_softmax, softmax

__all__ = [
    "FusedLinearSoftmaxXent",
    "FusedSoftmaxXent",
    "LossAndStats",
    "fused_linear_softmax_xent",
    "fused_linear_softmax_xent_with_stats",
    "fused_softmax_xent",
    "fused_softmax_xent_with_stats",
    "global_normalizer",
    "linear_logprobs",
    "log_softmax",
    "softmax",
    "vocab_parallel_softmax_xent",
    "vocab_parallel_softmax_xent_with_stats",
]
__version__ = "0.1.0"

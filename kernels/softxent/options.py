"""What one call hands from layer to layer: its tensors, its options, and what is wanted of the rows."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    logits: Tensor  # [n_rows, n_cols] any strides
    target: Any  # [n_rows] int, or [n_rows, n_cols] floating point; None: softmax has no target
    weight: Tensor | None = None  # [n_cols]
    sample_weight: Tensor | None = None  # [n_rows]
    normalizer: Tensor | None = None  # [1] what the mean divides by, instead of the sum of w_y over targets that count
    logit_scale: Tensor | None = None  # [] in the place of the option


class Options(NamedTuple):
    """Numbers may be tensors [] on the device of the logits, where the kernels load them; but not logit_scale."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float | Tensor = 0.0
    z_loss: float | Tensor = 0.0
    softcap: float | Tensor | None = None
    logit_scale: float = 1.0

    def maps(self, inputs: Inputs) -> bool:
        """Whether the softmax is one of other numbers than the logits."""
        return self.softcap is not None or self.logit_scale != 1 or inputs.logit_scale is not None

    @property
    def tensors(self) -> list[Tensor]:
        """What to save for backward, so that autograd tells who has edited a number since."""
        return [x for x in (self.label_smoothing, self.z_loss, self.softcap) if isinstance(x, Tensor)]


def is_given(number: float | Tensor | None, neutral: float = 0.0) -> bool:
    """Whether it may change anything: a tensor may, for its value is not looked at."""
    return isinstance(number, Tensor) or (number is not None and number != neutral)


class Stats(NamedTuple):
    """Of each row [n_rows], or None where it is not wanted. As gradients: incoming ones."""

    lse: Tensor | None = None
    entropy: Tensor | None = None
    target_logprob: Tensor | None = None
    prediction: Tensor | None = None  # int64

    def without(self, skipped: Tensor) -> "Stats":
        """Of rows that do not count: 0, and class -1."""
        found = {name: x for name, x in self._asdict().items() if x is not None}
        return Stats(**{name: x.masked_fill(skipped, -1 * (name == "prediction")) for name, x in found.items()})


NO_STATS = Stats()
DIFFERENTIABLE = ("lse", "entropy", "target_logprob")


def empty_stats(wanted: frozenset[str], logits: Tensor) -> Stats:
    """Room for those that are wanted: float32, or float64 for float64 logits; the prediction int64."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    dtypes = {name: torch.int64 if name == "prediction" else acc for name in wanted}
    return Stats(**{name: logits.new_empty(logits.shape[0], dtype=dtype) for name, dtype in dtypes.items()})

"""What the mean divides by: the sum of the weights of the targets that count."""

import torch
from torch import Tensor


def normalizer(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """A number on the device of the target, never read by the host. Weights that sum to 0 give NaN."""
    target = target.long()  # first: a uint8 156 is not -100
    kept = target != ignore_index
    if weight is None:
        return torch.count_nonzero(kept)
    # A target out of range has its NaN or its error from the row's loss; here it must only not be read.
    y = torch.where(kept, target, 0).clamp(0, len(weight) - 1)
    total = torch.where(kept, weight.to(dtype)[y], 0).sum()
    return torch.where(total == 0, float("nan"), total)  # as torch: NaN, though a smoothed loss over 0 is infinite

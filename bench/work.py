"""A contender's piece of work as something to call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.contenders import Contender

Result = tuple[Tensor, Tensor | None]  # the loss (a number) or the probabilities; the gradient of the logits
Run = Callable[[], Any]


class Work:
    """One contender at one case: `run(inputs)` does all of it, and leaves nothing for later.

    Where a contender overwrites the logits, `restore` comes before the next `run`.
    """

    def __init__(self, contender: Contender, case: Case) -> None:
        self.case, self.function = case, contender.make(case)
        self.overwrites = contender.overwrites and case.op == "cross_entropy"
        self.incoming: dict[torch.dtype, Tensor] = {}  # of a loss, in its dtype: made once, not while timed

    def run(self, inputs: Inputs) -> Result:
        if self.case.mode == "forward":
            with torch.no_grad():
                return self.forward(inputs), None
        out = self.forward(inputs)
        incoming = inputs.gradient
        if incoming.dtype != out.dtype:
            if out.dtype not in self.incoming:
                self.incoming[out.dtype] = incoming.to(out.dtype)
            incoming = self.incoming[out.dtype]
        (gradient,) = torch.autograd.grad(out, inputs.logits, incoming)
        return out.detach(), gradient

    def forward(self, inputs: Inputs) -> Tensor:
        out = self.function(inputs.logits, inputs.target)
        return out if self.case.op == "softmax" or out.dim() == 0 else out.mean()


@torch.no_grad()
def restore(inputs: Inputs, logits: Tensor) -> None:
    """After a contender that overwrites them."""
    inputs.logits.copy_(logits)

"""A contender's piece of work as something to call: what comes before the clock starts, and what the clock sees."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.contenders import Contender, Function

Result = tuple[Tensor, Tensor | None]  # the loss (a number) or the probabilities; the gradient of the logits


class Work:
    """One contender at one case.

        state = work.prepare(inputs)     # the forward pass, where only backward is timed
        result = work.run(state)

    `run` leaves nothing for later: what it returns is the result. Where a contender overwrites the logits, `restore`
    comes before the next `prepare`.
    """

    def __init__(self, contender: Contender, case: Case) -> None:
        self.contender, self.case = contender, case
        self.function: Function = contender.make(case)
        self.incoming: dict[torch.dtype, Tensor] = {}  # of a loss, in its dtype: made once, not while timed

    def forward(self, inputs: Inputs) -> Tensor:
        out = self.function(inputs.logits, inputs.target)
        return out if self.case.op == "softmax" or out.dim() == 0 else out.mean()

    def prepare(self, inputs: Inputs) -> tuple[Inputs, Tensor | None]:
        return inputs, self.forward(inputs) if self.case.mode == "backward" else None

    def run(self, state: tuple[Inputs, Tensor | None]) -> Result:
        inputs, out = state
        if self.case.mode == "forward":
            with torch.no_grad():
                return self.forward(inputs), None
        out = self.forward(inputs) if out is None else out
        incoming = inputs.gradient
        if incoming.dtype != out.dtype:
            if out.dtype not in self.incoming:
                self.incoming[out.dtype] = incoming.to(out.dtype)
            incoming = self.incoming[out.dtype]
        (gradient,) = torch.autograd.grad(out, inputs.logits, incoming)
        return out.detach(), gradient

    def once(self, inputs: Inputs) -> Result:
        return self.run(self.prepare(inputs))


@torch.no_grad()
def restore(inputs: Inputs, logits: Tensor) -> None:
    """After a contender that overwrites them."""
    inputs.logits.copy_(logits)


Run = Callable[[], Any]

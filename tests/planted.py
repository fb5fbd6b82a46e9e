"""Contenders that cheat or err, for the tests of the suite that has to find them out; and a machine without noise."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.contenders import Contender, Function, Unsupported, options_of
from bench.machine import Cpu
from bench.work import Run, Work


def contender(make: Callable[[Case], Function], overwrites: bool = False) -> Contender:
    return Contender("1", make, overwrites)


def works(case: Case, **makes: Callable[[Case], Function]) -> dict[str, Work]:
    return {name: Work(contender(make), case) for name, make in makes.items()}


def right(case: Case) -> Function:
    return lambda logits, target: F.cross_entropy(logits, target, **options_of(case))


def wrong_loss(case: Case) -> Function:
    return lambda logits, target: F.cross_entropy(logits, target) * 1.05


class OffInOneRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        gradient = grad_outputs[0].clone()
        gradient[-1] *= 1.1
        return gradient


def wrong_gradient(case: Case) -> Function:
    return lambda logits, target: F.cross_entropy(OffInOneRow.apply(logits), target)


class Unwritten(OffInOneRow):
    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        gradient = grad_outputs[0].clone()
        gradient[0, 0] = float("nan")
        return gradient


def unwritten_gradient(case: Case) -> Function:
    return lambda logits, target: F.cross_entropy(Unwritten.apply(logits), target)


class Empty(OffInOneRow):
    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return torch.empty_like(grad_outputs[0])


def empty_gradient(case: Case) -> Function:
    """Memory as it was handed out."""
    return lambda logits, target: F.cross_entropy(Empty.apply(logits), target)


class WithoutLastColumn(OffInOneRow):
    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        gradient = grad_outputs[0].clone()
        gradient[:, -1] = 0
        return gradient


def without_last_column(case: Case) -> Function:
    return lambda logits, target: F.cross_entropy(WithoutLastColumn.apply(logits), target)


def stale(case: Case) -> Function:
    """Returns what it returned last time for these addresses."""
    known: dict[int, Tensor] = {}

    def function(logits: Tensor, target: Tensor) -> Tensor:
        if logits.data_ptr() not in known:
            known[logits.data_ptr()] = F.cross_entropy(logits, target).detach()
        loss = F.cross_entropy(logits, target)
        return loss - loss.detach() + known[logits.data_ptr()]

    return function


def wrong_later(calls: int) -> Callable[[Case], Function]:
    """Right until it was called so often."""

    def make(case: Case) -> Function:
        count = 0

        def function(logits: Tensor, target: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return F.cross_entropy(logits, target) * (1.0 if count <= calls else 2.0)

        return function

    return make


class Overwrite(torch.autograd.Function):
    """Right, but its gradient lies where the logits were."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            copy = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(copy, target)
        (ctx.gradient,) = torch.autograd.grad(loss, copy)
        logits.data.copy_(ctx.gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return ctx.gradient * grad_outputs[0], None


def overwriting(case: Case) -> Function:
    def function(logits: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = Overwrite.apply(logits, target)
        return loss

    return function


def writes_target(case: Case) -> Function:
    def function(logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target.clone())
        target[0] = (target[0] + 1) % case.n_cols
        return loss

    return function


def raising(case: Case) -> Function:
    def function(logits: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available\nand more lines")

    return function


def cannot(case: Case) -> Function:
    raise Unsupported("rows of more than 4 classes")


class Clock(Cpu):
    """A machine whose every call takes what `cost` says, so that its figures are known."""

    def __init__(self, cost: Callable[[Run], float]) -> None:
        super().__init__()
        self.cost = cost

    def seconds(self, run: Run) -> float:
        run()
        return self.cost(run)

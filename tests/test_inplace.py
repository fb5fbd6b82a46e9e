"""inplace=True: the gradient goes over the logits, and what would then be wrong raises."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from softxent import fused_softmax_xent

pytestmark = pytest.mark.usefixtures("short_wide_rows")
CASES: dict[str, tuple[tuple[int, int], torch.dtype, dict[str, Any]]] = {
    "few": ((300, 10), torch.float32, {}),
    "two": ((300, 2), torch.float32, {}),
    "three": ((600, 3), torch.bfloat16, {}),
    "tiny": ((20, 10), torch.bfloat16, {"label_smoothing": 0.1}),
    "rows": ((20, 100), torch.float32, {"label_smoothing": 0.1, "weight": True}),
    "odd": ((5, 1001), torch.bfloat16, {"weight": True}),
    "sum": ((5, 1001), torch.float64, {"reduction": "sum"}),
    "none": ((5, 1000), torch.float32, {"reduction": "none"}),
    "float16": ((5, 1001), torch.float16, {}),
    "wide": ((2, 1501), torch.bfloat16, {}),
    "wide, smoothed": ((2, 1501), torch.float32, {"label_smoothing": 0.1}),
    "wide, none": ((2, 2501), torch.float32, {"reduction": "none"}),
    "wide, float16": ((2, 2501), torch.float16, {"weight": True}),
    "probabilities": ((5, 1001), torch.float32, {"label_smoothing": 0.1, "soft": True}),
}


def gradient(case: str, device: torch.device, inplace: bool, stride: int = 0, dloss: float = 1.0) -> Any:
    """The loss and the gradient that arrives upstream; the memory that the logits were in; and what it was before."""
    (n_rows, n_cols), dtype, options = CASES[case]
    options = dict(options)
    generator = torch.Generator().manual_seed(n_cols)
    memory = torch.randn(n_rows, stride or n_cols, generator=generator).mul(3).to(device, dtype)
    target = torch.randint(n_cols, (n_rows,), generator=generator).to(device)
    target[0], target[1] = 0, -100  # that of row 0 is written before the row's other blocks, if they are apart
    if options.pop("soft", False):
        target = torch.rand(n_rows, n_cols, generator=generator).to(device)
    if options.pop("weight", False):
        options["weight"] = torch.rand(n_cols, generator=generator).to(device, dtype)
    before = memory.clone()
    leaf = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
    arrived: list[Tensor] = []
    logits = memory.detach()[:, :n_cols] if stride else memory.detach()
    logits = Through.apply(logits, leaf)
    logits.register_hook(arrived.append)
    loss = fused_softmax_xent(logits, target, inplace=inplace, **options)
    loss.backward(torch.full_like(loss, dloss))
    return (loss.detach(), arrived[0]), memory, before


class Through(torch.autograd.Function):
    """Its first argument as the result of an operation: what an upstream layer gives."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, leaf: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        return None, grad_outputs[0].sum()


@pytest.mark.parametrize("dloss", [1.0, 0.37])
@pytest.mark.parametrize("case", CASES)
def test_the_same_gradient_where_the_logits_were(path: str, device: torch.device, case: str, dloss: float) -> None:
    (_, n_cols), _, _ = CASES[case]
    (loss, expected), memory, before = gradient(case, device, inplace=False, dloss=dloss)
    assert torch.equal(memory, before)
    (loss_inplace, arrived), memory, _ = gradient(case, device, inplace=True, dloss=dloss)
    assert torch.equal(loss_inplace, loss) and torch.equal(arrived, expected)
    assert arrived.data_ptr() == memory.data_ptr() and torch.equal(memory, expected)
    (loss_inplace, arrived), memory, before = gradient(case, device, inplace=True, stride=n_cols + 3, dloss=dloss)
    assert arrived.data_ptr() == memory.data_ptr() and torch.equal(memory[:, n_cols:], before[:, n_cols:])
    (loss, expected), _, _ = gradient(case, device, inplace=False, stride=n_cols + 3, dloss=dloss)
    torch.testing.assert_close((loss_inplace, arrived), (loss, expected))


def logits_and_target(device: torch.device) -> tuple[Tensor, Tensor]:
    leaf = torch.randn(4, 10, device=device, requires_grad=True)
    return leaf * 2, torch.tensor([1, 2, -100, 3], device=device)


def test_logits_are_left_alone_where_no_gradient_is_asked_for(path: str, device: torch.device) -> None:
    logits, target = logits_and_target(device)
    before = logits.detach().clone()
    with torch.no_grad():
        fused_softmax_xent(logits, target, inplace=True)
    fused_softmax_xent(logits.detach(), target, inplace=True)
    assert torch.equal(logits, before)


def test_a_second_backward_pass_raises(path: str, device: torch.device) -> None:
    for options in ({}, {"reduction": "none"}):
        logits, target = logits_and_target(device)
        loss = fused_softmax_xent(logits, target, inplace=True, **options).sum()  # type: ignore[arg-type]
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward pass after inplace"):
            loss.backward()
    logits, target = logits_and_target(device)
    loss = fused_softmax_xent(logits, torch.rand(4, 10, device=device), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass after inplace"):
        loss.backward()


def test_a_recorded_backward_pass_raises(path: str, device: torch.device) -> None:
    for target in (logits_and_target(device)[1], torch.rand(4, 10, device=device)):
        logits, _ = logits_and_target(device)
        loss = fused_softmax_xent(logits, target, inplace=True)
        with pytest.raises(RuntimeError, match="recorded"):
            torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_autograd_sees_that_the_logits_changed(path: str, device: torch.device, options: dict[str, Any]) -> None:
    """exp keeps its result for its own backward pass."""
    leaf = torch.randn(4, 10, device=device, requires_grad=True)
    loss = fused_softmax_xent(leaf.exp(), logits_and_target(device)[1], inplace=True, **options).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_sees_it_though_the_loss_is_never_differentiated(path: str, device: torch.device) -> None:
    exponential = torch.randn(4, 10, device=device, requires_grad=True).exp()
    fused_softmax_xent(exponential, logits_and_target(device)[1], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exponential.sum().backward()


def test_what_lies_in_the_memory_of_the_logits_is_not_written_over(path: str, device: torch.device) -> None:
    leaf = torch.rand(4, 24, device=device, requires_grad=True)
    logits, y = leaf * 2, torch.tensor([1, 2, 0, 3], device=device)
    rows, shared = logits[:, :10], logits.detach()
    overlapping: dict[str, tuple[Any, dict[str, Any]]] = {
        "target": (shared[:, :10], {}),
        "target, in part": (shared[:, 6:16], {}),
        "target, of other rows": (shared.view(-1)[30:70].view(4, 10), {}),
        "sample_weight": (y, {"sample_weight": shared[:, 9]}),
        "weight": (y, {"weight": shared[1, 4:14]}),
        "weight, from behind one row into the next": (y, {"weight": shared.view(-1)[20:30]}),
        "normalizer": (y, {"normalizer": shared[2, 2]}),
        "logit_scale": (y, {"logit_scale": shared[0, 0]}),
    }
    for name, (target, options) in overlapping.items():
        with pytest.raises(RuntimeError, match=f"would write over {name.split(',')[0]}, which lies in the memory"):
            fused_softmax_xent(rows, target, inplace=True, **options)
    assert torch.equal(logits, leaf * 2)
    apart: tuple[tuple[Any, dict[str, Any]], ...] = (
        (shared[:, 10:20], {}),
        (y, {"sample_weight": shared[:, 20]}),
        (y, {"weight": shared[3, 14:24]}),
    )
    for target, options in apart:
        shared.copy_(leaf.detach() * 2)  # what the last round wrote over
        z = shared[:, :10].clone().requires_grad_()
        (expected,) = torch.autograd.grad(fused_softmax_xent(z, target, **options), z)
        loss = fused_softmax_xent(Through.apply(shared[:, :10], leaf.sum()), target, inplace=True, **options)
        loss.backward()
        torch.testing.assert_close(shared[:, :10], expected)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a leaf": (lambda z: z, "leaf"),
    "a view of a leaf": (lambda z: z[:, 1:], "leaf"),
    "classes apart": (lambda z: (z * 2).t().contiguous().t(), "strides"),
    "rows that overlap": (lambda z: (z * 2)[:1].expand(4, 10), "strides"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_over_is_refused(path: str, device: torch.device, case: str) -> None:
    make, message = REFUSED[case]
    logits = make(torch.randn(4, 10, device=device, requires_grad=True))
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        fused_softmax_xent(logits, logits_and_target(device)[1], inplace=True)
    assert torch.equal(logits, before)


def test_transforms_and_a_weight_with_a_gradient_are_refused(path: str, device: torch.device) -> None:
    logits, target = logits_and_target(device)
    with pytest.raises(RuntimeError, match="transforms"):
        torch.func.grad(lambda z: fused_softmax_xent(z * 2, target, inplace=True))(logits)
    soft, weight = torch.rand(4, 10, device=device), torch.ones(10, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="weight"):
        fused_softmax_xent(logits, soft, weight, inplace=True)


NATIVE = pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="Inductor's code does not compile so: at::vec is missing"
)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NATIVE)])
def test_compiled_with_a_break_the_logits_are_written_over_too(path: str, device: torch.device, backend: str) -> None:
    def step(leaf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = leaf * 2
        return fused_softmax_xent(logits, target, inplace=True, z_loss=0.1) * 3, logits

    torch._dynamo.reset()
    leaf, target = torch.randn(4, 10, device=device, requires_grad=True), logits_and_target(device)[1]
    expected = torch.autograd.grad(step(leaf, target)[0], leaf)[0]
    loss, logits = torch.compile(step, backend=backend)(leaf, target)
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(logits.detach(), expected / 2)


def test_a_whole_graph_in_place_is_refused(path: str, device: torch.device) -> None:
    def loss(leaf: Tensor, target: Tensor) -> Tensor:
        return fused_softmax_xent(leaf * 2, target, inplace=True)

    torch._dynamo.reset()
    leaf, target = torch.randn(4, 10, device=device, requires_grad=True), logits_and_target(device)[1]
    step = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"inplace=True does not go with .* leave it out there"):
        step(leaf, target)
    with torch.no_grad():  # where it does nothing
        torch.testing.assert_close(step(leaf, target), loss(leaf, target))
    with pytest.raises(RuntimeError, match=r"torch\.export: leave it out there"):
        torch.export.export(Loss(loss), (leaf, target))


class Loss(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Tensor:
        loss: Tensor = self.function(*arguments)
        return loss


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "its result": lambda x: x.exp(),
    "its result, and returns a view": lambda x: x.exp().view(4, 10),
}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("case", KEPT)
def test_what_a_compiled_function_keeps_is_not_written_over(device: torch.device, case: str, whole: bool) -> None:
    """By a view that has a version of its own: torch's in-place operations give wrong gradients there."""

    def step(function: Callable[[Tensor], Tensor], leaf: Tensor, target: Tensor) -> Tensor:
        return fused_softmax_xent(function(leaf * 2).view(4, 10), target, inplace=True)

    torch._dynamo.reset()
    leaf, target = torch.randn(2, 2, 10, device=device, requires_grad=True), logits_and_target(device)[1]
    function = KEPT[case]
    if whole:
        step = torch.compile(step, backend="aot_eager")
    else:
        function = torch.compile(function, backend="aot_eager")
    with pytest.raises(RuntimeError, match="the compiled function which made them keeps"):
        step(function, leaf, target)
    with torch.no_grad():
        step(function, leaf, target)


def test_logits_that_have_to_be_copied_are_not_written(path: str, device: torch.device) -> None:
    leaf = torch.randn(2, 10, 7, device=device, requires_grad=True)
    logits, target = leaf * 2, torch.zeros(2, 7, dtype=torch.int64, device=device)
    before = logits.detach().clone()
    fused_softmax_xent(logits, target, inplace=True).backward()
    assert torch.equal(logits, before)
    expected = torch.autograd.grad(fused_softmax_xent(leaf * 2, target), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)


def test_a_gradient_that_was_written_over_raises(path: str, device: torch.device) -> None:
    leaf = torch.randn(4, 10, device=device, requires_grad=True)
    logits = leaf * 2
    loss = fused_softmax_xent(logits, torch.zeros(4, dtype=torch.int64, device=device), inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="written to since"):
        loss.backward()

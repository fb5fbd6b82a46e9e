"""The oracle itself: against PyTorch in float64, and against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from exactness import by_reference
from softxent import reference


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_agrees_with_torch_in_float64(weighted: bool, label_smoothing: float, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 7, generator=generator, dtype=torch.float64).mul_(4).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 5, 6, -100, 3])
    weight = torch.rand(7, generator=generator, dtype=torch.float64) if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    ours = by_reference(logits, target, **options)  # type: ignore[arg-type]
    torchs = F.cross_entropy(logits, target, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-13)
    grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, torchs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_a_confident_row_is_exact() -> None:
    """exp(-40) is lost beside 1 in float64 as well: the reference must not add it to 1."""
    logits = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = by_reference(logits, torch.tensor([0]), reduction="none")
    loss.backward()
    assert logits.grad is not None
    expected = 2 * math.exp(-40)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(logits.grad[0, 0].item(), -expected, rtol=1e-14, atol=0)
    assert torch.all(F.cross_entropy(logits, torch.tensor([0])) == 0)


def test_softmax_of_large_and_small_logits() -> None:
    """(0.1, 10, 0.1) is confident of the second class; next to 1000 the same 10 is nothing."""
    p = reference.softmax(torch.tensor([[0.1, 10, 0.1], [1e3, 10, 1e3]], dtype=torch.float64))
    torch.testing.assert_close(p[0].tolist(), [5.0172e-05, 0.99989966, 5.0172e-05], rtol=1e-4, atol=0)
    torch.testing.assert_close(p[1].tolist(), [0.5, 0.0, 0.5], rtol=0, atol=1e-300)
    torch.testing.assert_close(
        reference.log_softmax(torch.tensor([1e3, 10, 1e3], dtype=torch.float64)).tolist(),
        [-math.log(2), -990 - math.log(2), -math.log(2)],
        rtol=1e-15,
        atol=0,
    )

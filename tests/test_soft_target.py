"""Class probabilities as targets, against float64 and torch.nn.functional.cross_entropy, through both paths."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exactness import assert_as_exact_as_torch
from softxent import fused_softmax_xent

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.2, "reduction": "sum"},
    {"weight": True, "reduction": "none"},
    {"weight": True, "label_smoothing": 0.1},
    {"label_smoothing": 1.0},
)


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(shape, generator=generator).mul(3).to(device, dtype)
    return logits, torch.rand(shape, generator=generator).to(device, dtype)


def run(op: Any, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits, target = logits.detach().clone().requires_grad_(), target.detach().clone().requires_grad_()
    loss = op(logits, target, **options)
    generator = torch.Generator().manual_seed(3)
    dloss = torch.randn(loss.shape, generator=generator).bfloat16().to(loss.device, loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, (logits, target), dloss)  # type: ignore[return-value]


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    n_cols = logits.shape[min(1, logits.dim() - 1)]
    if "weight" in options:
        options["weight"] = torch.linspace(0, 2, n_cols, dtype=logits.dtype, device=logits.device)
    results, torchs = (
        run(fused_softmax_xent, logits, target, **options),
        run(F.cross_entropy, logits, target, **options),
    )
    if "weight" in options:
        options["weight"] = options["weight"].double()
    exact = run(F.cross_entropy, logits.double(), target.double(), **options)
    for what, ours, theirs, right in zip(("loss", "dlogits", "dtarget"), results, torchs, exact, strict=True):
        assert_as_exact_as_torch(ours, theirs, right, what, 64 if logits.dtype == torch.float64 else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 10), (5, 1000), (2, 4097), (2, 50257)], ids=str)
def test_loss_and_both_gradients_are_as_exact_as_torch(
    path: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for options in OPTIONS if shape[1] < 4000 else OPTIONS[3:4]:
        check(*make(shape, dtype, device), **options)


def test_shapes_and_strides(path: str, device: torch.device) -> None:
    for shape in ((10,), (3, 10, 4), (2, 10, 3, 2)):
        check(*make(shape, torch.float32, device))
        check(*make(shape, torch.float32, device), reduction="none", label_smoothing=0.1)
    logits, target = make((6, 40), torch.float32, device)
    check(logits[:, ::4], target.reshape(40, 6).t()[:, :10])


def test_a_one_hot_target_is_a_class_index(path: str, device: torch.device) -> None:
    logits, _ = make((8, 10), torch.float64, device)
    y = torch.arange(8, device=device)
    for options in ({}, {"label_smoothing": 0.3}, {"reduction": "sum"}):
        soft = fused_softmax_xent(logits, F.one_hot(y, 10).double(), **options)  # type: ignore[arg-type]
        torch.testing.assert_close(soft, fused_softmax_xent(logits, y, **options))  # type: ignore[arg-type]


def test_a_masked_class_without_probability_is_left_out(path: str, device: torch.device) -> None:
    """PyTorch gives 0 * inf = NaN here."""
    for n_cols, masked in ((10, slice(0, 3)), (9000, slice(0, 5000))):
        logits, target = make((4, n_cols), torch.float32, device)
        logits[:, masked], target[:, masked] = float("-inf"), 0
        kept = torch.ones(n_cols, dtype=torch.bool, device=device)
        kept[masked] = False
        loss, dlogits, _ = run(fused_softmax_xent, logits, target)
        expected, expected_dlogits, _ = run(F.cross_entropy, logits[:, kept], target[:, kept])
        torch.testing.assert_close((loss, dlogits[:, kept]), (expected, expected_dlogits), rtol=1e-5, atol=1e-6)
        assert torch.equal(dlogits[:, masked], torch.zeros_like(dlogits[:, masked]))


def test_a_row_without_a_softmax_is_nan_and_harms_no_other(path: str, device: torch.device) -> None:
    logits, target = make((4, 10), torch.float32, device)
    logits[0, 3], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    loss, dlogits, _ = run(fused_softmax_xent, logits, target, reduction="none")
    assert loss[:3].isnan().all() and dlogits[:3].isnan().all() and loss[3].isfinite() and dlogits[3].isfinite().all()


def test_nothing_to_average(path: str, device: torch.device) -> None:
    empty = torch.zeros(0, 10, device=device, requires_grad=True)
    assert fused_softmax_xent(empty, empty.detach()).isnan()
    loss = fused_softmax_xent(empty, empty.detach(), reduction="sum")
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (2, 5, 0), (2, 0, 4), (0,)], ids=str)
def test_nothing_at_all_is_what_it_is_in_torch(
    path: str, device: torch.device, shape: tuple[int, ...], reduction: str
) -> None:
    results = []
    for op in (fused_softmax_xent, F.cross_entropy):
        logits = torch.zeros(shape, device=device, requires_grad=True)
        loss = op(logits, torch.zeros(shape, device=device), reduction=reduction)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_gradcheck_and_gradgradcheck(path: str, device: torch.device, options: dict[str, Any]) -> None:
    logits, target = (t.requires_grad_() for t in make((4, 5), torch.float64, device))
    if "weight" in options:
        options = options | {"weight": torch.linspace(0.1, 2, 5, dtype=torch.float64, device=device)}

    def op(z: Tensor, t: Tensor) -> Tensor:
        return fused_softmax_xent(z, t, **options)

    assert torch.autograd.gradcheck(op, (logits, target), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (logits, target), fast_mode=True)


def test_the_class_weights_get_a_gradient_as_in_torch(path: str, device: torch.device) -> None:
    logits, target = make((4, 5), torch.float32, device)
    grads = []
    for op in (fused_softmax_xent, F.cross_entropy):
        weight = torch.linspace(0.1, 2, 5, device=device, requires_grad=True)
        grads.append(torch.autograd.grad(op(logits, target, weight), weight)[0])
    torch.testing.assert_close(*grads)


def test_ignore_index_with_probabilities_raises_as_in_torch() -> None:
    for op in (F.cross_entropy, fused_softmax_xent):
        with pytest.raises(RuntimeError, match="ignore_index"):
            op(torch.zeros(2, 3), torch.zeros(2, 3), ignore_index=1)

"""fused_softmax_xent against float64 and against torch.nn.functional.cross_entropy, through both paths."""

import itertools
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exactness import WIDER, assert_as_exact_as_torch, exact_cross_entropy, roundings_of_softmax
from memory import peak_bytes
from softxent import fused_softmax_xent, fused_softmax_xent_with_stats, softmax
from softxent.cpu import row_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# 1, ten classes, more rows than one tile, a non-multiple of every block, one above the widest block, and far above it
SHAPES = ((1, 1), (3, 2), (70, 10), (5, 1000), (2, 4097), (3, 9000))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"ignore_index": 0},
    {"label_smoothing": 0.1},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.3, "ignore_index": 1},
    {"label_smoothing": 1.0, "ignore_index": -1},
)


def make(
    n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_rows * 1_000_003 + n_cols)
    logits = (torch.randn(n_rows, n_cols, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return logits.to(device), torch.randint(0, n_cols, (n_rows,), generator=generator).to(device)


def loss_and_gradient(op: Any, logits: Tensor, target: Tensor, dloss: Tensor | None = None, **options: Any) -> Any:
    logits = logits.detach().clone().requires_grad_()
    loss = op(logits, target, **options)
    loss.backward(torch.ones_like(loss) if dloss is None else dloss.to(loss.dtype))
    assert logits.grad is not None
    return loss.detach(), logits.grad


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    """Loss and gradient as exact as PyTorch's, measured against PyTorch in float64."""
    reduction = options.get("reduction", "mean")
    shape = target.shape if reduction == "none" and logits.dim() > 1 else ()
    dloss = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    dloss = dloss.to(logits.device)
    loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, dloss, **options)
    torchs, torchs_grad = loss_and_gradient(F.cross_entropy, logits, target.long(), dloss, **options)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].double()
    # The gradient arrives in the dtype of the loss: float64 must see the same, rounded, one.
    dloss = dloss.to(loss.dtype).double()
    yardstick = 0
    if logits.dtype == torch.float64 and logits.dim() == 2:
        exact, exact_grad = exact_cross_entropy(logits, target.long(), dloss, **options)
        yardstick = 0 if WIDER else 64
    else:
        exact, exact_grad = loss_and_gradient(F.cross_entropy, logits.double(), target.long(), dloss, **options)
    digits, terms = roundings_of_softmax(logits), 0.0
    if options.get("label_smoothing"):  # then the gradient is a p_j - c_j
        w = options.get("weight")
        terms = float(dloss.abs().max() * (1 if w is None else w.max())) / (1 if reduction != "mean" else len(target))
    assert_as_exact_as_torch(loss, torchs, exact, "loss", yardstick, digits)
    assert_as_exact_as_torch(grad, torchs_grad, exact_grad, "gradient", yardstick, digits, terms)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_as_exact_as_torch(
    path: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype, reduction: str
) -> None:
    logits, target = make(*shape, dtype, device)
    for options in OPTIONS if reduction == "mean" else OPTIONS[4:5]:
        y = target.clone()
        if options.get("ignore_index", 0) < 0:
            y[::3] = options["ignore_index"]
        weight = torch.linspace(0, 2, shape[1], dtype=dtype, device=device) if "weight" in options else None
        check(logits, y, **options | {"weight": weight, "reduction": reduction})


def test_small_probabilities_keep_their_digits(path: str, device: torch.device) -> None:
    """Of a gradient of 1e-30, say: its relative error is no larger than torch's largest, or than its formula's."""
    for n_cols in (10, 1000, 9000):
        logits, target = make(6, n_cols, torch.float32, device, scale=10)
        errors, eps = [], torch.finfo(torch.float32).eps
        exact = loss_and_gradient(F.cross_entropy, logits.double(), target, reduction="none")[1]
        normal = exact.abs() > torch.finfo(torch.float32).tiny
        normal[torch.arange(6, device=device), target] = False  # p_y - 1 cancels in torch
        for op in (fused_softmax_xent, F.cross_entropy):
            grad = loss_and_gradient(op, logits, target, reduction="none")[1].double()
            errors.append(((grad - exact).abs() / exact.abs())[normal].max().item())
        assert errors[0] <= max(errors[1] + eps, roundings_of_softmax(logits) * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary_of_50257(path: str, device: torch.device, dtype: torch.dtype) -> None:
    check(*make(2, 50257, dtype, device), label_smoothing=0.1)
    for n_cols in (50257, 50304):
        logits, target = make(2, n_cols, dtype, device, scale=1.0)
        check(logits, target, reduction="none")
        loss = fused_softmax_xent(logits, target, reduction="none", loss_dtype=torch.float32)
        expected = F.cross_entropy(logits.double(), target, reduction="none").float()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hard_rows(path: str, device: torch.device, dtype: torch.dtype) -> None:
    """Logits of +-1e4 and 1e6, all equal, one dominating, -inf in the first or last half, whole leading blocks too."""
    for n_cols in (1, 2, 10, 9000):
        logits, target = make(9, n_cols, dtype, device)
        logits[0] *= 1e4
        logits[1] += 1e4
        logits[2] = 1e6 + logits[2]
        logits[3] = 0.25
        logits[4] = -1e4
        logits[5, target[5]] += 50
        logits[6, : n_cols // 2] = float("-inf")
        logits[7, n_cols // 2 + 1 :] = float("-inf")
        logits[8, :-1] = float("-inf")
        target[6], target[7], target[8] = n_cols - 1, 0, n_cols - 1
        for row in range(9):  # apart: the error that one row excuses is no excuse for the others
            check(logits[row : row + 1], target[row : row + 1], reduction="none")
        check(logits, target, reduction="none")


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [101, 1001, 1501, 2501])
def test_the_ends_of_odd_rows_count(path: str, device: torch.device, n_cols: int) -> None:
    """They lie in granules that the row shares with its neighbours, and are read apart."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, target = make(4, n_cols, dtype, device)
        target[:] = n_cols // 2
        logits[:2, 0] += 300
        logits[2:, -1] += 300
        check(logits, target, reduction="none")
        target[::2], target[1::2] = 0, n_cols - 1
        check(logits, target, reduction="none")


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [1001, 1501, 1504])
def test_the_largest_may_lie_beside_the_target(path: str, device: torch.device, n_cols: int) -> None:
    """In its granule, or where the next chunk has it: a packed row's thread that holds the target holds that too; or at
    an end. So may what leaves the row without a softmax."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, target = make(7, n_cols, dtype, device)
        target[:] = 40
        rows = torch.arange(7, device=device)
        largest = torch.tensor([39, 41, 42, 552, 1064 if n_cols > 1064 else 43, 0, n_cols - 1], device=device)
        logits[rows, largest] = 300
        check(logits, target, reduction="none")
        prediction = fused_softmax_xent_with_stats(logits, target, stats="prediction").prediction
        assert prediction is not None and torch.equal(prediction, largest)
        for value in (float("nan"), float("inf")):
            logits[rows, largest] = value
            loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction="none")
            assert loss.isnan().all() and grad.isnan().all()


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [101, 1001, 1501, 2501])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_bits_of_odd_rows_that_start_alike_in_their_granules_are_the_same(
    path: str, device: torch.device, n_cols: int, label_smoothing: float
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        row, target = make(1, n_cols, dtype, device, scale=0.3)  # many values of a size: their sum rounds
        for first in (0, 3):
            memory = torch.zeros(8, n_cols + 16 + -n_cols % 16, dtype=dtype, device=device)
            memory[:, first : first + n_cols] = row
            for batch in (memory, memory[:1]):
                logits = batch[:, first : first + n_cols].requires_grad_()
                options: dict[str, Any] = {"reduction": "none", "label_smoothing": label_smoothing}
                loss = fused_softmax_xent(logits, target.repeat(len(batch)), **options)
                (grad,) = torch.autograd.grad(loss.sum(), logits)
                if batch is memory:
                    expected = loss[0].detach(), grad[0]
                assert (loss == expected[0]).all() and (grad == expected[1]).all()


def test_class_weights_in_any_layout(path: str, device: torch.device) -> None:
    for n_cols in (10, 100, 33001):
        logits, target = make(4, n_cols, torch.float32, device)
        for weight in (torch.rand(2 * n_cols, device=device)[::2], torch.tensor(0.5, device=device).expand(n_cols)):
            check(logits, target, weight=weight)
            expected = F.cross_entropy(logits, torch.softmax(logits, 1), weight)
            torch.testing.assert_close(fused_softmax_xent(logits, torch.softmax(logits, 1), weight), expected)


def test_a_masked_target_has_infinite_loss_and_finite_gradient(path: str, device: torch.device) -> None:
    logits, target = make(3, 10, torch.float32, device)
    logits[1, target[1]] = float("-inf")
    loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction="none")
    assert loss[1] == float("inf") and loss[[0, 2]].isfinite().all()
    assert grad.isfinite().all()


def test_a_masked_class_under_label_smoothing_has_infinite_loss_unless_its_weight_is_zero(
    path: str, device: torch.device
) -> None:
    logits, target = make(4, 10, torch.float32, device)
    target[:] = 3
    logits[:, 5] = float("-inf")
    weight = torch.ones(10, device=device)
    assert (fused_softmax_xent(logits, target, reduction="none", label_smoothing=0.1) == float("inf")).all()
    weight[5] = 0
    loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, weight=weight, label_smoothing=0.1)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_softmax_is_nan_and_harms_no_other(path: str, device: torch.device, value: float) -> None:
    places: tuple[int | slice, ...] = (0, slice(None))
    for n_cols, cols in itertools.product((10, 5000), places):
        logits, target = make(3, n_cols, torch.float32, device)
        target[1] = 0
        whole, whole_grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction="none")
        if value == float("-inf") and cols == 0:
            continue  # one masked class is nothing special
        logits[1][cols] = value
        loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction="none")
        assert loss[1].isnan() and grad[1].isnan().all()
        assert torch.equal(loss[[0, 2]], whole[[0, 2]]) and torch.equal(grad[[0, 2]], whole_grad[[0, 2]])
        assert fused_softmax_xent(logits, target, reduction="none", label_smoothing=1)[1].isnan()


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("ahead", [12, 30, 60])
@pytest.mark.parametrize("n_cols", [2, 10, 1000, 1001, 1501, 1504, 5000])
def test_a_confident_prediction_keeps_its_loss_and_gradient(
    path: str, device: torch.device, n_cols: int, ahead: int
) -> None:
    """Where the target is far ahead, 1 - p rounds to 0 and PyTorch's loss and gradient with it."""
    logits, target = make(4, n_cols, torch.float32, device, scale=1)
    logits[torch.arange(4), target] = ahead
    loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction="none")
    z = logits.double()
    rest = (z - ahead).exp().scatter(1, target[:, None], 0)
    exact = rest.sum(1).log1p()
    exact_grad = (rest / (1 + rest.sum(1, keepdim=True))).scatter(
        1, target[:, None], -(rest.sum(1) / (1 + rest.sum(1)))[:, None]
    )
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=4e-5, atol=1e-37)


def test_ignored_rows_get_no_loss_and_no_gradient_even_if_nan(path: str, device: torch.device) -> None:
    logits, target = make(5, 10, torch.float32, device)
    target[[1, 3]] = -100
    logits[1], logits[3, 2] = float("nan"), float("inf")
    for reduction in ("mean", "sum", "none"):
        loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction=reduction)
        kept, kept_grad = loss_and_gradient(
            fused_softmax_xent, logits[[0, 2, 4]], target[[0, 2, 4]], reduction=reduction
        )
        # The sum of five numbers, two of them 0, may be taken in another order than that of three.
        torch.testing.assert_close(loss if reduction != "none" else loss[[0, 2, 4]], kept, rtol=5e-7, atol=0)
        assert torch.equal(grad[[0, 2, 4]], kept_grad)
        assert torch.equal(grad[[1, 3]], torch.zeros_like(grad[[1, 3]]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_infinite_incoming_gradient_leaves_ignored_rows_at_zero(
    path: str, device: torch.device, reduction: str
) -> None:
    logits, target = make(3, 10, torch.float32, device)
    target[1] = -100
    dloss = torch.full((3,) if reduction == "none" else (), float("inf"), device=device)
    _, grad = loss_and_gradient(fused_softmax_xent, logits, target, dloss, reduction=reduction)
    assert torch.equal(grad[1], torch.zeros_like(grad[1])) and not grad[0].isfinite().any()


@pytest.mark.parametrize("n_rows", [0, 4])
def test_nothing_to_average_is_nan_with_zero_gradient_and_nothing_to_sum_is_zero(
    path: str, device: torch.device, n_rows: int
) -> None:
    logits, target = torch.randn(n_rows, 10, device=device), torch.full((n_rows,), -100, device=device)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction=reduction)
        torch.testing.assert_close(loss.cpu(), torch.tensor(expected), equal_nan=True)
        assert torch.equal(grad, torch.zeros_like(logits))
    loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction="none")
    assert torch.equal(loss, torch.zeros(n_rows, device=device)) and torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("ignore_index", [2, -1, 255, 2**40])
def test_any_integer_can_be_the_ignored_class(path: str, device: torch.device, ignore_index: int) -> None:
    logits, target = make(6, 5, torch.float32, device)
    target[::2] = ignore_index
    check(logits, target, ignore_index=ignore_index)
    check(logits, target, ignore_index=ignore_index, weight=torch.linspace(0.5, 2, 5, device=device))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_integer_target_dtypes(path: str, device: torch.device, dtype: torch.dtype) -> None:
    logits, target = make(70, 10, torch.float32, device)
    target[3] = 200
    check(logits, target.to(dtype), ignore_index=200)


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [10, 100, 1000, 1001, 1504, 1501, 2504, 2501])
def test_strided_logits_and_targets_are_read_in_place_and_not_beyond(
    path: str, device: torch.device, n_cols: int
) -> None:
    for dtype, rtol in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        logits, target = make(6, n_cols, dtype, device)
        spread = torch.full((12,), 10**9, device=device)
        spread[::2] = target
        expected = loss_and_gradient(fused_softmax_xent, logits, target)
        views = [logits.t().contiguous().t(), torch.stack((logits, logits), 2)[:, :, 1]]
        for before, after in ((8, 16), (1, 2)):  # granules apart, if that, and values
            padded = torch.full((6, before + n_cols + after), float("nan"), device=device, dtype=dtype)
            views.append(padded[:, before : before + n_cols].copy_(logits))
        for view in views:
            assert not view.is_contiguous()
            view = view.detach().requires_grad_()
            loss = fused_softmax_xent(view, spread[::2])
            loss.backward()
            torch.testing.assert_close((loss.detach(), view.grad), expected, rtol=rtol, atol=1e-9)


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [10, 100, 1000, 1501, 1504, 2504])
def test_rows_beyond_2_to_the_31_values(path: str, device: torch.device, n_cols: int) -> None:
    """Of three rows the last starts there. Memory that nobody touches takes none."""
    stride, n_values = 2**30, 2**31 + 4096
    on_gpu = device.type != "cpu"
    zeros = torch.zeros(n_values, dtype=torch.int16, device=device) if on_gpu else np.zeros(n_values, np.int16)
    memory = torch.as_tensor(zeros).view(torch.bfloat16)
    z, target = make(3, n_cols, torch.bfloat16, device)
    even = torch.full_like(z, 1 / n_cols)
    ops: tuple[Any, ...] = (
        lambda z: fused_softmax_xent(z, target),
        lambda z: fused_softmax_xent(z, target, reduction="none"),
        lambda z: fused_softmax_xent(z, even),
        lambda z: fused_softmax_xent(z, even, reduction="none"),
        lambda z: softmax(z, 1).float().square(),
    )
    for op in ops:
        view = memory.as_strided(z.shape, (stride, 1)).copy_(z).requires_grad_()
        found = op(view)
        dout = torch.linspace(0.5, 1, found.numel(), device=device).to(found.dtype).view_as(found)
        grad = torch.autograd.grad(found, view, dout)[0]
        dense = z.clone().requires_grad_()
        expected = op(dense)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, dense, dout)[0], rtol=2**-7, atol=1e-9)


def test_shapes_of_torch(path: str, device: torch.device) -> None:
    logits, target = make(24, 10, torch.float32, device)
    check(logits[0], target[0])
    check(logits[0], target[0], reduction="none")
    for shape in ((6, 4), (3, 4, 2), (24,)):
        moved = logits.reshape(*shape, 10).movedim(-1, 1)
        for view in (moved, moved.contiguous()):
            check(view, target.reshape(shape), reduction="none")
            check(view, target.reshape(shape), label_smoothing=0.2)


def test_classes_last_in_memory_are_read_in_place(device: torch.device) -> None:
    functional = import_module("softxent.functional")
    images = torch.randn(2, 10, 3, 4, device=device).to(memory_format=torch.channels_last)
    assert functional._rows(images, 1, 10).data_ptr() == images.data_ptr()
    assert functional._rows(images.contiguous(), 1, 10).shape == (24, 10)


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@pytest.mark.parametrize("n_cols", [2, 40, 1000, 2100])
def test_more_rows_than_a_second_grid_dimension_holds(
    path: str, device: torch.device, n_cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid takes 2^31 - 1 programs in its first dimension and 65535 in another. Nothing is launched."""
    from triton.runtime.jit import KernelInterface

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda _, grid: lambda *_, **__: grids.append(grid))
    logits = torch.zeros(1, n_cols, dtype=torch.bfloat16, device=device).expand(66_000, n_cols).requires_grad_()
    target = torch.zeros(66_000, dtype=torch.int64, device=device)
    for reduction in ("mean", "none"):
        fused_softmax_xent(logits, target, reduction=reduction).sum().backward()
    softmax(logits, 1).backward(logits.detach())
    assert len(grids) >= 6 and all(1 <= n < 65536 for grid in grids for n in grid[1:])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_incoming_gradient_is_not_written(path: str, device: torch.device, reduction: str) -> None:
    logits, target = make(4, 10, torch.float32, device)
    target[2] = -100
    logits.requires_grad_()
    loss = fused_softmax_xent(logits, target, reduction=reduction)
    dloss = torch.full_like(loss, 3.0)
    torch.autograd.grad(loss, logits, dloss)
    assert torch.equal(dloss, torch.full_like(loss, 3.0))


def test_a_vocabulary_of_131072(path: str, device: torch.device) -> None:
    check(*make(2, 131_072, torch.float32, device), reduction="none")


def test_bfloat16_keeps_the_targets_gradient_at_p_0999(path: str, device: torch.device) -> None:
    """p - 1 in bfloat16 would be 0, or wrong by its whole size."""
    logits, target = torch.zeros(1, 10, dtype=torch.bfloat16, device=device), torch.tensor([0], device=device)
    logits[0, 0] = 9.125  # p = 0.99902
    for dloss in (1.0, 0.5, 3.0):
        _, grad = loss_and_gradient(fused_softmax_xent, logits, target, torch.tensor(dloss, device=device))
        exact = -dloss * logits.double().softmax(1)[0, 1:].sum()
        assert abs(grad[0, 0].double() / exact - 1) <= 2**-8 + 2**-9


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [10, 100, 1001, 1501, 1504, 2501])
def test_out_of_range_targets(path: str, device: torch.device, n_cols: int) -> None:
    logits, target = make(4, n_cols, torch.float32, device)
    for bad in (n_cols, -1, 2**40):
        y = target.clone()
        y[2] = bad
        if path == "torch":
            with pytest.raises(IndexError, match=rf"target {bad} at row 2 is out of bounds for {n_cols} classes"):
                fused_softmax_xent(logits, y)
            continue
        for weight in (None, torch.ones(n_cols, device=device)):
            loss, grad = loss_and_gradient(fused_softmax_xent, logits, y, weight=weight, reduction="none")
            assert loss[2].isnan() and grad[2].isnan().all()
            assert loss[[0, 1, 3]].isfinite().all() and grad[[0, 1, 3]].isfinite().all()


def test_the_gradient_of_any_backward_pass_is_the_same(path: str, device: torch.device) -> None:
    for dtype, rtol in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        logits, target = make(5, 100, dtype, device)
        logits.requires_grad_()
        loss = fused_softmax_xent(logits, target, label_smoothing=0.1, reduction="none").float()
        for scale in (1.0, 3.0, 1024.0, 1.0):
            (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, scale), retain_graph=True)
            (again,) = torch.autograd.grad(loss, logits, torch.full_like(loss, scale), retain_graph=True)
            assert torch.equal(grad, again)
            _, exact = loss_and_gradient(
                F.cross_entropy,
                logits.detach().double(),
                target,
                torch.full((5,), scale, device=device),
                label_smoothing=0.1,
                reduction="none",
            )
            torch.testing.assert_close(grad.double(), exact, rtol=rtol, atol=scale * 1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_second_backward_pass_of_a_graph_repeats_the_first(
    path: str, device: torch.device, dtype: torch.dtype
) -> None:
    logits, target = make(5, 100, dtype, device)
    target[2] = -100
    for reduction in ("mean", "sum", "none"):
        z = logits.clone().requires_grad_()
        loss = fused_softmax_xent(z, target, reduction=reduction)
        grads = [torch.autograd.grad(loss, z, torch.full_like(loss, 1.7), retain_graph=True)[0] for _ in range(3)]
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_a_small_float16_gradient_survives_until_the_loss_scale_lifts_it(path: str, device: torch.device) -> None:
    """p of the other classes is 1.5e-8: 0 in float16, and 5e-4 after a loss scale of 2^15."""
    logits = torch.zeros(1, 1000, dtype=torch.float16, device=device)
    logits[0, 0] = 18
    target, scale = torch.tensor([0], device=device), torch.tensor(2.0**15)
    _, grad = loss_and_gradient(fused_softmax_xent, logits, target, scale)
    exact = 2**15 * logits.double().softmax(1)[0, 1:]
    torch.testing.assert_close(grad[0, 1:].double(), exact, rtol=2**-9, atol=0)


def test_the_logits_are_never_written(path: str, device: torch.device) -> None:
    for dtype in DTYPES:
        logits, target = make(6, 100, dtype, device)
        target[1] = -100
        before, version = logits.clone(), logits._version
        leaf = logits.requires_grad_()
        with torch.no_grad():
            fused_softmax_xent(leaf, target)
        fused_softmax_xent(leaf, target).backward()
        assert torch.equal(leaf.detach(), before) and leaf._version == version


def test_editing_the_logits_between_two_backward_passes_raises(path: str, device: torch.device) -> None:
    base, target = make(6, 10, torch.float32, device)
    base.requires_grad_()
    logits = base * 1
    loss = fused_softmax_xent(logits, target)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_and_gradgradcheck(path: str, device: torch.device, options: dict[str, Any]) -> None:
    logits, target = make(4, 5, torch.float64, device, scale=1)
    options = dict(options)
    if "weight" in options:
        options["weight"] = torch.linspace(0.1, 2, 5, dtype=torch.float64, device=device)
    target[2] = options.get("ignore_index", -100)
    logits.requires_grad_()
    for reduction in ("none", "mean", "sum"):

        def op(z: Tensor, reduction: str = reduction) -> Tensor:
            return fused_softmax_xent(z, target, reduction=reduction, **options)

        assert torch.autograd.gradcheck(op, logits, fast_mode=True)
        assert torch.autograd.gradgradcheck(op, logits, fast_mode=True)


def test_gradient_penalty_is_not_dropped(path: str, device: torch.device) -> None:
    def penalty(op: Any) -> Tensor:
        logits, target = make(4, 10, torch.float32, device)
        logits.requires_grad_()
        (grad,) = torch.autograd.grad(op(logits, target), logits, create_graph=True)
        grad.square().sum().backward()
        assert logits.grad is not None
        return logits.grad

    torch.testing.assert_close(penalty(fused_softmax_xent), penalty(F.cross_entropy))


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(24, 100), (24, 101), (21, 10), (5, 1000), (5, 1504), (5, 2504)], ids=str)
def test_bit_identical_from_run_to_run_and_in_any_batch(
    path: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    logits, target = make(*shape, dtype, device)
    choices: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}]
    if path == "torch" or device.type == "cuda":  # not in the interpreter, which takes long
        choices.append({"softcap": 5.0})
    for options in choices:
        loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, reduction="none", **options)
        again, grad_again = loss_and_gradient(fused_softmax_xent, logits, target, reduction="none", **options)
        assert torch.equal(loss, again) and torch.equal(grad, grad_again)
        for rows in (slice(1, 5), slice(3, 4), slice(4, 5)):
            part, grad_part = loss_and_gradient(
                fused_softmax_xent, logits[rows], target[rows], reduction="none", **options
            )
            assert torch.equal(loss[rows], part) and torch.equal(grad[rows], grad_part)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}], ids=str)
def test_the_last_row_is_computed_as_the_others(path: str, soft: bool, options: dict[str, Any]) -> None:
    """On a CPU torch computes the last values of a tensor one by one, and some functions have other bits then."""
    logits, target = make(600, 11, torch.float32, torch.device("cpu"))
    y = logits.flip(1).softmax(1) if soft else target
    for dtype in (torch.float32, torch.float16):
        z = logits.to(dtype)
        loss, grad = loss_and_gradient(fused_softmax_xent, z, y, reduction="none", loss_dtype=torch.float32, **options)
        for n in range(1, 600, 7):
            part = fused_softmax_xent(z[:n], y[:n], reduction="none", loss_dtype=torch.float32, **options)
            assert torch.equal(part, loss[:n])
        for n in range(590, 600):
            part = loss_and_gradient(fused_softmax_xent, z[:n], y[:n], reduction="none", **options)[1]
            assert torch.equal(part, grad[:n])


def test_tensors_that_are_made_lie_where_the_logits_do(path: str, device: torch.device) -> None:
    """And not on the default device."""
    logits, target = make(16, 10, torch.float32, device)
    target[::2] = -100  # so many that the others are put side by side
    expected = loss_and_gradient(fused_softmax_xent, logits, target)
    with torch.device("meta"):
        found = loss_and_gradient(fused_softmax_xent, logits, target)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_the_loss_is_float32_under_autocast(path: str, device: torch.device) -> None:
    logits, target = make(5, 10, torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert fused_softmax_xent(logits, target).dtype == F.cross_entropy(logits, target).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_deprecated_reduction_arguments(path: str, device: torch.device) -> None:
    logits, target = make(5, 10, torch.float64, device)
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        expected = F.cross_entropy(logits, target, None, size_average, -100, reduce)
        torch.testing.assert_close(fused_softmax_xent(logits, target, None, size_average, -100, reduce), expected)


@pytest.mark.parametrize(("dtype", "ignore_index"), [(torch.uint8, -100), (torch.int32, 2**32), (torch.int32, 2**40)])
def test_a_narrow_target_is_widened_before_it_is_compared(
    path: str, device: torch.device, dtype: torch.dtype, ignore_index: int
) -> None:
    """156 is -100 in uint8, and 2**32 is 0 in int32."""
    logits, _ = make(4, 200, torch.float32, device)
    target = torch.tensor([156, 0, 2, 3], device=device)
    for weight in (None, torch.ones(200, device=device)):
        for create_graph in (False, True):
            grads = []
            for y in (target.to(dtype), target):
                z = logits.clone().requires_grad_()
                loss = fused_softmax_xent(z, y, weight, ignore_index=ignore_index)
                grads.append((loss.detach(), *torch.autograd.grad(loss, z, create_graph=create_graph)))
            torch.testing.assert_close(*grads, rtol=0, atol=0)
            torch.testing.assert_close(grads[0][0], F.cross_entropy(logits, target))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_hooks_of_the_logits_run_once_in_a_recorded_backward_pass(path: str, device: torch.device) -> None:
    for soft in (False, True):
        results = []
        for op in (fused_softmax_xent, F.cross_entropy):
            leaf, target = make(4, 10, torch.float32, device)
            leaf.requires_grad_()
            z = leaf * 1
            z.retain_grad()
            z.register_hook(lambda grad: grad * 2)
            op(z, torch.full_like(leaf, 0.1).detach() if soft else target).backward(create_graph=True)
            assert leaf.grad is not None and z.grad is not None
            results.append((leaf.grad.detach(), z.grad.detach()))
            leaf.grad = z.grad = None  # or the graph keeps itself alive
        torch.testing.assert_close(*results)


def test_ignored_and_missing_classes_in_a_recorded_backward_pass(path: str, device: torch.device) -> None:
    logits, target = make(4, 10, torch.float32, device)
    logits[1], target[1] = float("nan"), -100
    if path == "kernels":
        target[3] = 10
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(fused_softmax_xent(logits, target, reduction="sum"), logits, create_graph=True)
    assert torch.equal(grad[1], torch.zeros_like(grad[1])) and grad[[0, 2]].isfinite().all()
    if path == "kernels":
        assert grad[3].isnan().all()


def test_a_nan_shows_in_the_loss_even_where_the_class_weight_is_zero(path: str, device: torch.device) -> None:
    logits, target = make(3, 10, torch.float32, device)
    weight = torch.ones(10, device=device)
    weight[target[0]] = 0
    for col in (target[0], (target[0] + 1) % 10):
        z = logits.clone()
        z[0, col] = float("nan")
        loss, grad = loss_and_gradient(fused_softmax_xent, z, target, weight=weight, reduction="none")
        assert loss[0].isnan() and grad[0].isnan().all()


def test_a_forward_pass_without_gradients_prepares_none(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_loss = import_module("softxent.row_loss")
    asked: list[bool] = []
    implementation = row_loss.implementation

    class Spy:
        def __init__(self, module: Any) -> None:
            self.module = module

        def forward(self, *args: Any) -> Any:
            asked.append(args[3])
            return self.module.forward(*args)

    monkeypatch.setattr(row_loss, "implementation", lambda *args: Spy(implementation(*args)))
    logits, target = make(3, 10, torch.float32, device)
    fused_softmax_xent(logits, target)
    with torch.no_grad():
        fused_softmax_xent(logits.requires_grad_(), target)
    fused_softmax_xent(logits, target)
    assert asked == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_dtype_saves_the_rounding_of_the_loss(path: str, device: torch.device, dtype: torch.dtype) -> None:
    logits, target = make(7, 100, dtype, device)
    exact = F.cross_entropy(logits.double(), target)
    for y in (target, F.one_hot(target, 100).to(dtype)):
        loss = fused_softmax_xent(logits, y, loss_dtype=torch.float32)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="loss_dtype must be"):
        fused_softmax_xent(logits, target, loss_dtype=torch.int32)


NUMBERS: dict[str, Any] = {
    "python": lambda x: x,
    "float64 of numpy": np.float64,
    "float32 of numpy": np.float32,
    "tensor": lambda x: torch.tensor(x),
    "tensor of float64": lambda x: torch.tensor(x, dtype=torch.float64),
}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_any_kind(path: str, device: torch.device, kind: str, compiled: bool) -> None:
    logits, target = make(7, 10, torch.float32, device)
    logits.requires_grad_()

    def op(logits: Tensor, target: Tensor, numbers: dict[str, Any]) -> Tensor:
        return fused_softmax_xent(logits, target, **numbers)

    call, together = op, {"label_smoothing": 0.25, "z_loss": 0.5, "softcap": 3.0, "logit_scale": 2.0, "normalizer": 4.0}
    cases = [{name: value} for name, value in together.items()]
    if compiled:
        torch._dynamo.reset()
        call, cases = torch.compile(op, fullgraph=True, backend="aot_eager"), [together]
    for values in cases:
        numbers = {name: NUMBERS[kind](value) for name, value in values.items()}
        ours, expected = call(logits, target, numbers), op(logits, target, values)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)))
    if not compiled:
        ours = fused_softmax_xent(logits, target, ignore_index=np.int64(3))  # type: ignore[arg-type]
        torch.testing.assert_close(ours, F.cross_entropy(logits, target, ignore_index=3))


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "z_loss": 1e-4}], ids=str)
@pytest.mark.parametrize("weight", [None, torch.ones(1000)], ids=["", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_cpu_a_step_takes_its_gradient_and_a_chunk_beside_it(
    path: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight: Tensor | None, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(row_loss, "CHUNK", 2000)
    logits, target = make(64, 1000, dtype, torch.device("cpu"))
    logits.requires_grad_()
    peak = peak_bytes(lambda: torch.autograd.grad(fused_softmax_xent(logits, target, weight, **options), logits))
    assert logits.nbytes <= peak <= 1.4 * logits.nbytes


def test_logits_may_be_edited_once_the_gradient_is_made(path: str, device: torch.device) -> None:
    """As F.cross_entropy allows: a metric that masks classes, say. A gradient that has to be made anew says no."""
    for soft in (False, True):
        leaf, target = make(6, 10, torch.float32, device)
        y = torch.rand(6, 10, device=device) if soft else target
        expected = loss_and_gradient(fused_softmax_xent, leaf, y)[1]
        leaf.requires_grad_()
        logits = leaf * 1
        loss = fused_softmax_xent(logits, y)
        with torch.no_grad():
            logits[:, :5] = -float("inf")
        assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)


def test_losses_of_rows_may_be_edited(path: str, device: torch.device) -> None:
    """As F.cross_entropy's: masked, or weighted, in place. Not of a view that forward has made."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, target = make(6, 10, dtype, device)
        logits.requires_grad_()
        mask = torch.arange(6, device=device) % 2
        for y in (target, torch.rand(6, 10, device=device).to(dtype)):
            loss = fused_softmax_xent(logits, y, reduction="none")
            expected = torch.autograd.grad(loss * mask, logits, torch.ones_like(loss))
            loss = fused_softmax_xent(logits, y, reduction="none")
            loss *= mask
            loss[0] = 0
            torch.testing.assert_close(torch.autograd.grad(loss, logits, torch.ones_like(loss)), expected)


def test_the_loss_has_the_wider_dtype_of_logits_and_probabilities(path: str, device: torch.device) -> None:
    logits, _ = make(6, 10, torch.bfloat16, device)
    target = torch.rand(6, 10, device=device)
    loss, expected = fused_softmax_xent(logits, target), F.cross_entropy(logits, target)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target))


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_torchs_bfloat16_loss_on_a_cpu_is_what_the_readme_says(path: str) -> None:
    """It sums in bfloat16, where 256 + 1 is 256. The day this fails, the README has one line less."""
    z = torch.randn(16384, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.randint(100, (16384,), generator=torch.Generator().manual_seed(1))
    y[::4] = -100
    exact = F.cross_entropy(z.double(), y).item()
    assert abs(fused_softmax_xent(z, y).item() / exact - 1) < 2**-8
    assert F.cross_entropy(z, y).item() < 0.1 * exact


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_a_wrapper_of_a_tensor_is_refused_by_name(path: str) -> None:
    inner = torch.randn(3, 5)

    class Wrapper(Tensor):
        def __new__(cls, inner: Tensor) -> "Wrapper":
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined, no-any-return]

        def __init__(self, inner: Tensor) -> None:
            self.inside = inner

        def __tensor_flatten__(self) -> Any:
            return ["inside"], None

        @staticmethod
        def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> "Wrapper":
            return Wrapper(inner["inside"])

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            raise AssertionError(func)

    with pytest.raises(NotImplementedError, match=r"input is a Wrapper.* pass a plain tensor.*to_local"):
        fused_softmax_xent(Wrapper(inner), torch.tensor([0, 1, 2]))


X, Y = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "batch size": ((X, Y[:2]), {}, r"\(3, 5\) and target \(2,\)"),
    "batch size, no dimension": ((X, Y[0]), {}, r"\(3, 5\) and target \(\)"),
    "batch size, one row": ((X[0], Y[:2]), {}, r"\(5,\) and target \(2,\)"),
    "integers as probabilities, one row": ((X[0], X[0].long()), {}, r"target\.float\(\)"),
    "spatial size": (
        (torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)),
        {},
        r"\(2, 5, 3\) and target \(2, 4\)",
    ),
    "multi-target": ((X, torch.zeros(3, 2, dtype=torch.int64)), {}, r"\(3, 5\) and target \(3, 2\)"),
    "integer target of logits' shape": (
        (X, torch.zeros(3, 5, dtype=torch.int64)),
        {},
        r"target \(3, 5\)\. Probabilities must",
    ),
    "classes last": (
        (torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)),
        {},
        r"Classes are dimension 1: input\.fl",
    ),
    "float target": ((X, Y.float()), {}, "class indices as int64, int32 or uint8, got torch.float32"),
    "bool target": ((X, Y.bool()), {}, "got torch.bool"),
    "integer logits": ((X.long(), Y), {}, "got torch.int64"),
    "complex logits": ((X + 0j, Y), {}, "got torch.complex64"),
    "scalar logits": ((X[0, 0], Y[0]), {}, "class dimension"),
    "no classes": ((X[:, :0], Y), {}, "no class to choose from"),
    "weight length": ((X, Y, torch.ones(4)), {}, r"weight must have shape \(5,\), one for each class, got \(4,\)"),
    "weight rank": ((X, Y, torch.ones(5, 1)), {}, r"got \(5, 1\)"),
    "integer weight": ((X, Y, torch.ones(5, dtype=torch.int64)), {}, "weight must be floating point, got torch.int64"),
    "reduction": ((X, Y), {"reduction": "avg"}, "'avg' is not a valid value for reduction"),
    "smoothing": ((X, Y), {"label_smoothing": 1.1}, "label_smoothing must be between 0.0 and 1.0, got 1.1"),
    "smoothing type": (
        (X, Y),
        {"label_smoothing": "a"},
        "label_smoothing must be a number or a tensor",
    ),
    "ignore_index type": ((X, Y), {"ignore_index": 1.5}, "ignore_index must be int, not float"),
    "ignore_index of probabilities": ((X, X), {"ignore_index": 1}, "1 with a target of probabilities"),
    "input type": (([1.0, 2.0], Y), {}, "input must be a Tensor, not list"),
    "target type": ((X, [0, 1, 2]), {}, "target must be a Tensor, not list"),
    "devices": ((X, Y.to("meta")), {}, "input is on cpu but target is on meta"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_raises_what_torch_raises_and_says_what_is_wrong(case: str) -> None:
    args, kwargs, message = BAD_CALLS[case]
    with pytest.raises(Exception) as torchs:
        F.cross_entropy(*args, **kwargs)
    with pytest.raises(torchs.type, match=message):
        fused_softmax_xent(*args, **kwargs)


@pytest.mark.parametrize("label_smoothing", [-0.1, float("nan")])
def test_label_smoothing_that_torch_ignores_raises(label_smoothing: float) -> None:
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        fused_softmax_xent(X, Y, label_smoothing=label_smoothing)


def test_what_is_not_supported_says_so() -> None:
    with pytest.raises(RuntimeError, match="no gradient with respect to weight"):
        fused_softmax_xent(X, Y, torch.ones(5, requires_grad=True))


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_on_a_cpu_rows_that_are_ignored_are_not_computed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    softmax, computed = torch.softmax, []

    def counted(z: Tensor, dim: int, out: Tensor) -> Tensor:
        computed.append(len(z))
        return softmax(z, dim, out=out)

    logits, target = make(400, 1000, torch.float32, torch.device("cpu"))
    target[::2] = -100
    logits[::2] = float("nan")
    monkeypatch.setattr(torch, "softmax", counted)
    loss, gradient = loss_and_gradient(fused_softmax_xent, logits, target)
    assert sum(computed) == 200
    assert loss.isfinite() and torch.equal(gradient[::2], torch.zeros_like(gradient[::2]))


@pytest.mark.parametrize("n_cols", [10, 1000, 1500, 1501])
def test_an_infinite_class_weight_gives_an_infinite_loss(path: str, device: torch.device, n_cols: int) -> None:
    logits, target = make(3, n_cols, torch.float32, device)
    weight = torch.ones(n_cols, device=device)
    weight[n_cols // 2] = float("inf")
    for y, smoothing in ((target, 0.1), (torch.softmax(logits, 1), 0.0)):
        loss = fused_softmax_xent(logits, y, weight, reduction="none", label_smoothing=smoothing)
        assert loss.isposinf().all()


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_more_classes_than_the_kernels_count_raise(path: str, device: torch.device) -> None:
    logits = torch.zeros(1, 1, device=device).expand(1, 2**31)
    with pytest.raises(RuntimeError, match="2147483648 classes: the kernels take 2147418112 at most"):
        fused_softmax_xent(logits, torch.zeros(1, dtype=torch.int64, device=device))

"""Class probabilities as targets, against float64 and torch.nn.functional.cross_entropy, through both paths."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softxent
from exactness import assert_as_exact_as_torch, roundings_of_softmax
from memory import peak_bytes
from softxent import fused_softmax_xent
from softxent.cpu import soft_target

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
        yardstick = 64 if logits.dtype == torch.float64 else 0
        assert_as_exact_as_torch(ours, theirs, right, what, yardstick, roundings_of_softmax(logits))


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


# A thread a row, some threads, a program; of odd length too.
WIDTHS = (10, 101, 1000, 1001, 2501)


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_cols", [10, 101, 1000, 2504])
def test_the_bits_of_a_row_do_not_depend_on_the_batch(
    path: str, device: torch.device, n_cols: int, dtype: torch.dtype
) -> None:
    logits, target = (x.repeat(5, 1) for x in make((1, n_cols), dtype, device))
    target = target * torch.where(torch.arange(n_cols, device=device) % 3 == 0, -1, 1).to(dtype)
    weight = torch.linspace(0.5, 2, n_cols, dtype=dtype, device=device)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1, "softcap": 5.0}):
        results = []
        for rows in (slice(None), slice(3, 4)):
            z, t = logits[rows].requires_grad_(), target[rows].requires_grad_()
            loss = fused_softmax_xent(z, t, reduction="none", **options)  # type: ignore[arg-type]
            results.append((loss.detach(), *torch.autograd.grad(loss, (z, t), torch.ones_like(loss))))
            total = fused_softmax_xent(z, t, reduction="sum", **options)  # type: ignore[arg-type]
            results[-1] += torch.autograd.grad(total, (z, t))
        for found in zip(*results, strict=True):
            for result in found:
                assert (result == found[0][0]).all()


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_cols", [10, 1001, 4104])
def test_any_backward_pass_gives_the_same_gradient_times_what_comes_in(
    path: str, device: torch.device, n_cols: int, dtype: torch.dtype
) -> None:
    logits, target = (x.requires_grad_() for x in make((2, n_cols), dtype, device))
    before = logits.detach().clone(), target.detach().clone()
    loss = fused_softmax_xent(logits, target)
    once, twice = (torch.autograd.grad(loss, (logits, target), retain_graph=True) for _ in range(2))
    four = torch.autograd.grad(loss, (logits, target), torch.full_like(loss, 4.0), retain_graph=True)
    (alone,) = torch.autograd.grad(loss, target)
    for first, second, scaled in zip(once, twice, four, strict=True):
        assert torch.equal(first, second)
        if dtype != torch.float16:  # which has no room for the same digits of a smaller number
            assert torch.equal(scaled, first * 4)
    assert torch.equal(alone, once[1])
    assert torch.equal(logits, before[0]) and torch.equal(target, before[1])


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize(
    ("n_cols", "dtype"),
    [(n_cols, dtype) for n_cols in (10, 101, 1000) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    + [(2501, torch.bfloat16)],
    ids=str,
)
def test_rows_that_lie_anywhere(path: str, device: torch.device, n_cols: int, dtype: torch.dtype) -> None:
    """Off their granules, in padded rows, apart from each other; the target in one place for all rows too."""
    memory = torch.rand(3, 2 * n_cols + 32, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    views = [
        memory[:, 1 : n_cols + 1],
        memory[:, :n_cols],
        memory[1:, 16 : n_cols + 16],
        memory[:, : 2 * n_cols : 2],
        memory.view(-1)[: 3 * n_cols].view(n_cols, 3).t(),
        memory[:1, 3 : n_cols + 3].expand(3, n_cols),
    ]
    for i, z in enumerate(views[:5]):
        for t in (views[i], views[(i + 1) % 6]):
            z, t = z[:2], t[:2]
            found = run_as_it_lies(z, t)
            torch.testing.assert_close(found, run_as_it_lies(z.contiguous(), t.contiguous()))


def run_as_it_lies(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, t = logits.detach().requires_grad_(), target.detach().requires_grad_()
    loss = fused_softmax_xent(z, t, label_smoothing=0.1)
    return loss.detach(), *torch.autograd.grad(loss, (z, t))  # type: ignore[return-value]


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [10, 100, 1001, 2501])
def test_logits_and_target_of_different_dtypes(path: str, device: torch.device, n_cols: int) -> None:
    logits, target = make((5, n_cols), torch.float32, device)
    exact = run(F.cross_entropy, logits.bfloat16().double(), target.bfloat16().double())
    halves = torch.bfloat16, torch.float16
    for dtypes in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
    ):
        found = run(
            fused_softmax_xent, *(x.bfloat16().to(dtype) for x, dtype in zip((logits, target), dtypes, strict=True))
        )
        for result, right, dtype in zip(found, exact, (torch.promote_types(*dtypes), *dtypes), strict=True):
            assert result.dtype == dtype
            bound = (0.02 if dtype in halves else 1e-4) * right.abs().max()
            assert (result.double() - right).abs().max() <= bound


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [10, 1000, 2501])
def test_a_loss_scale_lifts_what_float16_has_no_room_for(path: str, device: torch.device, n_cols: int) -> None:
    """The gradient of a float16 target is rounded after it."""
    logits, target = make((2, n_cols), torch.float32, device)
    gradients: list[Tensor] = []
    for size in (1.0, 2.0**-30):
        t = target.half().requires_grad_()
        loss = fused_softmax_xent(logits, t, sample_weight=torch.full((2,), size, device=device))
        gradients += torch.autograd.grad(loss, t, torch.full_like(loss, 1 / size))
    assert torch.equal(*gradients)


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", WIDTHS)
def test_rows_of_sample_weight_0_are_left_out_whatever_is_in_them(path: str, device: torch.device, n_cols: int) -> None:
    logits, target = make((6, n_cols), torch.float32, device)
    weights = torch.tensor([0, 2, 0, 0.5, 1, 0], device=device)
    hard_logits, hard_target = logits.clone(), target.clone()
    hard_logits[0], hard_logits[2], hard_target[5] = float("nan"), float("-inf"), float("inf")
    for options in ({"z_loss": 0.1, "softcap": 30.0}, {"reduction": "none"}):
        expected = run(fused_softmax_xent, logits, target, sample_weight=weights, **options)
        found = run(fused_softmax_xent, hard_logits, hard_target, sample_weight=weights, **options)
        for result, same in zip(found, expected, strict=True):
            assert torch.equal(result, same)
        assert not found[1][weights == 0].any() and not found[2][weights == 0].any()
    infinite = torch.full((n_cols,), float("inf"), device=device)
    _, *gradients = run(fused_softmax_xent, logits, target, weight=infinite, sample_weight=weights)
    assert not any(gradient[weights == 0].any() for gradient in gradients)


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [10, 101, 1001, 2501])
def test_either_gradient_alone(path: str, device: torch.device, n_cols: int) -> None:
    """Of constant logits none is made."""
    logits, target = make((4, n_cols), torch.float32, device)
    _, dlogits, dtarget = run_as_it_lies(logits, target)
    z, t = logits.clone().requires_grad_(), target.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(fused_softmax_xent(z, target, label_smoothing=0.1), z)[0], dlogits)
    assert torch.equal(torch.autograd.grad(fused_softmax_xent(logits, t, label_smoothing=0.1), t)[0], dtarget)


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [10, 101, 1000, 1001, 2501])
def test_hard_rows(path: str, device: torch.device, n_cols: int) -> None:
    inf, nan = float("inf"), float("nan")
    logits, target = make((9, n_cols), torch.float32, device)
    logits[0], logits[1] = logits[0] * 1e4, logits[1] + 1e6
    logits[2, : n_cols // 2], target[2, : n_cols // 2] = -inf, 0
    logits[3], logits[4, -1], logits[5, 0] = -inf, nan, inf
    target[6], target[7] = 0, -target[7]
    loss, dlogits, dtarget = run(fused_softmax_xent, logits, target, reduction="none")
    assert loss[3:6].isnan().all() and dlogits[3:6].isnan().all()
    torchs = run(F.cross_entropy, logits, target, reduction="none")
    exact = run(F.cross_entropy, logits.double(), target.double(), reduction="none")
    for ours, theirs, right in zip((loss, dlogits, dtarget), torchs, exact, strict=True):
        for row in (0, 1, 6, 7, 8):  # apart: the error that one row excuses is no excuse for the others
            digits = roundings_of_softmax(logits[row])
            assert_as_exact_as_torch(ours[row], theirs[row], right[row], f"row {row}", digits=digits)
    kept = slice(n_cols // 2, None)
    right = F.cross_entropy(logits[2:3, kept].double(), target[2:3, kept].double())
    torch.testing.assert_close(loss[2].double(), right, rtol=1e-5, atol=1e-6)
    assert not dlogits[2, : n_cols // 2].any() and dtarget[2, kept].isfinite().all()


@pytest.mark.parametrize("shape", [(9, 10), (7, 101)], ids=str)
def test_bit_identical_in_any_batch(path: str, device: torch.device, shape: tuple[int, int]) -> None:
    def outcome(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, target = logits.detach().requires_grad_(), target.detach().requires_grad_()
        loss = fused_softmax_xent(logits, target, **options)
        return loss.detach(), *torch.autograd.grad(loss, (logits, target), torch.full_like(loss, 0.3))  # type: ignore[return-value]

    for dtype in (torch.float32, torch.bfloat16):
        logits, target = make(shape, dtype, device)
        for options in ({"reduction": "none"}, {"reduction": "sum"}, {"reduction": "sum", "softcap": 5.0}):
            whole = outcome(logits, target, **options)
            for rows in (slice(1, 5), slice(3, 4)):
                for one, part in zip(whole, outcome(logits[rows], target[rows], **options), strict=True):
                    assert part.dim() == 0 or torch.equal(one[rows], part)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_some_rows_at_a_time_give_what_all_rows_do(
    path: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    logits, target = make((7, 100), dtype, torch.device("cpu"))
    logits[3, :50], target[3, :50] = -float("inf"), 0
    v, w = torch.tensor([1, 0, 2, 0.5, 0, 3, 1]), torch.linspace(0, 2, 100, dtype=dtype)
    every = {"weight": w, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "sample_weight": v}
    for options in ({}, {"reduction": "none", "sample_weight": v}, every | {"normalizer": 3.0}):
        expected = run(fused_softmax_xent, logits, target, **options)
        with monkeypatch.context() as patch:
            patch.setattr(soft_target, "CHUNK", 200)
            found = run(fused_softmax_xent, logits, target, **options)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_on_a_cpu_a_step_takes_its_gradients_and_a_chunk_beside_them(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = (x.requires_grad_() for x in make((64, 1000), torch.float32, torch.device("cpu")))
    monkeypatch.setattr(soft_target, "CHUNK", 4000)
    peak = peak_bytes(lambda: torch.autograd.grad(fused_softmax_xent(logits, target), (logits, target)))
    assert 2 * logits.nbytes <= peak <= 2.1 * logits.nbytes


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_a_million_classes_do_not_drift_with_the_sum_of_torchs_softmax(path: str) -> None:
    logits = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(0))
    target = logits.flip(1).softmax(1)
    results = run(fused_softmax_xent, logits, target)
    exact = run(F.cross_entropy, logits.double(), target.double())
    for ours, right in zip(results, exact, strict=True):
        assert (ours.double() - right).abs().max() <= 2e-6 * right.abs().max()  # torch: 7e-5
    for mine, torchs in ((softxent.softmax, torch.softmax), (softxent.log_softmax, torch.log_softmax)):
        (z, z64), dout = (x.clone().requires_grad_() for x in (logits, logits.double())), target - target.mean()
        out, out64 = mine(z, 1), torchs(z64, 1)
        assert ((out.double() - out64) / out64).abs().max() <= 2e-6
        (dz,), (dz64,) = torch.autograd.grad(out, z, dout), torch.autograd.grad(out64, z64, dout.double())
        assert (dz.double() - dz64).abs().max() <= 2e-6 * dz64.abs().max()

"""What the loss takes beyond PyTorch's arguments: z-loss, softcap, logit scale, sample weights, normalizer."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from exactness import assert_as_exact_as_torch, by_reference, composed, roundings_of_softmax
from softxent import fused_softmax_xent, fused_softmax_xent_with_stats
from test_functional import loss_and_gradient, make

INF, NAN = float("inf"), float("nan")
# every kernel and its edges: few classes in one launch and in many, tiles, whole rows, kept as loaded, streamed; odd
SHAPES = ((70, 10), (520, 3), (9, 100), (3, 1000), (3, 1001), (3, 1504), (3, 1501), (2, 2504), (2, 2501))
OPTIONS: tuple[dict[str, Any], ...] = (
    {"z_loss": 0.01},
    {"softcap": 5.0},
    {"logit_scale": 0.3},
    {"sample_weight": True},
    {"normalizer": 37.5},
    {"z_loss": 0.1, "softcap": 20.0, "logit_scale": 1.5, "sample_weight": True, "normalizer": 3, "weight": True},
    {"z_loss": 0.1, "softcap": 2.0, "logit_scale": 3.0, "weight": True, "label_smoothing": 0.2, "reduction": "none"},
    {"z_loss": 1.0, "sample_weight": True, "reduction": "sum", "label_smoothing": 0.1},
    {"logit_scale": 0.5, "weight": True, "label_smoothing": 0.3},
)
ALL: dict[str, Any] = {"z_loss": 0.1, "softcap": 4.0, "logit_scale": 0.7, "label_smoothing": 0.1}


pytestmark = pytest.mark.usefixtures("short_wide_rows")


def with_tensors(options: dict[str, Any], logits: Tensor) -> dict[str, Any]:
    """True replaced by class weights, or by sample weights, of which some are 0."""
    n_rows, n_cols = logits.shape
    options = dict(options)
    if "weight" in options:
        options["weight"] = torch.linspace(0, 3, n_cols, dtype=logits.dtype, device=logits.device)
    if "sample_weight" in options:
        options["sample_weight"] = (torch.arange(n_rows, device=logits.device) % 4 / 2).to(logits.dtype)
    return options


def double(options: dict[str, Any]) -> dict[str, Any]:
    return options | {name: value.double() for name, value in options.items() if isinstance(value, Tensor)}


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    shape = target.shape[:1] if options.get("reduction") == "none" else ()
    dloss = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(logits.device)
    ours = loss_and_gradient(fused_softmax_xent, logits, target, dloss, **options)
    torchs = loss_and_gradient(composed, logits, target, dloss, **options)
    dloss = dloss.to(ours[0].dtype).double()
    wide = target.double() if target.is_floating_point() else target
    exact = loss_and_gradient(by_reference, logits.double(), wide, dloss, **double(options))
    # A softcap rounds z, and half a rounding of a z of that size is so many roundings of exp(z).
    yardstick = (options.get("softcap") or 0) / 2 + (64 if logits.dtype == torch.float64 else 0)
    digits = roundings_of_softmax(logits, options.get("softcap"), options.get("logit_scale", 1.0))
    for what, result, theirs, right in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        assert_as_exact_as_torch(result, theirs, right, what, yardstick, digits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_as_exact_as_torch(
    path: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits, target = make(*shape, dtype, device)
    target[0], target[-1] = -100, logits[-1].argmax()
    some = OPTIONS if shape[1] <= 100 or dtype in (torch.float32, torch.bfloat16) else OPTIONS[5:]
    for options in some:
        check(logits, target, **with_tensors(options, logits))


@pytest.mark.real_widths
@pytest.mark.parametrize("n_cols", [40000, 50257, 70001, 90001])
def test_the_widest_rows(path: str, device: torch.device, n_cols: int) -> None:
    logits, target = make(2, n_cols, torch.bfloat16, device)
    for options in (OPTIONS[5], {"logit_scale": 0.5, "z_loss": 0.1}):
        check(logits, target, **with_tensors(options, logits))


@pytest.mark.parametrize("shape", [(70, 10), (3, 1000), (2, 2504)], ids=str)
def test_probabilities(path: str, device: torch.device, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits, _ = make(*shape, dtype, device)
        target = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)
        for options in (*OPTIONS[:1], *OPTIONS[3:]):
            check(logits, target, **with_tensors(options, logits))


def test_strided_logits(path: str, device: torch.device) -> None:
    for n_cols in (10, 300):
        logits, target = make(n_cols, 8, torch.float32, device)
        logits, target = logits.t(), target[:8] % 8
        for options in OPTIONS[5:7]:
            check(logits, target, **with_tensors(options, logits))


def test_tanh_is_exact_from_nothing_to_saturation(path: str, device: torch.device) -> None:
    """Its value, the lse of a single class; and its slope, which is 1 near 0, and small where 1 - tanh^2 cancels."""
    for dtype, eps in ((torch.float32, 2**-23), (torch.float64, 2**-52)):
        u = torch.cat((torch.logspace(-6, 1, 500, dtype=torch.float64), torch.linspace(0.39, 0.41, 99).double()))
        u = torch.cat((u, -u)).to(dtype)
        y = torch.zeros(len(u), dtype=torch.int64, device=device)
        z = fused_softmax_xent_with_stats(u[:, None].to(device), y, softcap=1.0, stats="lse").lse
        exact = u.double().tanh().to(device)
        assert z is not None and ((z.double() - exact) / exact).abs().max() <= 4 * eps
        softcap = 0.001  # so small that the softmax hardly bends: p = 1/2, and dloss/dz = 1/2
        logits = torch.stack((u * softcap, torch.zeros_like(u)), 1).to(device)
        target = torch.ones(len(u), dtype=torch.int64, device=device)
        _, grad = loss_and_gradient(fused_softmax_xent, logits, target, softcap=softcap, reduction="sum")
        x = logits[:, 0].double()
        z = softcap * (x / softcap).tanh()
        slope = (x / softcap).cosh() ** -2
        expected = torch.sigmoid(z) * slope
        error = ((grad[:, 0].double() - expected) / expected).abs()
        steep = (x / softcap).abs().clamp_min(1)  # an error of the argument is that much larger in the slope
        assert (error / steep).max() <= 8 * eps + (0 if dtype == torch.float32 else 64 * 2**-52)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cap_far_above_the_logits_changes_nothing(path: str, device: torch.device, dtype: torch.dtype) -> None:
    for n_cols in (10, 1000):
        logits, target = make(4, n_cols, dtype, device)
        expected = fused_softmax_xent(logits, target, loss_dtype=torch.float32)
        for softcap in (1e4, 1e6, 1e8, 2.0**100):
            loss = fused_softmax_xent(logits, target, softcap=softcap, loss_dtype=torch.float32)
            torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("shape", [(4, 10), (520, 10), (4, 100), (4, 1001), (3, 1501), (3, 2501)], ids=str)
def test_an_infinite_loss_is_infinite_in_the_mean(path: str, device: torch.device, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits, target = make(*shape, dtype, device)
        logits[1, target[1]] = -INF
        for options in ({}, {"normalizer": 3.0}, {"reduction": "sum"}):
            assert fused_softmax_xent(logits, target, **options) == INF  # type: ignore[arg-type]


def test_padding_does_not_leak_through_the_softcap(path: str, device: torch.device) -> None:
    """Where the logits are far below 0 the padding of a tile, -softcap after tanh(-inf), would weigh as much."""
    for n_cols in (3, 33, 1001, 1501, 5000):
        logits = torch.full((2, n_cols), -1e3, device=device)
        loss = fused_softmax_xent(logits, torch.zeros(2, dtype=torch.int64, device=device), softcap=2.0)
        torch.testing.assert_close(loss, torch.tensor(float(n_cols), device=device).log())


def test_a_masked_class_is_a_class_like_others_behind_a_softcap(path: str, device: torch.device) -> None:
    logits, target = make(6, 10, torch.float32, device)
    logits[:, 7:] = -INF
    check(logits, target % 7, softcap=3.0)
    check(logits, target % 7, z_loss=0.1)


@pytest.mark.parametrize("n_cols", [10, 1000, 1001, 1501, 1504, 2501])
def test_rows_of_sample_weight_0_are_not_read(path: str, device: torch.device, n_cols: int) -> None:
    logits, target = make(4, n_cols, torch.float32, device)
    for soft in (False, True):
        y = torch.softmax(logits, 1) if soft else target
        weights = torch.tensor([1.0, 0.0, 2.0, 0.0], device=device)
        expected = loss_and_gradient(fused_softmax_xent, logits, y, sample_weight=weights)
        spoilt = logits.clone()
        spoilt[1] = NAN
        spoilt[3] = INF
        loss, grad = loss_and_gradient(fused_softmax_xent, spoilt, y, sample_weight=weights)
        assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
        assert not grad[1].any() and not grad[3].any()


def test_sample_weights_may_be_a_mask_or_counts_and_have_the_shape_of_the_target(
    path: str, device: torch.device
) -> None:
    logits = torch.randn(4, 5, 3, 2, device=device)
    target = torch.randint(5, (4, 3, 2), device=device)
    mask = torch.rand(4, 3, 2, device=device) < 0.5
    for weights in (mask, mask.long(), mask.double(), mask.transpose(0, 2).contiguous().transpose(0, 2)):
        loss = fused_softmax_xent(logits, target, sample_weight=weights, reduction="none")
        expected = fused_softmax_xent(logits, target, reduction="none") * mask
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_a_sample_weight_in_the_shape_of_the_target(path: str, device: torch.device) -> None:
    logits, target = torch.randn(5, device=device), torch.tensor([2], device=device)
    for weights in (torch.tensor([0.5], device=device), torch.tensor(0.5, device=device)):
        loss = fused_softmax_xent(logits, target, sample_weight=weights)
        torch.testing.assert_close(loss, fused_softmax_xent(logits, target) / 2)


def test_the_mean_divides_by_what_it_did_whatever_the_sample_weights(path: str, device: torch.device) -> None:
    for shape in ((8, 10), (520, 10), (3, 1000)):
        logits, target = make(*shape, torch.float32, device)
        target[0] = -100
        weights = torch.zeros(shape[0], device=device)
        weights[2] = 5
        rows = fused_softmax_xent(logits, target, reduction="none")
        loss = fused_softmax_xent(logits, target, sample_weight=weights)
        torch.testing.assert_close(loss, rows[2] * 5 / (shape[0] - 1))


@pytest.mark.parametrize("shape", [(8, 10), (520, 10), (3, 1000), (3, 1501), (3, 2501)], ids=str)
def test_a_normalizer_of_0_or_nan_is_divided_by(path: str, device: torch.device, shape: tuple[int, int]) -> None:
    logits, target = make(*shape, torch.float32, device)
    target[1] = -100
    for normalizer in (0.0, torch.tensor(0, device=device), -0.0, NAN, torch.tensor(NAN, device=device), INF):
        loss, grad = loss_and_gradient(fused_softmax_xent, logits, target, normalizer=normalizer, softcap=30.0)
        expected = composed(logits, target, normalizer=normalizer, softcap=30.0)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert not grad[1].any()
        value = float(normalizer)
        assert grad[0].isnan().all() if value != value else grad[0].isinf().all() if value == 0 else not grad[0].any()


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(path: str, device: torch.device) -> None:
    """The example of the README: the tokens of all micro-batches counted first."""
    logits, target = make(12, 100, torch.float32, device)
    target[:5] = -100  # so unevenly that a mean of means would be another number
    _, expected = loss_and_gradient(fused_softmax_xent, logits, target)
    tokens = (target != -100).sum()
    parts = [
        loss_and_gradient(fused_softmax_xent, logits[i : i + 4], target[i : i + 4], normalizer=tokens)
        for i in range(0, 12, 4)
    ]
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), expected)
    torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).sum(), fused_softmax_xent(logits, target))


def test_tensor_options_get_their_gradients(path: str, device: torch.device) -> None:
    for soft, reduction in itertools.product((False, True), ("none", "mean", "sum")):
        logits, target = make(5, 10, torch.float64, device)
        y = torch.softmax(logits, 1) if soft else target
        weights = torch.rand(5, dtype=torch.float64, device=device)
        tensors: dict[str, Any] = {
            "sample_weight": weights,
            "logit_scale": torch.tensor(0.7, dtype=torch.float64, device=device),
        }
        if reduction == "mean":
            tensors["normalizer"] = torch.tensor(3.0, dtype=torch.float64, device=device)
        for names in (*([name] for name in tensors), list(tensors)):
            options: dict[str, Any] = {"reduction": reduction, "z_loss": 0.1, "softcap": 3.0}
            found = []
            for op in (fused_softmax_xent, composed):
                leaves = {name: tensors[name].clone().requires_grad_() for name in names}
                z = logits.clone().requires_grad_()
                loss = op(z, y, **options, **tensors | leaves)
                dloss = torch.linspace(1, 2, loss.numel(), dtype=torch.float64, device=device).reshape(loss.shape)
                found.append([loss.detach(), *torch.autograd.grad(loss, [z, *leaves.values()], dloss)])
            torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 4), (2, 34)], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck_and_gradgradcheck(path: str, device: torch.device, shape: tuple[int, int], soft: bool) -> None:
    logits = make(*shape, torch.float64, device, scale=1.0)[0].requires_grad_()
    target = make(*shape, torch.float64, device)[1]
    if soft:
        target = torch.rand(shape, dtype=torch.float64, device=device)
    tensors = with_tensors({"weight": True, "sample_weight": True}, logits)
    for reduction in ("none", "mean"):

        def op(z: Tensor, reduction: str = reduction) -> Tensor:
            return fused_softmax_xent(z, target, reduction=reduction, **tensors, **ALL)

        fast = shape[1] > 4  # along one direction
        assert torch.autograd.gradcheck(op, logits, fast_mode=fast)
        slow = not fast and path == "torch"  # the interpreter takes a minute; the formula is the same
        assert torch.autograd.gradgradcheck(op, logits, fast_mode=not slow)


def test_transforms_agree_with_the_composition(path: str, device: torch.device) -> None:
    logits, target = make(4, 6, torch.float64, device)
    tensors = with_tensors({"weight": True, "sample_weight": True}, logits)

    def of(op: Any) -> Any:
        return lambda z: op(z, target, **tensors, **ALL)

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(of(fused_softmax_xent))(logits), transform(of(composed))(logits))
    batch = torch.stack((logits, logits * 2))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(of(fused_softmax_xent)))(batch),
        torch.func.vmap(torch.func.grad(of(composed)))(batch),
    )


@pytest.mark.parametrize("shape", [(6, 10), (6, 1000), (3, 1501), (3, 2501)], ids=str)
def test_any_backward_pass_gives_the_same_gradient_and_in_place_too(
    path: str, device: torch.device, shape: tuple[int, int]
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, target = make(*shape, dtype, device)
        options = with_tensors(OPTIONS[5], logits)
        z = logits.clone().requires_grad_()
        loss = fused_softmax_xent(z, target, **options)
        first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(z.detach(), logits)
        z = logits.clone().requires_grad_()
        fused_softmax_xent(z * 1, target, inplace=True, **options).backward()
        assert z.grad is not None and torch.equal(z.grad, first)


def test_a_logit_scale_on_the_device_is_read_there(path: str, device: torch.device) -> None:
    for n_cols in (10, 100, 1001, 1501, 2501):
        logits, target = make(2, n_cols, torch.float32, device)
        expected = loss_and_gradient(fused_softmax_xent, logits, target, logit_scale=0.7)
        for scale in (torch.tensor(0.7, device=device), torch.tensor([0.7], device=device, dtype=torch.float64)):
            found = loss_and_gradient(fused_softmax_xent, logits, target, logit_scale=scale)
            torch.testing.assert_close(found, expected)
        for bad in (0.0, -1.0, NAN):
            found = loss_and_gradient(fused_softmax_xent, logits, target, logit_scale=torch.tensor(bad, device=device))
            assert found[0].isnan() and found[1].isnan().all()


def test_a_learned_logit_scale_and_masked_classes(path: str, device: torch.device) -> None:
    for n_cols in (10, 1001):
        logits, target = make(6, n_cols, torch.float64, device)
        target %= 7
        grads = []
        for fill in (-INF, -1e4):  # which is as good as -inf, and has a derivative along the scale
            z = logits.clone()
            z[:, 7:] = fill
            z.requires_grad_()
            scale = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
            loss = fused_softmax_xent(z, target, logit_scale=scale, label_smoothing=0.0, z_loss=0.1)
            for create_graph in (False, True):
                grads.append(torch.autograd.grad(loss, (z, scale), retain_graph=True, create_graph=create_graph))
        for found in grads[1:]:
            torch.testing.assert_close(found, grads[0])


def test_a_learned_logit_scale_of_an_empty_batch_or_frozen_logits(path: str, device: torch.device) -> None:
    for soft in (False, True):
        for n_rows, learned in ((0, False), (0, True), (4, False)):
            logits = torch.randn(n_rows, 5, device=device, requires_grad=learned)
            target = (
                torch.rand(n_rows, 5, device=device) if soft else torch.zeros(n_rows, dtype=torch.int64, device=device)
            )
            scale = torch.tensor(2.0, device=device, requires_grad=True)
            fused_softmax_xent(logits, target, logit_scale=scale, reduction="sum").backward()
            expected = torch.tensor(2.0, device=device, requires_grad=True)
            composed(logits.detach(), target, logit_scale=expected, reduction="sum").backward()
            torch.testing.assert_close(scale.grad, expected.grad)
    weight = torch.zeros(5, device=device)
    logits, target = make(4, 5, torch.float32, device)
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    assert fused_softmax_xent(logits, target, weight, label_smoothing=0.1, logit_scale=scale).isnan()
    with pytest.raises(RuntimeError, match="does not go with a logit_scale that requires a gradient"):
        fused_softmax_xent(logits.requires_grad_() * 1, target, logit_scale=scale, inplace=True)


def test_forward_derivatives_along_the_options(path: str, device: torch.device) -> None:
    logits, target = make(4, 6, torch.float64, device)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64, device=device)
    scale, n = (torch.tensor(x, dtype=torch.float64, device=device) for x in (0.7, 3.0))

    def of(op: Any) -> Any:
        return lambda v, s, n: op(logits, target, sample_weight=v, logit_scale=s, normalizer=n, softcap=3.0)

    for transform in (torch.func.jacfwd, torch.func.jacrev):
        found, expected = (
            transform(of(op), argnums=(0, 1, 2))(weights, scale, n) for op in (fused_softmax_xent, composed)
        )
        torch.testing.assert_close(found, expected)


def test_neutral_options_change_no_bit(path: str, device: torch.device) -> None:
    for shape in ((6, 10), (6, 1000)):
        logits, target = make(*shape, torch.float32, device)
        plain = loss_and_gradient(fused_softmax_xent, logits, target)
        ones = torch.ones(6, device=device)
        for options in ({"z_loss": 0}, {"logit_scale": 1}, {"softcap": None}, {"sample_weight": ones}):
            same = loss_and_gradient(fused_softmax_xent, logits, target, **options)
            assert torch.equal(same[0], plain[0]) and torch.equal(same[1], plain[1])


def test_bad_input_is_named(path: str, device: torch.device) -> None:
    logits, target = make(4, 5, torch.float32, device)
    bad: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"softcap": -1.0}, RuntimeError, "softcap must be above 0 .*-1.0"),
        ({"softcap": 0}, RuntimeError, "softcap must be .* or None for no cap"),
        ({"softcap": 1e39}, RuntimeError, "softcap must be .* at most 2"),
        ({"softcap": "30"}, TypeError, "softcap must be a number or a tensor of one, not str"),
        ({"z_loss": torch.tensor(0.1).requires_grad_()}, RuntimeError, "no gradient with respect to z_loss"),
        ({"softcap": NAN}, RuntimeError, "softcap"),
        ({"z_loss": -1e-4}, RuntimeError, "z_loss must be a finite number of at least 0"),
        ({"z_loss": NAN}, RuntimeError, "z_loss"),
        ({"logit_scale": 0}, RuntimeError, "logit_scale must be above 0"),
        ({"logit_scale": -1.0}, RuntimeError, "logit_scale must be above 0 .*, got -1.0"),
        ({"logit_scale": torch.ones(2)}, RuntimeError, r"logit_scale must be one real number.*\(2,\)"),
        ({"logit_scale": "1"}, TypeError, "logit_scale must be a number or a tensor of one, not str"),
        ({"normalizer": torch.ones(4)}, RuntimeError, r"normalizer must be one real number.*\(4,\)"),
        ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer is what a mean divides by.*'sum'"),
        ({"sample_weight": torch.ones(5)}, RuntimeError, r"sample_weight must have shape \(4,\).*\(5,\)"),
        ({"sample_weight": [1.0] * 4}, TypeError, "sample_weight must be a Tensor, not list"),
    )
    for options, error, message in bad:
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
        with pytest.raises(error, match=message):
            fused_softmax_xent(logits, target, **options)

"""fused_softmax_xent_with_stats: what a pass over the logits tells besides the loss, and its gradients."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.traffic import Operations, counted, example
from exactness import assert_as_exact_as_torch, composed, roundings_of_softmax, rows_of
from softxent import LossAndStats, fused_softmax_xent, fused_softmax_xent_with_stats, reference
from test_functional import make
from test_options import OPTIONS, with_tensors
from test_traffic import PER_ROW, again, moved

INF, NAN = float("inf"), float("nan")
REAL = ("lse", "entropy", "target_logprob")
MAP = {"softcap": 3.0, "logit_scale": 2.0}
pytestmark = pytest.mark.usefixtures("short_wide_rows")
in_the_interpreter = pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="counted in the interpreter")


def exact_stats(logits: Tensor, target: Tensor, **options: Any) -> Any:
    return reference.row_stats(*rows_of(logits.double(), target, **options))


def composed_stats(logits: Tensor, target: Tensor, softcap: float | None = None, logit_scale: float = 1) -> Any:
    """What people write with PyTorch."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = F.log_softmax(z, 1)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    chosen = log_p.gather(1, target.clamp(0)[:, None])[:, 0]
    kept = target != -100
    return tuple(torch.where(kept, x, 0) for x in (z.logsumexp(1), entropy, chosen))


@pytest.mark.parametrize("path", ["kernels"], indirect=True)  # torch operations raise
@pytest.mark.parametrize("n_cols", [10, 100, 1001, 1501, 1504, 2501])
def test_a_row_whose_target_does_not_exist_has_no_stats(path: str, device: torch.device, n_cols: int) -> None:
    logits, target = make(4, n_cols, torch.float32, device)
    expected = fused_softmax_xent_with_stats(logits, target, reduction="none")
    for bad in (n_cols, -1, 2**40):
        y = target.clone()
        y[2] = bad
        found = fused_softmax_xent_with_stats(logits, y, reduction="none")
        for name, of_rows in found._asdict().items():
            none = {"prediction": -1, "correct": 0}.get(name, NAN)
            torch.testing.assert_close(of_rows[2].double().item(), float(none), equal_nan=True)
            assert torch.equal(of_rows[[0, 1, 3]], getattr(expected, name)[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (70, 10),
        (520, 3),
        (5, 1),
        (9, 100),
        (9, 101),
        (3, 1000),
        (3, 1001),
        (3, 1504),
        (3, 1501),
        (3, 2500),
        (3, 2501),
    ],
    ids=str,
)
def test_stats_and_their_gradients_are_as_exact_as_torch(
    path: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits, target = make(*shape, dtype, device)
    target[0], target[1] = logits[0].argmax(), -100
    yardstick = 64 if dtype == torch.float64 else 0
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for reduction, options in (("mean", {}), ("none", MAP)):
        z = logits.clone().requires_grad_()
        found = fused_softmax_xent_with_stats(z, target, reduction=reduction, **options)  # type: ignore[arg-type]
        z64 = logits.double().requires_grad_()
        exact = exact_stats(z64, target, **options)
        z_torch = logits.clone().requires_grad_()
        torchs = composed_stats(z_torch, target, **options)
        digits = roundings_of_softmax(logits, **options)  # type: ignore[arg-type]
        for i, name in enumerate(REAL):
            ours, right = getattr(found, name), getattr(exact, name)
            more: float = yardstick + (2 if options else 0)
            assert_as_exact_as_torch(ours, torchs[i].to(ours.dtype), right, name, more, digits)
            cotangent = torch.linspace(-1, 2, shape[0], dtype=torch.float64, device=device)
            grads = [
                torch.autograd.grad(y, x, cotangent.to(y.dtype), retain_graph=True)[0]
                for y, x in ((ours, z), (torchs[i], z_torch), (right, z64))
            ]
            # The entropy's is p_j * (log p_j + H): the sum of two rounded numbers that may nearly cancel.
            more += digits if name == "entropy" else 0
            assert_as_exact_as_torch(grads[0], grads[1], grads[2], f"gradient of {name}", more, digits)
        assert found.prediction is not None and found.correct is not None
        z64 = logits.double() if not options else MAP["softcap"] * torch.tanh(logits.double() * (2 / 3))
        behind = z64.amax(1) - z64.gather(1, found.prediction.clamp(0)[:, None])[:, 0]  # a softcap makes equals
        assert (behind[target != -100] <= (4 * eps * MAP["softcap"] if options else 0)).all()
        assert torch.equal(found.prediction == -1, target == -100)
        assert torch.equal(found.correct, found.prediction == target.where(target != -100, -2))


@pytest.mark.parametrize("shape", [(70, 10), (3, 1000), (3, 1001), (2, 1504), (2, 2501)], ids=str)
def test_gradients_of_the_loss_and_of_every_stat_add_up(
    path: str, device: torch.device, shape: tuple[int, int]
) -> None:
    for reduction in ("mean", "none"):
        for options in ({}, {name: x for name, x in OPTIONS[6].items() if name != "reduction"}):
            logits, target = make(*shape, torch.float32, device)
            options = with_tensors(options, logits)
            z = logits.requires_grad_()
            found = fused_softmax_xent_with_stats(z, target, reduction=reduction, **options)
            outputs = [found.loss, *(getattr(found, name) for name in REAL)]
            cotangents = [torch.full_like(x, 0.5 + i) for i, x in enumerate(outputs)]
            together = torch.autograd.grad(outputs, z, cotangents, retain_graph=True)[0]
            apart = [
                torch.autograd.grad(x, z, dx, retain_graph=True)[0] for x, dx in zip(outputs, cotangents, strict=True)
            ]
            torch.testing.assert_close(together, torch.stack(apart).sum(0), rtol=1e-5, atol=2e-6)
            loss = fused_softmax_xent(z, target, reduction=reduction, **options)
            grad = torch.autograd.grad(loss, z, cotangents[0])[0]
            torch.testing.assert_close((found.loss, apart[0]), (loss, grad), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_entropy_of_a_wide_row_does_not_drift_with_the_sum_of_its_softmax(path: str) -> None:
    logits = torch.randn(2, 262144, generator=torch.Generator().manual_seed(0))
    found = fused_softmax_xent_with_stats(logits, torch.zeros(2, dtype=torch.int64), stats="entropy").entropy
    p = logits.double().softmax(1)
    assert found is not None
    torch.testing.assert_close(found.double(), torch.special.entr(p).sum(1), rtol=5e-7, atol=0)


@pytest.mark.parametrize("gap", [0, 12, 17, 30, 80])
@pytest.mark.parametrize("n_cols", [2, 10, 1000, 20_000])
def test_entropy_and_its_gradient_keep_their_digits_where_a_row_is_confident(
    path: str, device: torch.device, n_cols: int, gap: int
) -> None:
    """Of a largest logit k, the target or not, that is `gap` ahead: p_k rounds to 1, and -log p_k to 0."""
    z64 = torch.zeros(2, n_cols, dtype=torch.float64)
    z64[:, n_cols // 2] = gap
    rest = (n_cols - 1) * math.exp(-gap)
    d, log_d = 1 + rest, math.log1p(rest)
    others = rest / d * (gap + log_d)
    z = z64.float().to(device).requires_grad_()
    target = torch.tensor([n_cols // 2, 0], device=device)
    found = fused_softmax_xent_with_stats(z, target, stats="entropy").entropy
    assert found is not None
    (dz,) = torch.autograd.grad(found.sum(), z)
    tolerance = (8 + gap) * torch.finfo(torch.float32).eps
    for entropy, at_k in zip(found.tolist(), dz[:, n_cols // 2].tolist(), strict=True):
        assert math.isclose(entropy, log_d / d + others, rel_tol=tolerance)
        small = tolerance * log_d if n_cols > 2 else 1e-7  # a difference of two terms
        assert math.isclose(at_k, (log_d * rest / d - others) / d, rel_tol=tolerance, abs_tol=small * rest / d)
        assert math.isclose(dz.double().sum(1).abs().max().item(), 0, abs_tol=1e-6 * max(1e-30, others))


def test_policy_gradient_as_people_write_it(path: str, device: torch.device) -> None:
    """The example of the README: advantage-weighted log-probability with an entropy bonus."""
    logits, action = make(12, 10, torch.float64, device)
    advantage = torch.linspace(-1, 1, 12, dtype=torch.float64, device=device)
    grads = []
    ways: tuple[Any, ...] = (
        lambda z: fused_softmax_xent_with_stats(z, action, stats=("target_logprob", "entropy"))[2:4],
        lambda z: composed_stats(z, action)[1:],
    )
    for stats in ways:
        z = logits.clone().requires_grad_()
        entropy, logprob = stats(z)
        (-(advantage * logprob).mean() - 0.01 * entropy.mean()).backward()
        grads.append(z.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_masked_classes_leave_the_entropy_finite(path: str, device: torch.device) -> None:
    for n_cols in (10, 100, 1001, 1501, 2501):
        logits, target = make(3, n_cols, torch.float32, device)
        logits[:, n_cols // 2 :] = -INF
        logits[2, 1:] = -INF  # nothing left to choose
        target = target % (n_cols // 2)
        target[2] = 0
        z = logits.clone().requires_grad_()
        found = fused_softmax_xent_with_stats(z, target, stats=("entropy", "lse"))
        assert found.entropy is not None and found.lse is not None
        exact = exact_stats(logits, target)
        tolerance = roundings_of_softmax(logits) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=tolerance, atol=0)
        (grad,) = torch.autograd.grad(found.entropy.sum() + found.lse.sum(), z)
        assert grad.isfinite().all() and not grad[:, n_cols // 2 :].any()


def test_the_first_of_the_largest_is_predicted(path: str, device: torch.device) -> None:
    for n_cols in (10, 100, 101, 1000, 1001, 1501, 1504, 2501):
        for target_class in (0, 3, 5, 8):
            logits = torch.zeros(2, n_cols, device=device)
            logits[:, 3] = logits[:, 5] = logits[:, n_cols - 1] = 2.0
            logits[1] = 7.0
            target = torch.full((2,), target_class, device=device)
            found = fused_softmax_xent_with_stats(logits, target, stats=("prediction", "correct"))
            assert found.prediction is not None and found.correct is not None
            assert found.prediction.tolist() == [3, 0]
            assert found.correct.tolist() == [target_class == 3, target_class == 0]


def test_the_largest_is_found_behind_a_softcap_whatever_its_value(path: str, device: torch.device) -> None:
    """Packed rows look for it by its value behind the map, computed once more: every bit has to be the same."""
    for n_cols, dtype in itertools.product((1501, 1504), (torch.bfloat16, torch.float32)):
        logits = torch.zeros(24, n_cols, dtype=dtype, device=device)
        logits[:, 7] = torch.logspace(-1.5, 1.2, 24, device=device).to(dtype)
        target = torch.full((24,), 9, device=device)
        found = fused_softmax_xent_with_stats(logits, target, stats="prediction", **MAP)  # type: ignore[arg-type]
        assert found.prediction is not None and (found.prediction == 7).all()


def test_rows_without_a_softmax_predict_nothing(path: str, device: torch.device) -> None:
    for n_cols in (10, 100, 1001, 1501, 2501):
        logits, target = make(5, n_cols, torch.float32, device)
        logits[0, 2], logits[1, 2], logits[2] = NAN, INF, -INF
        target[3] = -100
        found = fused_softmax_xent_with_stats(logits, target, reduction="none", ignore_index=-100)
        assert found.prediction is not None and found.correct is not None
        assert found.prediction.tolist()[:4] == [-1] * 4 and found.prediction[4] == logits[4].argmax()
        assert not found.correct[:4].any()
        for name in REAL:
            values = getattr(found, name)
            assert values[:3].isnan().all() and values[3] == 0 and values[4].isfinite()
    found = fused_softmax_xent_with_stats(logits, torch.full_like(target, -1), ignore_index=-1)
    assert found.correct is not None and not found.correct.any()


def test_only_what_is_asked_for_is_computed(path: str, device: torch.device) -> None:
    logits, target = make(6, 10, torch.float32, device)
    fields = LossAndStats._fields[1:]
    for wanted in ((), ("lse",), ("correct",), "entropy", ("prediction", "target_logprob")):
        found = fused_softmax_xent_with_stats(logits, target, stats=wanted)
        names = {wanted} if isinstance(wanted, str) else set(wanted)
        assert {name for name in fields if getattr(found, name) is not None} == names
        assert torch.equal(found.loss, fused_softmax_xent(logits, target))


def test_shapes_and_dtypes(path: str, device: torch.device) -> None:
    for shape in ((5,), (4, 5), (2, 5, 3), (2, 5, 3, 2), (0, 5)):
        logits = torch.randn(shape, device=device, dtype=torch.bfloat16)
        rows = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
        target = torch.randint(5, rows, device=device)
        found = fused_softmax_xent_with_stats(logits, target)
        for name in REAL:
            assert getattr(found, name).shape == rows and getattr(found, name).dtype == torch.float32
        assert found.prediction is not None and found.prediction.dtype == torch.int64
        assert torch.equal(found.prediction, logits.float().argmax(0 if len(shape) == 1 else 1))
        assert found.correct is not None and found.correct.dtype == torch.bool and found.correct.shape == rows
        assert found.loss.dtype == torch.bfloat16


def test_stats_beside_probabilities(path: str, device: torch.device) -> None:
    logits, target = make(6, 10, torch.float64, device)
    probabilities = torch.softmax(logits.flip(0), 1)
    z = logits.clone().requires_grad_()
    names = ("lse", "entropy", "prediction")
    found = fused_softmax_xent_with_stats(z, probabilities, stats=names, **MAP)  # type: ignore[arg-type]
    expected = exact_stats(logits, target, **MAP)
    for name in names:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.loss, composed(logits, probabilities, **MAP))  # type: ignore[arg-type]
    assert found.entropy is not None
    (grad,) = torch.autograd.grad(found.loss + found.entropy.sum(), z)
    z64 = logits.clone().requires_grad_()
    right = composed(z64, probabilities, **MAP) + composed_stats(z64, target, **MAP)[1].sum()  # type: ignore[arg-type]
    torch.testing.assert_close(grad, torch.autograd.grad(right, z64)[0], rtol=1e-12, atol=1e-14)
    none = fused_softmax_xent_with_stats(logits[:, :0], probabilities[:, :0], stats=names)
    assert none.lse is not None and none.lse.isnan().all() and none.lse.shape == (6,)


def test_a_stat_has_its_gradient_where_the_loss_has_none(path: str, device: torch.device) -> None:
    """Weights that sum to 0, or a normalizer of 0, are the loss's affair."""
    for shape in ((4, 10), (600, 10), (4, 100), (3, 1501), (3, 2501)):
        logits, target = make(*shape, torch.float32, device)
        expected = torch.softmax(logits, 1)
        for options in ({"weight": torch.zeros(shape[1], device=device)}, {"normalizer": 0.0}):
            z = logits.clone().requires_grad_()
            lse = fused_softmax_xent_with_stats(z, target, stats="lse", **options).lse  # type: ignore[arg-type]
            assert lse is not None
            torch.testing.assert_close(torch.autograd.grad(lse.sum(), z)[0], expected)


def test_rows_of_sample_weight_0_have_no_stats_learned_or_not(path: str, device: torch.device) -> None:
    logits, target = make(4, 10, torch.float32, device)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0], device=device)
    for learned in (False, True):
        found = fused_softmax_xent_with_stats(logits, target, sample_weight=weights.clone().requires_grad_(learned))
        for name in REAL:
            assert (getattr(found, name) == 0).tolist() == [True, False, False, True]
        assert found.prediction is not None and (found.prediction < 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("n_cols", [4, 34])
def test_gradcheck_and_gradgradcheck(path: str, device: torch.device, n_cols: int) -> None:
    logits, target = make(2, n_cols, torch.float64, device, scale=1.0)
    fast = n_cols > 4  # along one direction
    for options in ({}, {"softcap": 2.0, "logit_scale": 1.5, "z_loss": 0.1, "label_smoothing": 0.2}):

        def op(z: Tensor, options: dict[str, Any] = options) -> Any:
            found = fused_softmax_xent_with_stats(z, target, **options)
            return found.loss, *(getattr(found, name) for name in REAL)

        assert torch.autograd.gradcheck(op, logits.requires_grad_(), fast_mode=fast)
        slow = not fast and path == "torch"  # the interpreter takes a minute; the formula is the same
        assert torch.autograd.gradgradcheck(op, logits.requires_grad_(), fast_mode=not slow)


def test_transforms(path: str, device: torch.device) -> None:
    logits, target = make(4, 6, torch.float64, device)

    def ours(z: Tensor) -> Tensor:
        found = fused_softmax_xent_with_stats(z, target, stats=REAL)
        assert found.lse is not None and found.entropy is not None and found.target_logprob is not None
        return found.loss + (found.lse + 2 * found.entropy + 3 * found.target_logprob).sum()

    def theirs(z: Tensor) -> Tensor:
        lse, entropy, logprob = composed_stats(z, target)
        loss: Tensor = F.cross_entropy(z, target) + (lse + 2 * entropy + 3 * logprob).sum()
        return loss

    torch.testing.assert_close(torch.func.grad(ours)(logits), torch.func.grad(theirs)(logits))
    torch.testing.assert_close(torch.func.hessian(ours)(logits), torch.func.hessian(theirs)(logits))


@in_the_interpreter
@pytest.mark.real_widths
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(520, 10), (18, 100), (5, 1000), (5, 1001), (2, 50257)], ids=str)
def test_stats_cost_no_pass_over_the_logits(path: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, target = example(*shape, dtype)
    size = logits.numel() * logits.itemsize
    with counted() as launches, torch.no_grad():
        fused_softmax_xent_with_stats(logits, target)
    loaded, stored, others = moved(launches)
    assert loaded <= size and stored == 0 and others <= (PER_ROW + 24) * len(logits) + 4096
    with counted() as launches:
        fused_softmax_xent_with_stats(logits, target).loss.backward()
    loaded, stored, others = moved(launches)
    assert loaded <= size and stored <= size + again(logits)
    with counted() as launches:  # an incoming gradient of a stat: the logits are read again
        entropy = fused_softmax_xent_with_stats(logits, target, stats="entropy", reduction="none").entropy
        assert entropy is not None
        entropy.sum().backward()
    loaded, stored, _ = moved(launches)
    assert loaded <= 2 * size and stored <= size + again(logits)


@in_the_interpreter
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_a_step_with_stats_takes_no_more_launches(path: str) -> None:
    for shape, most in (((256, 10), 2), ((1000, 10), 4), ((20, 1000), 4)):
        logits, target = example(*shape, torch.float32)
        with counted() as launches, Operations() as operations:
            loss = fused_softmax_xent_with_stats(logits, target, stats=("lse", "prediction"), z_loss=1e-4).loss
            torch.autograd.grad(loss, logits, torch.ones(()))
        of_torch = [name for name in operations.names if name not in ("fill_", "ones")]  # fill_: conftest's NaN
        assert len(launches) + len(of_torch) <= most, (launches, of_torch)


def test_bad_input_is_named(path: str, device: torch.device) -> None:
    logits, target = make(4, 5, torch.float32, device)
    with pytest.raises(ValueError, match=r"'accuracy' is not one of the stats: lse, entropy, "):
        fused_softmax_xent_with_stats(logits, target, stats=("lse", "accuracy"))
    with pytest.raises(RuntimeError, match="inplace=True writes the gradient over the logits"):
        fused_softmax_xent_with_stats(logits.requires_grad_() * 1, target, inplace=True)
    for name in ("target_logprob", "correct"):
        with pytest.raises(RuntimeError, match=f"{name} is for class indices"):
            fused_softmax_xent_with_stats(logits, torch.softmax(logits.detach(), 1), stats=name)

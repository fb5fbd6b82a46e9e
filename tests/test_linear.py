"""The loss, log-probabilities and entropy from hidden states: against float64, counted, and refused."""

import contextlib
import gc
import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from bench import pretend
from bench.machine import Cpu
from exactness import by_reference, composed
from softxent import (
    FusedLinearSoftmaxXent,
    FusedSoftmaxXent,
    checks,
    dispatch,
    fused_linear_softmax_xent,
    fused_linear_softmax_xent_with_stats,
    fused_softmax_xent,
    fused_softmax_xent_with_stats,
    linear_logprobs,
    linear_rows,
    vocab_parallel_softmax_xent,
)
from softxent.linear_rows import Given, Gradients
from softxent.options import Inputs, Options, Stats

INF, NAN = float("inf"), float("nan")
STATS = ("lse", "entropy", "target_logprob")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 10), (7, 1), (5, 300))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "sum", "ignore_index": 3},
    {"reduction": "none", "label_smoothing": 0.1},
    {"weight": True, "label_smoothing": 0.2, "z_loss": 0.1},
    {"softcap": 5.0, "logit_scale": 0.7, "sample_weight": True},
    {"normalizer": 7.5, "z_loss": 0.1, "reduction": "mean"},
    {"reduction": "none", "weight": True, "softcap": 2.0, "sample_weight": True, "z_loss": 0.1},
)
pytestmark = pytest.mark.usefixtures("short_wide_rows")


@pytest.fixture(autouse=True)
def torch_operations_unless_said(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "path" not in request.fixturenames:
        monkeypatch.setattr(dispatch, "INTERPRET", False)


class Case:
    """Hidden states, a weight, a bias, and a target, of which some rows do not count."""

    def __init__(
        self,
        n_rows: int = 9,
        n_features: int = 8,
        n_cols: int = 33,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        soft: bool = False,
        scale: float = 1.0,
    ) -> None:
        g = torch.Generator().manual_seed(n_rows * 1009 + n_cols)
        self.x = torch.randn(n_rows, n_features, generator=g)
        self.w = torch.randn(n_cols, n_features, generator=g) * scale
        self.b = torch.randn(n_cols, generator=g)
        y = torch.randint(n_cols, (n_rows,), generator=g)
        y[1::4] = -100
        p = torch.randn(n_rows, n_cols, generator=g).softmax(1).to(torch.promote_types(dtype, torch.float32))
        self.y = p.to(device) if soft else y.to(device)
        self.x, self.w, self.b = (t.to(device, dtype).requires_grad_() for t in (self.x, self.w, self.b))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.w, self.b

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        if "weight" in options:
            options["weight"] = torch.linspace(0.5, 3, len(self.w), device=self.x.device)
        if "sample_weight" in options:
            options["sample_weight"] = torch.arange(len(self.x), device=self.x.device) % 4 / 2
        return options

    def ours(self, **options: Any) -> Tensor:
        return fused_linear_softmax_xent(self.x, self.w, self.y, self.b, **options)

    def with_stats(self, **options: Any) -> Any:
        return fused_linear_softmax_xent_with_stats(self.x, self.w, self.y, self.b, **options)


def in_chunks(case: Case, rows: int, **options: Any) -> int:
    """max_logits_bytes for so many rows a chunk: from what the error says that one takes."""
    names = "label_smoothing", "softcap", "logit_scale", "weight"
    options = case.options({name: options[name] for name in names if name in options})
    with pytest.raises(ValueError, match="one row needs") as raised:
        y = case.y if case.y.is_floating_point() else torch.zeros_like(case.y)
        fused_linear_softmax_xent(case.x, case.w, y, case.b, max_logits_bytes=1, **options)
    n_cols, n_features = case.w.shape
    least = int(str(raised.value).split("needs, ")[1].split(":")[0])
    wide = max(4, case.x.itemsize)
    return least + n_cols * wide + (rows - 1) * (n_cols + 2 * n_features) * wide  # with class weights


def close(found: Tensor, torchs: Tensor, exact: Tensor, what: str, roundings: int = 1) -> None:
    """Within twice the error of the same in torch operations, and roundings of the dtype and of the largest value."""
    wide = torch.promote_types(found.dtype, torch.float32)
    found64, torchs64, exact = (t.detach().cpu().double() for t in (found, torchs, exact))
    assert found64.shape == exact.shape and found64.isfinite().all(), what
    error = (found64 - exact).abs()
    slack = 16 * torch.finfo(wide).eps * exact.abs().max()
    rounding = torch.finfo(found.dtype).eps * (exact.abs() if roundings == 1 else roundings * exact.abs().max())
    allowed = 2 * (torchs64 - exact).abs().max() + rounding + slack + torch.finfo(found.dtype).tiny
    assert (error <= allowed).all(), f"{what}: off by {error.max():.3g}, allowed {allowed.min():.3g}"


def check(case: Case, bound: int | None = None, **options: Any) -> None:
    options, acc = case.options(options), torch.promote_types(case.x.dtype, torch.float32)
    loss = case.ours(
        **options,
        max_logits_bytes=bound,
        accum_dtype=torch.promote_types(case.w.dtype, torch.float32) if case.w.itemsize < 4 else None,
    )
    dloss = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
    leaves = [*case.leaves] + ([case.y] if case.y.requires_grad else [])
    found = torch.autograd.grad(loss, leaves, dloss)
    results = []
    for dtype, op in ((acc, composed), (torch.float64, by_reference)):
        x, w, b, *y = (t.detach().to(dtype).requires_grad_() for t in leaves)
        wide: dict[str, Any] = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        target = y[0] if y else case.y.to(dtype) if case.y.is_floating_point() else case.y
        z = F.linear(x, w, b)
        if case.x.is_cuda and dtype == acc:  # a GPU's matrix units take it so, after PyTorch's own loss too
            z.register_hook(lambda dz: dz.to(case.x.dtype).to(dz.dtype))
        out = op(z, target, **wide)
        results.append((out, *torch.autograd.grad(out, (x, w, b, *y), dloss.to(dtype))))
    assert loss.dtype == acc
    names = "loss", "dinput", "dweight", "dbias", "dtarget"
    for what, of_ours, of_torch, exact in zip(names, (loss, *found), *results, strict=False):
        close(of_ours, of_torch, exact, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_as_exact_as_on_logits(
    path: str, device: torch.device, dtype: torch.dtype, soft: bool, options: dict[str, Any]
) -> None:
    in_turns = SHAPES[(DTYPES.index(dtype) + OPTIONS.index(options)) % len(SHAPES)]  # each dtype and option has each
    if soft and "ignore_index" in options:
        options = {"reduction": "sum"}
    for n_rows, n_cols in ((9, 33), in_turns):
        case = Case(n_rows, 8, n_cols, dtype, device, soft)
        if "ignore_index" in options:
            options = options | {"ignore_index": min(3, n_cols)}
            case.y[case.y == -100] = options["ignore_index"]
        case.y[0] = 0.5 if soft else 0
        for bound in (None, in_chunks(case, 2, **options)):
            check(case, bound, **options)


@pytest.fixture
def products_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Of half precision into float32, which PyTorch has on a GPU alone: their operands' dtypes."""
    made: list[torch.dtype] = []

    def patched(name: str) -> None:
        real = getattr(torch, name)

        def product(*given: Tensor, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
            if out_dtype is None:
                return real(*given, out=out)  # type: ignore[no-any-return]
            *added, a, b = given
            assert a.dtype == b.dtype and {out.dtype, out_dtype, *(x.dtype for x in added)} == {torch.float32}
            made.append(a.dtype)
            return out.copy_(a.float() @ b.float() + (added[0] if added else 0))

        monkeypatch.setattr(torch, name, product)

    patched("mm")
    patched("addmm")
    monkeypatch.setattr(linear_rows, "_may_wait", lambda tensor: False)
    with pretend.gpu():
        yield made


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_half_precision_goes_into_products_as_a_gpu_takes_it(
    path: str, dtype: torch.dtype, soft: bool, products_of_a_gpu: list[torch.dtype]
) -> None:
    for options in (OPTIONS[0], OPTIONS[3]):
        case = Case(dtype=dtype, soft=soft)
        for bound in (None, in_chunks(case, 3)):
            check(case, bound, **options)
    assert set(products_of_a_gpu) == {dtype}


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"z_loss": 0.1, "softcap": 3.0}], ids=str)
def test_probabilities_have_a_gradient(path: str, device: torch.device, options: dict[str, Any]) -> None:
    case = Case(soft=True, device=device)
    case.y.requires_grad_()
    check(case, in_chunks(case, 3, **options), **options)


def test_a_budget_makes_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    sizes = linear_rows.sizes_of

    def noted(*arguments: Any, **more: Any) -> Any:
        seen.append(sizes(*arguments, **more))
        return seen[-1]

    monkeypatch.setattr(linear_rows, "sizes_of", noted)
    case = Case(n_rows=64, n_cols=100)
    case.y.clamp_(0)
    whole = case.ours()
    part = case.ours(max_logits_bytes=in_chunks(case, 4))
    assert seen[0].rows == 64 and seen[-1].rows == 4
    torch.testing.assert_close(whole, part)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stats_and_their_gradients(path: str, device: torch.device, dtype: torch.dtype, soft: bool) -> None:
    case = Case(dtype=dtype, device=device, soft=soft)
    names = ("lse", "entropy", "prediction") if soft else (*STATS, "prediction", "correct")
    options: dict[str, Any] = {"softcap": 4.0, "logit_scale": 1.3, "label_smoothing": 0.1}
    for reduction in ("mean", "none"):
        found = case.with_stats(
            stats=names,
            **options,
            reduction=reduction,
            max_logits_bytes=in_chunks(case, 2, **options),
            accum_dtype=torch.float32,
        )
        x, w, b = (t.detach().double().requires_grad_() for t in case.leaves)
        y = case.y.double() if soft else case.y
        logits = F.linear(x, w, b)
        right: Any = fused_softmax_xent_with_stats(logits, y, stats=names, **options, reduction=reduction)
        assert torch.equal(found.prediction, right.prediction)
        assert soft or torch.equal(found.correct, right.correct)
        total, expected = found.loss.sum(), right.loss.sum()
        for i, name in enumerate(n for n in STATS if n in names):
            value, exact = getattr(found, name), getattr(right, name)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
            g = torch.randn(len(case.x), generator=torch.Generator().manual_seed(i)).to(device)
            total, expected = total + (value * g).sum(), expected + (exact * g).sum()
        grads = torch.autograd.grad(total, case.leaves)
        for ours, exact in zip(grads, torch.autograd.grad(expected, (x, w, b)), strict=True):
            atol = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps * 4, atol=atol)


def test_logprobs_and_entropy(path: str, device: torch.device) -> None:
    case = Case(device=device)
    ids = torch.randint(33, (9, 4), generator=torch.Generator().manual_seed(0)).to(device)
    ids[0, 1], ids[0, 2] = ids[0, 0], -100  # one twice, one ignored
    ids[2] = -100
    g, h, k = torch.randn(9, device=device), torch.randn(9, device=device), torch.randn(9, 4, device=device)
    for options in ({}, {"softcap": 3.0, "logit_scale": 2.0}):
        bound: dict[str, Any] = {"max_logits_bytes": in_chunks(case, 2, **options), **options}
        z = F.linear(*case.leaves) * options.get("logit_scale", 1)
        z = options["softcap"] * torch.tanh(z / options["softcap"]) if options else z
        log_p = z.log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        counted, some = case.y != -100, ids != -100
        pairs = (
            (
                linear_logprobs(case.x, case.w, case.y, case.b, **bound),
                counted,
                log_p.gather(1, case.y.clamp(0)[:, None])[:, 0],
                g,
            ),
            (linear_logprobs(case.x, case.w, None, case.b, ids=ids, **bound), some, log_p.gather(1, ids.clamp(0)), k),
        )
        for (logprobs, entropies), mask, expected, dlogprobs in pairs:
            rows = mask if mask.dim() == 1 else mask.any(1)
            expected, of_rows = torch.where(mask, expected, 0), torch.where(rows, entropy, 0)
            torch.testing.assert_close((logprobs, entropies), (expected, of_rows))
            for total, right in (
                ((logprobs * dlogprobs).sum(), (expected * dlogprobs).sum()),
                ((entropies * h).sum(), (of_rows * h).sum()),
                (
                    (logprobs * dlogprobs).sum() - (entropies * h).sum(),
                    (expected * dlogprobs).sum() - (of_rows * h).sum(),
                ),
            ):
                ours = torch.autograd.grad(total, case.leaves, retain_graph=True)
                torch.testing.assert_close(ours, torch.autograd.grad(right, case.leaves, retain_graph=True))


def test_a_confident_model_keeps_its_digits() -> None:
    x, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[30.0, 0.0]] + [[0.0, 0.0]] * 9)
    logprobs, _ = linear_logprobs(x, w, ids=torch.tensor([[0, 1]]))
    log_d = math.log1p(9 * math.exp(-30))  # of what PyTorch's is 0
    torch.testing.assert_close(logprobs.double(), torch.tensor([[-log_d, -30 - log_d]]).double(), rtol=1e-5, atol=0)
    assert linear_logprobs(x, w, torch.tensor([0]))[0] == logprobs[0, 0]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(2, 5), (3, 1), (6,), (2, 0), (0, 3)], ids=str)
def test_shift_predicts_the_next_token(shape: tuple[int, ...], soft: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(*shape, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    y = torch.randn(*shape, 20).softmax(-1) if soft else torch.randint(20, shape)
    v = torch.rand(shape)
    cases: list[dict[str, Any]] = [{}, {"sample_weight": v}, {"reduction": "none"}]
    for options in (*cases, {"reduction": "sum", "sample_weight": v}):
        named: dict[str, Any] = {k: t[..., 1:] if isinstance(t, Tensor) else t for k, t in options.items()}
        ours = fused_linear_softmax_xent(x, w, y, shift=True, **options)
        cut = (x[..., :-1, :], w, y[..., 1:, :] if soft else y[..., 1:])
        right = fused_linear_softmax_xent(*cut, **named)
        torch.testing.assert_close(ours, right, equal_nan=True)
        if ours.numel():
            dloss = torch.randn(ours.shape)
            found, expected = (torch.autograd.grad(t, (x, w), dloss) for t in (ours, right))
            torch.testing.assert_close(found, expected, equal_nan=True)
    if not soft:
        stats = fused_linear_softmax_xent_with_stats(x, w, y, shift=True)
        torch.testing.assert_close(stats[1:], fused_linear_softmax_xent_with_stats(*cut)[1:])


def test_leading_dimensions() -> None:
    case = Case(n_rows=6)
    flat = case.ours(reduction="none")
    for shape in ((2, 3), (1, 3, 2)):
        loss = fused_linear_softmax_xent(case.x.view(*shape, -1), case.w, case.y.view(shape), case.b, reduction="none")
        assert torch.equal(loss, flat.view(shape))
    one = fused_linear_softmax_xent(case.x[0], case.w, case.y[0], case.b)
    torch.testing.assert_close(one, flat[0])
    found = fused_linear_softmax_xent_with_stats(case.x[0], case.w, case.y[0], case.b)
    assert found.lse is not None and found.lse.shape == ()


# Products and bytes, counted


def products(case: Case, run: Callable[[], Any]) -> float:
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        run()
    flops = sum(event.flops or 0 for event in profiled.events() or () if event.name in ("aten::mm", "aten::addmm"))
    return float(flops / (2 * case.x.numel() * len(case.w)))


def test_products_are_three_or_four_and_none_for_what_is_frozen() -> None:
    case = Case(n_rows=12)
    case.y.clamp_(0)

    def step(wanted: tuple[Tensor, ...] = case.leaves, **options: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(
            case.ours(**options, max_logits_bytes=in_chunks(case, 4, **options)).sum(), wanted
        )

    assert products(case, step()) == 3
    assert products(case, step(label_smoothing=0.1, z_loss=0.1, softcap=3.0, logit_scale=torch.tensor(2.0))) == 3
    assert products(case, step(reduction="none")) == 4
    assert products(case, lambda: case.with_stats(stats="correct").loss.backward()) == 3
    assert products(case, lambda: case.with_stats(stats=STATS).lse.sum().backward()) == 4
    assert products(case, lambda: linear_logprobs(case.x, case.w, case.y)[0].sum().backward()) == 4
    with torch.no_grad():
        assert products(case, case.ours) == 1
    half = Case(n_rows=12, dtype=torch.float16)
    half.y.clamp_(0)
    assert products(half, lambda: half.ours().backward()) == 4
    case.w.requires_grad_(False)
    assert products(case, step((case.x,))) == 2
    case.w.requires_grad_()
    case.x.requires_grad_(False)
    assert products(case, step((case.w,))) == 2


def test_rows_that_do_not_count_cost_no_product() -> None:
    case = Case(n_rows=16)
    left = int((case.y != -100).sum())
    assert products(case, lambda: case.ours().backward()) == 3 * left / 16
    v = torch.zeros(16)
    v[:4] = 1
    left = int(((case.y != -100) & (v != 0)).sum())
    assert products(case, lambda: case.ours(sample_weight=v).backward()) == 3 * left / 16


@pytest.mark.parametrize("soft", [False, True])
def test_a_known_number_of_rows_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, soft: bool) -> None:
    """As on a GPU, which is not waited for."""
    case = Case(n_rows=16, soft=soft)
    v = (torch.arange(16) % 3 != 0).float()
    kept = v != 0 if soft else (v != 0) & (case.y != -100)
    expected = case.ours(sample_weight=v)
    gradients = torch.autograd.grad(expected, case.leaves)
    monkeypatch.setattr(linear_rows, "_may_wait", lambda tensor: False)
    n = int(kept.sum())
    assert products(case, lambda: case.ours(sample_weight=v)) == 3
    for known in (n, n + 2, 16, 99):
        assert products(case, partial(case.ours, sample_weight=v, valid_rows=known)) == 3 * min(known, 16) / 16
        loss = case.ours(sample_weight=v, valid_rows=known)
        torch.testing.assert_close((loss, *torch.autograd.grad(loss, case.leaves)), (expected, *gradients))
        rows = case.ours(sample_weight=v, valid_rows=known, reduction="none")
        torch.testing.assert_close(rows, case.ours(sample_weight=v, reduction="none"))


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@pytest.mark.parametrize("soft", [False, True])
def test_a_number_of_rows_that_is_too_small_gives_nan(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, soft: bool
) -> None:
    monkeypatch.setattr(linear_rows, "_may_wait", lambda tensor: False)
    case = Case(n_rows=16, soft=soft, device=device)
    for known in (0, 2):
        loss = case.ours(sample_weight=torch.ones(16, device=device), valid_rows=known)
        assert loss.isnan() and all(g.isnan().any() for g in torch.autograd.grad(loss, case.leaves))
    none = case.ours(sample_weight=torch.zeros(16, device=device), valid_rows=0, reduction="sum")
    assert none == 0 and not any(g.any() for g in torch.autograd.grad(none, case.leaves))


def peak(case: Case, run: Callable[[], Any]) -> int:
    """Bytes above the gradients."""

    def step() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            run()
        for x in case.leaves:
            x.grad = None

    step()
    gc.collect()
    return Cpu().peak_bytes(step) - sum(x.nbytes for x in case.leaves if x.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"softcap": 30.0},
        {"z_loss": 1e-4},
        {"weight": True},
        {"label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4, "weight": True},
        {"reduction": "none"},
        {"soft": True},
        {"soft": True, "label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4, "stats": ("lse", "entropy")},
        {"stats": (*STATS, "prediction", "correct"), "label_smoothing": 0.1, "softcap": 30.0, "weight": True},
        {"stats": STATS},
        {"frozen": True},
        {"hard": True, "weight": True, "z_loss": 1e-4},
    ],
    ids=str,
)
def test_a_chunk_takes_what_it_may(dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = dict(options)
    hard = options.pop("hard", False)  # p_y is 0 in all rows
    case = Case(64, 32, 4001, dtype, soft=options.pop("soft", False), scale=99.0 if hard else 0.02)
    case.w.requires_grad_(not options.pop("frozen", False))
    stats = options.pop("stats", None)
    options = case.options(options)
    bound = 1 << 19
    rows = 64 * 8 * 8  # what is kept of rows: losses, stats, and their gradients

    def step() -> None:
        if stats is None:
            case.ours(**options, max_logits_bytes=bound).sum().backward()
        else:
            found = case.with_stats(**options, stats=stats, max_logits_bytes=bound)
            (found.loss + found.lse.sum() + found.entropy.sum()).backward()

    most = peak(case, step)
    assert bound // 2 < most <= bound + rows, f"{most} bytes"


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (Options(z_loss=1e-4), ("prediction",)),
        (Options(label_smoothing=0.1, z_loss=1e-4), ()),
        (Options(softcap=300.0), ()),
        (Options(label_smoothing=0.1, softcap=300.0, z_loss=1e-4, reduction="none"), STATS),
        (Options(reduction="none"), ("lse", "target_logprob")),
        (Options(reduction="none"), ("entropy",)),
    ],
    ids=str,
)
def test_beside_its_rows_the_row_op_keeps_what_is_reckoned(
    options: Options, names: tuple[str, ...], hard: bool, weighed: bool
) -> None:
    z = torch.randn(8, 4001, generator=torch.Generator().manual_seed(0)) * (1e3 if hard else 1)
    w, v = torch.linspace(0.5, 2, 4001) if weighed else None, torch.arange(8.0)
    now = options.reduction != "none"
    inputs = Inputs(z, torch.arange(8), w, v, torch.ones(1) if now else None)
    given = Given(torch.randn(8), Stats(**{name: torch.randn(8) for name in names})) if not now else None
    scratch = linear_rows._scratch(inputs, options)

    def run() -> None:
        linear_rows._forward(inputs, options, frozenset(names), Gradients(True, True) if now else Gradients())
        if given is not None:
            linear_rows._backward(inputs, options, given, Gradients(True, True))

    assert Cpu().peak_bytes(run) <= scratch * z.nbytes + (1 << 13)


def test_no_gradient_is_made_without_grad_mode() -> None:
    case = Case(256, 32, 4001)
    with torch.no_grad():
        size = Cpu().peak_bytes(lambda: case.ours(max_logits_bytes=1 << 20))
    assert size < 1.1 * (1 << 20)


def test_the_default_bound_is_the_weights_bytes() -> None:
    assert linear_rows.default_bytes(32000, torch.empty(32000, 512)) == 32000 * 512 * 4
    assert linear_rows.default_bytes(10, torch.empty(10, 10)) == 32 << 20


def test_the_loss_of_half_precision_is_that_of_float32() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(512, 64).bfloat16(), torch.randint(4001, (512,))
    w = (torch.randn(4001, 64) * 0.02).bfloat16()
    exact = F.cross_entropy(x.double() @ w.double().T, y)
    loss = fused_linear_softmax_xent(x, w, y, max_logits_bytes=1 << 20)
    assert loss.dtype == torch.float32 and abs(loss.double() - exact) < 2e-6 * exact


def test_a_float32_sum_of_the_weights_gradient_is_rounded_once() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(256, 16).bfloat16(), torch.randn(50, 16).bfloat16().requires_grad_()
    y = torch.randint(50, (256,))
    wide = w.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(x.double() @ wide.T, y), wide)
    errors = []
    for accum_dtype in (None, torch.float32):
        loss = fused_linear_softmax_xent(x, w, y, max_logits_bytes=1 << 13, accum_dtype=accum_dtype)
        (found,) = torch.autograd.grad(loss, w)
        assert found.dtype == torch.bfloat16
        errors.append((found.double() - exact).abs().max())
    assert errors[1] <= exact.abs().max() * 2**-8 and errors[0] > 1.5 * errors[1]


# The contract


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_written_and_any_backward_pass_gives_the_same(
    path: str, device: torch.device, dtype: torch.dtype
) -> None:
    case = Case(dtype=dtype, device=device)
    before = [t.detach().clone() for t in (*case.leaves, case.y)]
    for options in ({}, {"reduction": "none"}):
        loss = case.ours(**options).sum()
        first = [g.clone() for g in torch.autograd.grad(loss, case.leaves, retain_graph=True)]
        scaled = torch.autograd.grad(loss, case.leaves, torch.tensor(4.0, device=device), retain_graph=True)
        again = torch.autograd.grad(loss, case.leaves, retain_graph=True)
        for a, b, c in zip(first, again, scaled, strict=True):
            assert torch.equal(a, b) and torch.equal(a * 4, c)
    assert all(torch.equal(t, u) for t, u in zip((*case.leaves, case.y), before, strict=True))


@pytest.mark.parametrize("factor", [0.0, INF, NAN, 0.3])
def test_a_first_gradient_is_scaled(path: str, device: torch.device, factor: float) -> None:
    case = Case(device=device)
    found = torch.autograd.grad(case.ours(), case.leaves, torch.tensor(factor, device=device))
    ones = torch.autograd.grad(case.ours(), case.leaves)
    for ours, one in zip(found, ones, strict=True):
        torch.testing.assert_close(ours, torch.where(one == 0, 0, one * factor), equal_nan=True)


def test_a_weight_changed_between_raises_only_where_it_is_read() -> None:
    case = Case()
    loss, rows = case.ours(), case.ours(reduction="none").sum()
    with torch.no_grad():
        case.w.add_(1)
    loss.backward(retain_graph=True)
    for again in (loss, rows):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
@pytest.mark.parametrize("name, value", [("label_smoothing", 0.1), ("z_loss", 0.1), ("softcap", 2.0)])
@pytest.mark.usefixtures("process_group")
def test_a_number_changed_between_raises(path: str, monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    """As on a GPU, where its tensor is not read before the kernels do."""
    monkeypatch.setattr(checks, "_constant", checks._number)
    case, world = Case(), torch.distributed.group.WORLD
    z = F.linear(*case.leaves)
    for op in (
        partial(fused_softmax_xent, z, case.y),
        partial(vocab_parallel_softmax_xent, z, case.y, group=world),
        case.ours,
        partial(case.ours, group=world),
    ):
        number = torch.tensor(value)
        loss = op(reduction="none", **{name: number}).sum()
        loss.backward(retain_graph=True)
        number.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_gradgradcheck(path: str, device: torch.device, soft: bool, reduction: str) -> None:
    case = Case(4, 3, 5, torch.float64, device, soft)
    scale = torch.tensor(1.3, dtype=torch.float64, device=device, requires_grad=True)
    leaves = (*case.leaves, scale, *([case.y.requires_grad_()] if soft else []))

    def op(x: Tensor, w: Tensor, b: Tensor, s: Tensor, y: Tensor = case.y) -> Tensor:
        options: dict[str, Any] = {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1, "reduction": reduction}
        return fused_linear_softmax_xent(x, w, y, b, logit_scale=s, **options)

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_gradgradcheck_of_logprobs(path: str, device: torch.device) -> None:
    case = Case(4, 3, 5, torch.float64, device)
    ids = torch.tensor([[0, 1], [4, 4], [-100, 2], [-100, -100]], device=device)
    for op in (lambda x, w: linear_logprobs(x, w, ids=ids), lambda x, w: linear_logprobs(x, w, case.y)):
        assert torch.autograd.gradcheck(op, case.leaves[:2], fast_mode=True)
        assert torch.autograd.gradgradcheck(op, case.leaves[:2], fast_mode=True)


def test_a_recorded_backward_pass_of_what_is_learned_alone(path: str, device: torch.device) -> None:
    """Of ids of which the first is ignored, and is a class; and of probabilities beside stats that do not learn."""
    case = Case(dtype=torch.float64, device=device)
    ids = torch.tensor([[3, 1], [2, 3], [3, 3]], device=device)
    x, w, b = (t.detach() for t in case.leaves)
    z = F.linear(x[:3], w, b).requires_grad_()
    p = z.softmax(1)
    right = torch.where((ids == 3).all(1), 0, -(p * p.log()).sum(1))
    x = x[:3].requires_grad_()
    _, entropy = linear_logprobs(x, w, None, b, ids=ids, ignore_index=3)
    (dx,) = torch.autograd.grad(entropy.sum(), x, create_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(right.sum(), z)[0] @ w)

    soft = Case(soft=True, device=device)
    x, w, b = (t.detach() for t in soft.leaves)
    soft.y.requires_grad_()
    found: Any = fused_linear_softmax_xent_with_stats(x, w, soft.y, b, reduction="sum", stats="entropy")
    (dy,) = torch.autograd.grad(found.loss + found.entropy.sum(), soft.y, create_graph=True)
    torch.testing.assert_close(dy, -F.linear(x, w, b).log_softmax(1))


def test_transforms(path: str, device: torch.device) -> None:
    case = Case(dtype=torch.float64, device=device)
    x, w, b = (t.detach() for t in case.leaves)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return fused_linear_softmax_xent(x, w, case.y, b, label_smoothing=0.1)

    def right(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b), case.y, label_smoothing=0.1)

    torch.testing.assert_close(grad(ours, (0, 1))(x, w), grad(right, (0, 1))(x, w))
    tangents = torch.ones_like(x), torch.ones_like(w)
    torch.testing.assert_close(jvp(ours, (x, w), tangents), jvp(right, (x, w), tangents))
    many = torch.stack([x, 2 * x])
    torch.testing.assert_close(vmap(ours, (0, None))(many, w), vmap(right, (0, None))(many, w))
    logprobs = vmap(lambda x: linear_logprobs(x, w, case.y, b)[0])(many)
    torch.testing.assert_close(logprobs[1], linear_logprobs(2 * x, w, case.y, b)[0])


def test_options_that_are_tensors_have_gradients(path: str, device: torch.device) -> None:
    case = Case(device=device)
    v, n = (
        (torch.arange(9, device=device) % 3).float().requires_grad_(),
        torch.tensor(5.0, device=device, requires_grad=True),
    )
    s = torch.tensor(1.5, device=device, requires_grad=True)
    loss = case.ours(sample_weight=v, normalizer=n, logit_scale=s)
    right = composed(F.linear(*case.leaves), case.y, sample_weight=v, normalizer=n, logit_scale=s)
    torch.testing.assert_close(loss, right)
    leaves = (*case.leaves, v, n, s)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves))
    bias = case.b.detach().clone()
    bias[5] = -INF  # a class that is masked
    case.y[case.y == 5] = 6
    case.x.requires_grad_(False), case.w.requires_grad_(False)
    for b in (bias, bias.clone().requires_grad_()):
        ours = fused_linear_softmax_xent(case.x, case.w, case.y, b, logit_scale=s)
        right = composed(F.linear(case.x, case.w, bias), case.y, logit_scale=1.5)
        torch.testing.assert_close(ours, right)
        (found,) = torch.autograd.grad(ours, s)
        h = 1e-2
        near = [composed(F.linear(case.x, case.w, bias).double(), case.y, logit_scale=1.5 + d) for d in (h, -h)]
        torch.testing.assert_close(found.double(), (near[0] - near[1]) / (2 * h), rtol=1e-3, atol=1e-4)


@pytest.fixture
def forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("forget_what_was_compiled")
@pytest.mark.parametrize("soft", [False, True])
def test_a_whole_graph_gives_the_eager_results(path: str, device: torch.device, soft: bool) -> None:
    case = Case(soft=soft, device=device)
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"reduction": "none", "weight": True},
        {"softcap": 3.0, "sample_weight": True, "shift": True},
        {"logit_scale": torch.tensor(2.0, device=device, requires_grad=True), "normalizer": 3.0, "valid_rows": 9},
    )
    for options in cases:
        torch._dynamo.reset()
        options = case.options(options)

        def op(options: dict[str, Any] = options) -> Tensor:
            return case.ours(**options) * 3

        loss, right = torch.compile(op, fullgraph=True, backend="aot_eager")(), op()
        leaves = [*case.leaves, *(t for t in options.values() if isinstance(t, Tensor) and t.requires_grad)]
        dloss = torch.randn(loss.shape, device=device)
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves, dloss), torch.autograd.grad(right, leaves, dloss))
    torch._dynamo.reset()
    if not soft:

        def both() -> tuple[Tensor, Tensor]:
            return linear_logprobs(case.x, case.w, case.y, case.b)

        for ours, right in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(), both(), strict=True):
            torch.testing.assert_close(ours, right)
            g = torch.randn(9, device=device)
            of_ours, of_right = (torch.autograd.grad(t, case.leaves, g, retain_graph=True) for t in (ours, right))
            torch.testing.assert_close(of_ours, of_right)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("forget_what_was_compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_step_takes_no_more_memory_than_eager(dtype: torch.dtype) -> None:
    case = Case(256, 32, 4001, dtype, scale=0.02)

    def op(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fused_linear_softmax_xent(x, w, case.y, b, max_logits_bytes=1 << 20) * 3

    compiled = torch.compile(op, fullgraph=True)
    eager = peak(case, lambda: op(*case.leaves).backward())
    assert peak(case, lambda: compiled(*case.leaves).backward()) <= eager + 4096


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("forget_what_was_compiled")
def test_a_whole_graph_takes_the_parameters_of_a_layer() -> None:
    """Which are a class of their own, that Dynamo cannot ask for its bases."""
    case, head = Case(), FusedLinearSoftmaxXent(8, 33)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.x, case.y), head(case.x, case.y))


def test_the_registered_operators_pass_torchs_checks() -> None:
    case = Case()
    inputs = case.y, None, None, torch.tensor([7.0]), None
    for reduction, wanted in (("mean", True), ("none", True), ("sum", False)):
        numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.5)]
        how = -100, reduction, "label_smoothing logit_scale", numbers, 1 << 20, None, torch.float32, torch.float32
        arguments = (*case.leaves, *inputs, *how, "lse prediction" * (not wanted), [wanted] * 3 + [False] * 2)
        tests = "test_schema", "test_faketensor", "test_autograd_registration"
        torch.library.opcheck(torch.ops.softxent.linear_rows.default, arguments, test_utils=tests)


# What real training has


def test_autocast_and_master_weights() -> None:
    case = Case(dtype=torch.float32)
    expected = torch.autograd.grad(case.ours(), case.leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.ours()
        half = fused_linear_softmax_xent(case.x.bfloat16(), case.w, case.y, case.b)
    for found in (loss, half):
        assert found.dtype == torch.float32
        grads = torch.autograd.grad(found, case.leaves)
        assert [g.dtype for g in grads] == [torch.float32] * 3
        for ours, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=0.05, atol=0.01)
    x = case.x.detach().bfloat16().requires_grad_()
    loss = fused_linear_softmax_xent(x, case.w, case.y, case.b)
    dx, dw = torch.autograd.grad(loss, (x, case.w))
    assert (dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32)


def test_float16_survives_a_loss_scale() -> None:
    case = Case(n_rows=64, dtype=torch.float16, scale=0.1)
    with torch.no_grad():
        case.x.mul_(1e-3)
    case.x.requires_grad_()
    scaler = 2.0**14
    loss = case.ours(normalizer=1e5)
    found = torch.autograd.grad(loss, case.leaves, torch.tensor(scaler))
    x, w, b = (t.detach().double().requires_grad_() for t in case.leaves)
    right = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), case.y, reduction="sum") / 1e5, (x, w, b))
    for ours, exact in zip(found, right, strict=True):
        torch.testing.assert_close(ours.double() / scaler, exact, rtol=2e-3, atol=float(exact.abs().max()) * 1e-3)


def test_tied_embeddings_checkpointing_and_accumulation() -> None:
    class Tied(nn.Module):
        def __init__(self, ours: bool) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 16)
            self.body = nn.Linear(16, 16)
            self.ours = ours
            self.criterion = FusedLinearSoftmaxXent(16, 50, shift=True)
            self.criterion.linear.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.tanh(self.body(self.embedding(tokens)))
            if self.ours:
                return checkpoint(self.criterion, x, tokens, use_reentrant=False)  # type: ignore[no-any-return]
            return F.cross_entropy((x @ self.embedding.weight.T)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    torch.manual_seed(0)
    ours, right = Tied(True), Tied(False)
    right.load_state_dict(ours.state_dict())
    tokens = torch.randint(50, (3, 8))
    for _ in range(2):  # gradients accumulate
        ours(tokens).backward(), right(tokens).backward()
    for (name, a), b in zip(ours.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no such module")
def test_module_has_pytorchs_state_and_results() -> None:
    theirs = nn.LinearCrossEntropyLoss(8, 33, bias=True, weight=torch.rand(33))
    ours = FusedLinearSoftmaxXent(8, 33, bias=True, weight=torch.ones(33), z_loss=0.0)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "linear.weight", "linear.bias"]
    case = Case()
    torch.testing.assert_close(ours(case.x, case.y), theirs(case.x, case.y))
    assert isinstance(ours, FusedSoftmaxXent)
    case.y[case.y == -100] = 4
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 2.0, "shift": True}
    options |= {"reduction": "sum", "ignore_index": 4, "max_logits_bytes": 1 << 16, "accum_dtype": torch.float32}
    module = FusedLinearSoftmaxXent(8, 33, bias=True, **options)
    v = torch.rand(9)
    expected = fused_linear_softmax_xent(
        case.x, module.linear.weight, case.y, module.linear.bias, sample_weight=v, **options
    )
    torch.testing.assert_close(module(case.x, case.y, v, valid_rows=9), expected)
    assert "shift=True" in repr(module) and "z_loss=0.1" in repr(module)
    state = {k: t.detach() for k, t in module.state_dict().items()}
    found = grad(lambda p: functional_call(module, p, (case.x.detach(), case.y)))(state)
    assert found["linear.weight"].abs().sum() > 0


# Refusals


class Lora(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_head_that_is_more_than_a_product_is_refused_by_name() -> None:
    case, module = Case(), FusedLinearSoftmaxXent(8, 33)
    for refused in (Lora(8, 33), nn.Sequential(nn.Linear(8, 33))):
        module.linear = refused  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match=f"{type(refused).__qualname__}.*fused_softmax_xent"):
            module(case.x, case.y)
        with pytest.raises(RuntimeError, match=f"{type(refused).__qualname__}.*fused_softmax_xent"):
            fused_linear_softmax_xent(case.x, refused, case.y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass its weight"):
        fused_linear_softmax_xent(case.x, nn.Linear(8, 33), case.y)  # type: ignore[arg-type]
    module.linear = nn.Linear(8, 33)
    module(case.x, case.y)
    module.linear.register_forward_hook(lambda *a: None)
    with pytest.raises(RuntimeError, match="hooks"):
        module(case.x, case.y)
    module.linear = nn.Linear(8, 33)
    module.linear.forward = lambda input: 2 * input  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="another forward"):
        module(case.x, case.y)
    module.linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 33))
    module(case.x, case.y).backward()  # a weight that is computed is a weight


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.randn(9, 7)}, RuntimeError, r"chain: \(9, 7\) and \(33, 8\)"),
        ({"w": torch.randn(33)}, RuntimeError, "chain"),
        ({"x": torch.tensor(1.0)}, RuntimeError, "chain"),
        ({"b": torch.randn(32)}, RuntimeError, r"linear_bias must have shape \(33,\).*\(32,\)"),
        ({"y": torch.zeros(8, dtype=torch.int64)}, ValueError, r"class indices of shape \(9,\)"),
        ({"y": torch.zeros(9, 2, dtype=torch.int64)}, RuntimeError, r"class indices of shape \(9,\)"),
        ({"y": torch.rand(9, 32)}, RuntimeError, r"probabilities of shape \(9, 33\)"),
        ({"y": torch.zeros(9, dtype=torch.int16)}, RuntimeError, "int64"),
        ({"x": torch.randn(9, 8, device="meta")}, RuntimeError, "input is on meta but linear_weight is on cpu"),
        ({"x": torch.randn(9, 8).long()}, NotImplementedError, "input must be"),
        ({"w": torch.zeros(33, 8, dtype=torch.int8)}, NotImplementedError, "linear_weight must be"),
        ({"w": torch.randn(33, 8).half()}, RuntimeError, "linear_weight must have the dtype of input"),
        ({"w": torch.randn(33, 8).double()}, RuntimeError, "linear_weight must have the dtype of input"),
        ({"y": torch.full((9,), 33)}, IndexError, "33 at row 0.*33 classes"),
        ({"weight": torch.rand(32)}, RuntimeError, r"weight must have shape \(33,\)"),
        ({"weight": torch.rand(33, requires_grad=True)}, RuntimeError, "weight.detach"),
        ({"sample_weight": torch.rand(8)}, RuntimeError, "sample_weight"),
        ({"reduction": "avg"}, ValueError, "avg"),
        ({"label_smoothing": 2}, RuntimeError, "label_smoothing"),
        ({"softcap": -1.0}, RuntimeError, "softcap"),
        ({"z_loss": -1.0}, RuntimeError, "z_loss"),
        ({"logit_scale": 0.0}, RuntimeError, "logit_scale"),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer"),
        ({"max_logits_bytes": 100}, ValueError, "max_logits_bytes=100 is less than one row needs"),
        ({"max_logits_bytes": 1e9}, TypeError, "max_logits_bytes must be an int"),
        ({"valid_rows": torch.tensor(3)}, TypeError, "valid_rows must be an int"),
        ({"valid_rows": 3}, ValueError, "valid_rows=3, but 7 rows count"),
        ({"valid_rows": -1}, ValueError, "valid_rows must be at least 0"),
        ({"accum_dtype": torch.float16}, RuntimeError, "accum_dtype"),
        ({"x": torch.randn(8), "y": torch.tensor(1), "shift": True}, RuntimeError, "shift=True"),
        ({"x": torch.randn(2, 4, 8), "y": torch.zeros(2, 3).long(), "shift": True}, RuntimeError, "of all T positions"),
        ({"x": [1.0]}, TypeError, "input must be a Tensor, not list"),
        ({"y": None}, TypeError, "target must be a Tensor"),
    ],
)
def test_bad_input_is_one_error(change: dict[str, Any], error: type[Exception], words: str) -> None:
    case = Case()
    before = [t.detach().clone() for t in case.leaves]
    named = {"x": case.x, "w": case.w, "y": case.y, "b": case.b} | change
    x, w, y, b = (named.pop(name) for name in "xwyb")
    with pytest.raises(error, match=words):
        fused_linear_softmax_xent(x, w, y, b, **named)
    assert all(torch.equal(t, u) for t, u in zip(case.leaves, before, strict=True))
    assert all(t.grad is None for t in case.leaves)


def test_one_row_fits_in_what_the_error_says() -> None:
    for dtype, soft in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        case = Case(dtype=dtype, soft=soft)
        with pytest.raises(ValueError, match="one row needs") as raised:
            case.ours(max_logits_bytes=1)
        least = int(str(raised.value).split("needs, ")[1].split(":")[0])
        torch.testing.assert_close(case.ours(max_logits_bytes=least), case.ours())
        with pytest.raises(ValueError, match="one row needs"):
            case.ours(max_logits_bytes=least - 1)


def test_a_target_out_of_range_in_a_later_chunk_is_named_by_its_row() -> None:
    case = Case(n_rows=40)
    case.y[37] = 99
    with pytest.raises(IndexError, match=r"99 at row 37.*33 classes"):
        case.ours(max_logits_bytes=in_chunks(case, 4))
    ids = torch.zeros(40, 3, dtype=torch.int64)
    ids[5, 2] = -1
    with pytest.raises(IndexError, match="-1 at row 5"):
        linear_logprobs(case.x, case.w, ids=ids)
    y = torch.zeros(4, 10, dtype=torch.int64)
    y[:, 0] = 99  # which nothing predicts
    y[2, 7] = 98
    with pytest.raises(IndexError, match="98 at row 27"):
        fused_linear_softmax_xent(case.x.view(4, 10, 8), case.w, y, shift=True)


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_a_target_out_of_range_is_nan_in_the_kernels(path: str, device: torch.device) -> None:
    case = Case(device=device)
    case.y[3] = 99
    found = case.with_stats(reduction="none")
    assert found.loss[3].isnan() and found.loss.isnan().sum() == 1 and found.lse[3].isnan()
    ids = torch.zeros(9, 2, dtype=torch.int64, device=device)
    ids[4, 1] = 99
    logprobs, entropy = linear_logprobs(case.x, case.w, ids=ids)
    dx, dw = torch.autograd.grad(logprobs.sum() + entropy.sum(), (case.x, case.w))
    for found in (logprobs, entropy[:, None], dx):  # the whole token, and no other
        assert found[4].isnan().all() and found.isnan().any(1).sum() == 1
    assert dw.isnan().any()


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_what_an_id_has_twice_is_added_in_one_order(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU what one scatter_add_ adds to one place comes in any order, and rounds differently from run to run."""

    def refused(*_: Any) -> None:
        raise AssertionError("scatter_add_")

    monkeypatch.setattr(torch.Tensor, "scatter_add_", refused)
    case = Case(device=device)
    linear_logprobs(case.x, case.w, ids=torch.full((9, 3), 2, device=device))[0].sum().backward()
    assert case.x.grad is not None and case.x.grad.any()


def test_what_logprobs_takes() -> None:
    case = Case()
    ids = torch.zeros(9, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="either target"):
        linear_logprobs(case.x, case.w)
    with pytest.raises(TypeError, match="either target"):
        linear_logprobs(case.x, case.w, case.y, ids=ids)
    with pytest.raises(ValueError, match="shift"):
        linear_logprobs(case.x, case.w, ids=ids, shift=True)
    for bad in (ids[:8], ids.float()):
        with pytest.raises(RuntimeError, match="ids must be integers"):
            linear_logprobs(case.x, case.w, ids=bad)


@pytest.mark.parametrize("soft", [False, True])
def test_no_rows_and_none_that_count(path: str, device: torch.device, soft: bool) -> None:
    for case in (Case(n_rows=0, soft=soft, device=device), Case(n_rows=4, device=device)):
        if len(case.x):
            case.y.fill_(-100)
        for options, value in (({}, NAN), ({"reduction": "sum"}, 0.0), ({"normalizer": 2.0}, 0.0)):
            loss = case.ours(**options)
            torch.testing.assert_close(loss, torch.tensor(value, device=device), equal_nan=True)
            loss.backward()
            for x in case.leaves:
                assert x.grad is not None and not x.grad.any()
        assert case.ours(reduction="none").shape == case.x.shape[:1]


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
def test_ddp_and_fsdp2_of_one_process_and_a_weight_that_is_not_gathered() -> None:
    case = Case()
    plain = FusedLinearSoftmaxXent(8, 33, bias=True)
    plain(case.x, case.y).backward()
    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        module = FusedLinearSoftmaxXent(8, 33, bias=True)
        module.load_state_dict(plain.state_dict())
        wrapped: Any = wrap(module)
        wrapped(case.x, case.y).backward()
        for p, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
            found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(found, expected.grad)
    wrapped.reshard()
    with pytest.raises(RuntimeError, match=r"linear_weight is a DTensor.*Under FSDP2"):
        fused_linear_softmax_xent(case.x, module.linear.weight, case.y)


def test_probabilities_that_lie_in_columns_are_compiled() -> None:
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(16, 8)
    p = torch.softmax(torch.randn(16, 6), 0).requires_grad_()

    def loss(x: Tensor, p: Tensor) -> Tensor:
        return fused_linear_softmax_xent(x, w, p.T)

    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x, p), (x, p)) for f in (step, loss)))


def test_on_the_meta_device() -> None:
    x, w = torch.empty(5, 8, device="meta", requires_grad=True), torch.empty(16, 8, device="meta")
    loss = fused_linear_softmax_xent(x, w, torch.empty(5, dtype=torch.int64, device="meta"))
    assert loss.shape == () and torch.autograd.grad(loss, x)[0].shape == (5, 8)


def test_a_budget_that_backward_has_no_room_in_is_refused_at_once() -> None:
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(13, 5, requires_grad=True)
    p = torch.softmax(torch.randn(6, 13), 1).requires_grad_()
    with pytest.raises(ValueError, match="one row needs") as raised:
        fused_linear_softmax_xent(x, w, p, reduction="none", max_logits_bytes=1)
    least = int(str(raised.value).split("needs, ")[1].split(":")[0])
    with pytest.raises(ValueError, match=f"needs, {least}"):
        fused_linear_softmax_xent(x, w, p, reduction="none", max_logits_bytes=least - 1)
    loss = fused_linear_softmax_xent(x, w, p, reduction="none", max_logits_bytes=least)
    torch.autograd.grad(loss.sum(), (x, w, p))


def test_no_features_leave_the_bias() -> None:
    y, b = torch.tensor([0, 1, 2]), torch.randn(13)
    loss = fused_linear_softmax_xent(torch.empty(3, 0), torch.empty(13, 0), y, b)
    torch.testing.assert_close(loss, F.cross_entropy(b.expand(3, 13), y))

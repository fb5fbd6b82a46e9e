"""torch.compile: whole graphs, few recompiles, and the registered operators' own checks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from exactness import composed
from softxent import (
    LossAndStats,
    fused_linear_softmax_xent_with_stats,
    fused_softmax_xent,
    fused_softmax_xent_with_stats,
    log_softmax,
)
from softxent.compiled import numbers_of
from softxent.functional import STATS
from softxent.options import Inputs, Options

TARGETS = {"indices": torch.tensor([0, 1, 2, 3, -100, 4]), "probabilities": torch.rand(6, 5)}

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def op(logits: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    return fused_softmax_xent(logits * 2, target, **options) * 3


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_whole_graph_gives_the_eager_loss_and_gradients(
    path: str, device: torch.device, kind: str, dynamic: bool
) -> None:
    step = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"reduction": "none", "label_smoothing": 0.1},
        {"reduction": "sum", "weight": True},
        {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5, "sample_weight": True, "normalizer": 2.0},
        {"logit_scale": torch.tensor(2.0), "normalizer": torch.tensor(3)},
    )
    for options in cases[not dynamic :: 2]:  # in turns: numbers of other sizes are a schedule's, below
        torch._dynamo.reset()
        for n_rows in (6, 4) if dynamic and not options else (6,):
            logits = torch.randn(n_rows, 5, device=device, requires_grad=True)
            target = TARGETS[kind][:n_rows].to(device)
            inputs = (logits, target.requires_grad_()) if kind == "probabilities" else (logits,)
            if "weight" in options:
                options["weight"] = torch.linspace(0.5, 2, 5, device=device)
            if "sample_weight" in options:
                options["sample_weight"] = torch.linspace(0, 2, n_rows, device=device)
            loss = step(logits, target, options)
            expected = composed(logits * 2, target, **options) * 3
            torch.testing.assert_close(loss, expected)
            dloss = torch.randn_like(loss)
            torch.testing.assert_close(
                torch.autograd.grad(loss, inputs, dloss), torch.autograd.grad(expected, inputs, dloss)
            )


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize(("n_cols", "dynamic"), [(10, True), (100, False), (1501, True), (2501, False)])
def test_a_whole_graph_at_every_width(path: str, device: torch.device, n_cols: int, dynamic: bool) -> None:
    step = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    logits = torch.randn(3, n_cols, device=device, requires_grad=True)
    target = torch.tensor([0, -100, n_cols - 1], device=device)
    loss, expected = step(logits, target, {}), F.cross_entropy(logits * 2, target) * 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


@pytest.mark.parametrize(("dynamic", "more"), [(None, 1), (True, 0)])
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap", "logit_scale", "normalizer"])
def test_a_schedule_recompiles_at_most_once(
    path: str, device: torch.device, name: str, dynamic: bool | None, more: int
) -> None:
    counter = CompileCounterWithBackend("aot_eager")  # type: ignore[no-untyped-call]

    def scheduled(logits: Tensor, target: Tensor, number: float) -> Tensor:
        return fused_softmax_xent(logits, target, **{name: number})  # type: ignore[arg-type]

    step = torch.compile(scheduled, fullgraph=True, dynamic=dynamic, backend=counter)
    logits, target = torch.randn(6, 5, device=device), TARGETS["indices"].to(device)
    at_first = 0
    for number in (0.1, 0.2, 0.3, 0.4, 0.5):
        expected = fused_softmax_xent(logits, target, **{name: number})  # type: ignore[arg-type]
        torch.testing.assert_close(step(logits, target, number), expected)
        at_first = at_first or counter.frame_count
    assert counter.frame_count <= at_first + more


@pytest.mark.parametrize("kind", TARGETS)
def test_stats_in_a_whole_graph(path: str, device: torch.device, kind: str) -> None:
    names = ("entropy", "prediction", "lse") if kind == "probabilities" else STATS

    def op(logits: Tensor, target: Tensor) -> LossAndStats:
        return fused_softmax_xent_with_stats(logits, target, stats=names, softcap=4.0, z_loss=0.1)

    logits = torch.randn(6, 5, device=device, requires_grad=True)
    target = TARGETS[kind].to(device)
    results = torch.compile(op, fullgraph=True, backend="aot_eager")(logits, target), op(logits, target)
    torch.testing.assert_close(*results)
    gradients: list[Tensor] = []
    for found in results:
        assert found.entropy is not None and found.lse is not None
        gradients += torch.autograd.grad(found.loss + (found.entropy * 2 + found.lse).sum(), logits)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", [*TARGETS, "log_softmax"])
def test_transforms_within_a_graph(path: str, device: torch.device, kind: str) -> None:
    z = torch.randn(6, 5, device=device)
    target = TARGETS.get(kind, TARGETS["probabilities"]).to(device).detach()

    def loss(z: Tensor) -> Tensor:
        return (log_softmax(z, 1) * target).sum() if kind == "log_softmax" else fused_softmax_xent(z, target)

    def transformed(z: Tensor) -> tuple[Any, ...]:
        return grad(loss)(z), jvp(grad(loss), (z,), (z.flip(0),)), vmap(loss)(torch.stack((z, z * 2)))

    torch.testing.assert_close(torch.compile(transformed, backend="aot_eager")(z), transformed(z))
    step = torch.compile(loss, backend="eager")
    step(z)
    tangents = []
    with forward_ad.dual_level():
        for f in (loss, step):
            tangents.append(forward_ad.unpack_dual(f(forward_ad.make_dual(z, z.flip(0)))).tangent)
    torch.testing.assert_close(*tangents)


OPERATORS = (  # target, reduction, logits transposed, class weights: every two of them meet
    ("indices", "mean", False, False),
    ("indices", "sum", True, False),
    ("indices", "none", False, True),
    ("probabilities", "mean", True, True),
    ("probabilities", "sum", False, True),
    ("probabilities", "none", True, False),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(path: str, device: torch.device, dtype: torch.dtype) -> None:
    numbers = [torch.tensor(x, dtype=torch.float64, device=device) for x in (0.1, 0.2, 3.0, 0.5)]
    given = "label_smoothing z_loss softcap logit_scale"
    ops = torch.ops.softxent
    rows = torch.linspace(0, 1, 6, device=device)
    for kind, reduction, transposed, weighted in OPERATORS:
        logits = torch.randn((5, 6) if transposed else (6, 5), device=device, dtype=dtype)
        logits = logits.t() if transposed else logits
        soft = kind == "probabilities"
        y = torch.rand(6, 5, device=device, dtype=dtype) if soft else TARGETS[kind].to(device)
        weight = torch.ones(5, device=device, dtype=dtype) if weighted else None
        n = torch.ones(1, device=device) if reduction == "mean" else None
        rest = y, weight, rows, n, numbers, -100, reduction, given
        torch.library.opcheck(ops.row_loss.default, (logits, *rest, "" if soft else "lse prediction"))
        over = logits.clone(memory_format=torch.contiguous_format)
        if reduction != "none":
            torch.library.opcheck(ops.row_loss_.default, (over, *rest, not soft))
        dloss = torch.ones(6 if reduction == "none" else (), device=device)
        incoming = (dloss, [] if soft else [dloss.expand(6).clone()])
        torch.library.opcheck(
            ops.row_loss_backward_.default, (over, *incoming, *rest, *(("", True) if soft else ("entropy", False)))
        )


@pytest.mark.parametrize("options", [{"normalizer": 0.0}, {"weight": torch.zeros(5)}], ids=["normalizer", "weight"])
def test_a_stat_has_its_gradient_though_the_loss_is_undefined(
    path: str, device: torch.device, options: dict[str, Any]
) -> None:
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}

    def entropy(z: Tensor) -> Tensor:
        found = fused_softmax_xent_with_stats(z, TARGETS["indices"].to(device), **options).entropy
        assert found is not None
        return found.sum()

    z = torch.randn(6, 5, device=device, requires_grad=True)
    step = torch.compile(entropy, fullgraph=True, backend="aot_eager")
    ours, expected = (torch.autograd.grad(f(z), z)[0] for f in (step, entropy))
    assert expected.isfinite().all()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("stats", [(), ("entropy", "prediction")], ids=str)
@pytest.mark.parametrize("linear", [False, True])
def test_other_batch_sizes_compile_nothing_anew(
    path: str, device: torch.device, linear: bool, stats: tuple[str, ...]
) -> None:
    counter = CompileCounterWithBackend("aot_eager")  # type: ignore[no-untyped-call]
    head = torch.randn(5, 4, device=device)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        if linear:
            return fused_linear_softmax_xent_with_stats(x, head, target, stats=stats).loss
        return fused_softmax_xent_with_stats(x @ head.T, target, stats=stats).loss

    step = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    at_first = 0
    for n in (6, 7, 9, 12):
        x = torch.randn(n, 4, device=device, requires_grad=True)
        target = torch.arange(n, device=device) % 5
        torch.testing.assert_close(torch.autograd.grad(step(x, target), x), torch.autograd.grad(loss(x, target), x))
        at_first = at_first or counter.frame_count
    assert counter.frame_count == at_first


@pytest.mark.parametrize(("device", "dtype"), [("mps", torch.float32), ("cpu", torch.float64)])
def test_numbers_are_made_in_the_widest_dtype_of_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype
) -> None:
    """MPS has no float64. There is none here: what it would be asked for is looked at."""
    asked = []

    def ones(*shape: Any, **how: Any) -> Tensor:
        asked.append(how)
        return Tensor()

    class Logits:
        device: torch.device

    logits = Logits()
    logits.device = torch.device(device)
    monkeypatch.setattr(torch, "ones", ones)
    numbers_of(Options(z_loss=0.1), Inputs(logits, None))  # type: ignore[arg-type]
    assert asked == [{"dtype": dtype, "device": torch.device(device)}]

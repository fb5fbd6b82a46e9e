"""The op on DTensors of logits, on 4 processes: replicated, rows sharded, classes sharded, both."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

import ranks
from softxent import FusedSoftmaxXent, LossAndStats, dispatch, fused_softmax_xent, fused_softmax_xent_with_stats

PAGE = Path(__file__).parents[1] / "docs/parallel.md"
R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
INDEX_STATS = ("lse", "entropy", "target_logprob", "prediction", "correct")
SOFT_STATS = ("lse", "entropy", "prediction")
PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "replicated": (R,),
    "rows": (S0,),
    "classes": (S1,),
    "rows and classes": (S0, S1),
    "classes and rows": (S1, S0),
    "classes of replicas": (R, S1),
    "rows twice": (S0, S0),
}
IMAGES: dict[str, tuple[Placement, ...]] = {"images and classes": (S0, S1), "places and classes": (S2, S1)}


def rows(n_rows: int = 9, n_classes: int = 37, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    target = torch.randint(n_classes, (n_rows,), generator=g)
    target[:4] = torch.tensor([-100, 0, n_classes - 1, -100])
    return {"input": (torch.randn(n_rows, n_classes, generator=g) * 3).to(dtype), "target": target}


def learned(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).requires_grad_()


def of_rows(n_rows: int = 9) -> Tensor:
    return torch.rand(n_rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(decimals=1)


def of_classes(n_classes: int = 37) -> Tensor:
    return torch.rand(n_classes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def probabilities() -> Tensor:
    return torch.rand(9, 37, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def images() -> dict[str, Any]:
    case = rows(30)
    return {"input": case["input"].view(5, 6, 37).movedim(2, 1).contiguous(), "target": case["target"].view(5, 6)}


EVERY: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0}
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "mean": rows,
    "sum": lambda: rows() | {"reduction": "sum"},
    "none": lambda: rows() | {"reduction": "none"},
    "every option": lambda: rows() | EVERY | {"weight": of_classes(), "sample_weight": of_rows()},
    "learned": lambda: rows() | {"sample_weight": learned(of_rows()), "logit_scale": learned(0.7)},
    "normalizer": lambda: rows() | {"normalizer": learned(7.0)},
    "probabilities": lambda: rows() | EVERY | {"target": learned(probabilities()), "weight": of_classes()},
    "float32": lambda: rows(dtype=torch.float32),
    "few classes": lambda: rows(n_classes=5),
    "nothing": lambda: rows() | {"target": torch.full((9,), -100)},
}


def mesh_of(placements: tuple[Placement, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", (4,) if len(placements) == 1 else (2, 2))


def beside(placements: tuple[Placement, ...], class_dim: int = 1) -> tuple[Placement, ...]:
    """Placements of what has no class dimension."""
    return tuple(
        R if p.is_replicate() or p.dim == class_dim else Shard(p.dim - (p.dim > class_dim))  # type: ignore[attr-defined]
        for p in placements
    )


def on_mesh(case: dict[str, Any], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> dict[str, Any]:
    """Every tensor as a DTensor that is a leaf."""
    soft = case["target"].is_floating_point()
    how = {"input": placements, "target": placements if soft else beside(placements)}
    how["sample_weight"] = beside(placements)

    def spread(name: str, x: Tensor) -> Tensor:
        made = distribute_tensor(x.detach(), mesh, how.get(name, (R,) * mesh.ndim))
        return made.requires_grad_(x.requires_grad or name == "input")

    return {name: spread(name, x) if isinstance(x, Tensor) else x for name, x in case.items()}


def placements_of(x: Any) -> Any:
    return getattr(x, "placements", None)


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def outcome(case: dict[str, Any], with_stats: bool) -> dict[str, Any]:
    """Everything a call gives, whole."""
    if with_stats:
        stats = SOFT_STATS if case["target"].is_floating_point() else INDEX_STATS
        case = case | {"stats": stats}
    function: Any = fused_softmax_xent_with_stats if with_stats else fused_softmax_xent
    with ranks.Collectives() as forward:
        out = function(**case)
    found = out._asdict() if isinstance(out, LossAndStats) else {"loss": out}
    found = {name: x for name, x in found.items() if x is not None}
    with ranks.Collectives() as backward:
        sum_of = [found["loss"].sum()] + [found[name].sum() for name in ("lse", "entropy") if name in found]
        torch.autograd.backward(sum_of)
    placed = {name: placements_of(x) for name, x in found.items()}
    grads = {"d" + name: whole(x.grad) for name, x in case.items() if isinstance(x, Tensor) and x.grad is not None}
    found = {name: whole(x).detach() for name, x in found.items()} | grads
    return found | {"placed": placed, "forward": forward.seen, "backward": backward.seen}


def all_cases(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for how, placements in PLACEMENTS.items():
        mesh = mesh_of(placements)
        for name, case in CASES.items():
            for with_stats in (False, True):
                found[how, name, with_stats] = outcome(on_mesh(case(), mesh, placements), with_stats)
    for how, placements in IMAGES.items():
        for with_stats in (False, True):
            found[how, "images", with_stats] = outcome(on_mesh(images(), mesh_of(placements), placements), with_stats)
    return found


def traffic(rank: int) -> dict[Any, Any]:
    """What a second call of the same shapes sends, and of how many rows this rank has a part."""
    found = {}
    for how, placements in PLACEMENTS.items():
        mesh = mesh_of(placements)
        for name, with_stats in (("sum", False), ("mean", False), ("every option", True)):
            for _ in range(2):
                case = on_mesh(CASES[name](), mesh, placements)
                out = outcome(case, with_stats)
            found[how, name] = out["forward"], out["backward"], len(case["target"].to_local())
    return found


def placed_by_torch(rank: int) -> dict[Any, Any]:
    """Where PyTorch and we put the loss, of rows that it can shard; and within loss_parallel, what it can do there."""
    found: dict[Any, Any] = {}
    for how, placements in PLACEMENTS.items():
        for reduction in ("none", "sum", "mean"):
            case = on_mesh(rows(8, 40), mesh_of(placements), placements)
            theirs = F.cross_entropy(**case, reduction=reduction)
            ours = fused_softmax_xent(**case, reduction=reduction)
            found[how, reduction, "outside"] = placements_of(ours), placements_of(theirs)
            with loss_parallel():
                ours = fused_softmax_xent(**case, reduction=reduction)
                grad = torch.autograd.grad(ours.sum(), case["input"])[0]
                of_torch: Any = (None, None)
                if sum(p.is_shard(1) for p in placements) == 1 and (len(placements) == 1 or reduction != "mean"):
                    loss = F.cross_entropy(**case, reduction=reduction)
                    of_torch = placements_of(loss), whole(torch.autograd.grad(loss.sum(), case["input"])[0])
            found[how, reduction, "within loss_parallel"] = placements_of(ours), of_torch[0]
            found[how, reduction, "gradient"] = whole(grad), of_torch[1]
    return found


def errors(rank: int) -> dict[str, Any]:
    mesh, both = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    case = rows()
    x, t = case["input"], case["target"]

    def spread(x: Tensor, *placements: Placement, mesh: DeviceMesh = mesh) -> DTensor:
        return distribute_tensor(x, mesh, placements)

    scale = torch.tensor(0.7, requires_grad=True)
    calls: dict[str, Callable[[], Any]] = {
        "partial": lambda: fused_softmax_xent(DTensor.from_local(x, mesh, [Partial()]), spread(t, R)),
        "classes twice": lambda: fused_softmax_xent(spread(x, S1, S1, mesh=both), spread(t, R, R, mesh=both)),
        "a plain target": lambda: fused_softmax_xent(spread(x, S0), t),
        "a target elsewhere": lambda: fused_softmax_xent(spread(x, R), spread(t, S0)),
        "another mesh": lambda: fused_softmax_xent(spread(x, R), spread(t, R, R, mesh=both)),
        "plain logits": lambda: fused_softmax_xent(x, spread(t, R)),
        "in place": lambda: fused_softmax_xent(spread(x, S1), spread(t, R), inplace=True),
        "a plain learned scale": lambda: fused_softmax_xent(spread(x, S0), spread(t, S0), logit_scale=scale),
        "a shape": lambda: fused_softmax_xent(spread(x, S1), spread(t[:5], R)),
        "create_graph": lambda: torch.autograd.grad(
            fused_softmax_xent(y := spread(x, S1).requires_grad_(), spread(t, R)), y, create_graph=True
        ),
    }
    found: dict[str, Any] = {}
    for name, provoke in calls.items():
        try:
            found[name] = provoke()
        except Exception as error:
            found[name] = type(error), str(error)
    return found


def others(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (4,))
    case = rows()
    x, t = case["input"], case["target"]
    found: dict[str, Any] = {}
    plain_target = distribute_tensor(x, mesh, [S1])
    found["a plain target"] = whole(fused_softmax_xent(plain_target, t))
    found["a replicated target"] = whole(
        fused_softmax_xent(distribute_tensor(x, mesh, [S0]), distribute_tensor(t, mesh, [R]))
    )
    # logits that are still on their way
    late = DTensor.from_local(x / 4, mesh, [Partial()]).redistribute(placements=[R])
    found["late"] = whole(fused_softmax_xent(late, t))
    module = FusedSoftmaxXent(weight=of_classes(), label_smoothing=0.1)
    found["module"] = whole(module(plain_target, t))
    leaf = distribute_tensor(x, mesh, [S0]).requires_grad_()
    loss = whole(fused_softmax_xent(leaf, distribute_tensor(t, mesh, [S0])))
    loss.backward()
    found["of the whole loss"] = whole(leaf.grad)
    return found


def page(rank: int) -> list[Tensor]:
    """The blocks of docs/parallel.md."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return [names["loss"].detach(), names["local"].grad]


def all_of_it(rank: int) -> dict[str, Any]:
    return {
        "cases": all_cases(rank),
        "traffic": traffic(rank),
        "placed": placed_by_torch(rank),
        "errors": errors(rank),
        "others": others(rank),
    }


of_ranks = ranks.run_once(4, all_of_it)


@pytest.fixture(autouse=True)
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)


ALL = [(how, name) for how in PLACEMENTS for name in CASES] + [(how, "images") for how in IMAGES]


@pytest.mark.parametrize("how, name", ALL)
def test_a_dtensor_is_as_one_process(how: str, name: str) -> None:
    for with_stats in (False, True):
        case = CASES.get(name, images)()
        case["input"] = case["input"].requires_grad_()
        exact = outcome(case, with_stats)
        tolerance = 2e-6 if case["input"].dtype == torch.float32 else 1e-12
        for of_rank in of_ranks():
            found = of_rank["cases"][how, name, with_stats]
            assert found.keys() == exact.keys()
            for key, value in found.items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(value, exact[key], rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("how", PLACEMENTS)
def test_little_is_sent_and_nothing_in_backward(how: str) -> None:
    """Once shapes are agreed on: a number a dimension of the mesh that shards rows, to count them, and one all-gather
    of 3 or 8 values a row over the dimension that shards classes."""
    over_rows = sum(p.is_shard(0) for p in PLACEMENTS[how])
    over_classes = any(p.is_shard(1) for p in PLACEMENTS[how])
    for of_rank in of_ranks():
        for name, n_values in (("sum", 3), ("mean", 3), ("every option", 8)):
            forward, backward, n_rows = of_rank["traffic"][how, name]
            expected = [("allreduce", 8)] * (over_rows if name != "sum" else 0)
            expected += [("allgather_base", n_values * n_rows * 8)] * over_classes
            assert [x for x in forward if x[1]] == [x for x in expected if x[1]]
            assert backward == []


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("how", PLACEMENTS)
def test_the_loss_is_placed_as_that_of_torch(how: str, reduction: str) -> None:
    for of_rank in of_ranks():
        ours, theirs = of_rank["placed"][how, reduction, "outside"]
        assert ours == theirs
        within, theirs = of_rank["placed"][how, reduction, "within loss_parallel"]
        assert within == ours and theirs in (None, ours)
        grad, theirs = of_rank["placed"][how, reduction, "gradient"]
        if theirs is not None:
            torch.testing.assert_close(grad, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "name, error, message",
    (
        ("partial", NotImplementedError, r"has to be Replicate or Shard: input.redistribute\(.*Replicate\(\)"),
        ("classes twice", NotImplementedError, r"over 2 dimensions.*redistribute\(.*\[Shard\(dim=1\), Replicate\(\)\]"),
        ("a plain target", RuntimeError, r"distribute_tensor\(target, mesh, \[Shard\(dim=0\)\]\)"),
        ("a target elsewhere", RuntimeError, r"target.redistribute\(placements=\[Replicate\(\)\]\)"),
        ("another mesh", RuntimeError, "put both on one mesh"),
        ("plain logits", NotImplementedError, "target is a DTensor beside an input that is none"),
        ("in place", RuntimeError, "inplace=True does not go with a DTensor"),
        ("a plain learned scale", RuntimeError, r"distribute_tensor\(logit_scale, mesh"),
        ("a shape", ValueError, "expected a target of shape"),
        ("create_graph", RuntimeError, "would need collectives of its own"),
    ),
)
def test_what_is_not_supported_says_what_to_do(name: str, error: type[Exception], message: str) -> None:
    for of_rank in of_ranks():
        kind, said = of_rank["errors"][name]
        assert kind is error
        with pytest.raises(error, match=message):
            raise kind(said)


def test_plain_and_replicated_tensors_beside_a_dtensor() -> None:
    case = rows()
    exact = F.cross_entropy(**case)
    weighed = F.cross_entropy(**case, weight=of_classes(), label_smoothing=0.1)
    case["input"].requires_grad_()
    F.cross_entropy(**case).backward()
    for of_rank in of_ranks():
        found = of_rank["others"]
        for name in ("a plain target", "a replicated target", "late"):
            torch.testing.assert_close(found[name], exact)
        torch.testing.assert_close(found["module"], weighed)
        torch.testing.assert_close(found["of the whole loss"], case["input"].grad)


def test_the_page_on_logits_spread_over_devices_runs() -> None:
    (loss, grad), (same, other) = ranks.run(2, page)
    assert torch.equal(loss, same)
    torch.testing.assert_close(torch.cat([grad, other], 1).sum(1), torch.zeros(8), rtol=0, atol=1e-6)

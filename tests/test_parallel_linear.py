"""The linear layer whose classes are spread over 3 processes: 20, 17 and 0 of them, against one process."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import ranks
from memory import peak_bytes
from softxent import (
    dispatch,
    fused_linear_softmax_xent,
    fused_linear_softmax_xent_with_stats,
    linear_logprobs,
    vocab_parallel_softmax_xent,
)
from test_parallel_vocab import (
    ALL,
    INDEX_STATS,
    N_CLASSES,
    N_ROWS,
    SOFT_STATS,
    Found,
    cotangent,
    learned,
    of_classes,
    of_rows,
    part,
    probabilities,
)

N_FEATURES = 5
LEARNED = "input", "linear_weight", "linear_bias"
OF_CLASSES = "linear_weight", "linear_bias", "weight"
SLICES = {0: (0, 20), 1: (20, 37), 2: (37, 37)}


def layer(dtype: torch.dtype = torch.float64, **given: Any) -> dict[str, Any]:
    """The arguments of a call on all classes, of so few bytes that ranks have two to four chunks."""
    g = torch.Generator().manual_seed(11)
    x, w, b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N_ROWS, 5), (N_CLASSES, 5), (37,)))
    target = torch.randint(N_CLASSES, (N_ROWS,), generator=g)
    target[2], target[4], target[5] = -100, 19, 20
    of = {"input": x.to(dtype), "linear_weight": w.to(dtype), "linear_bias": b.to(dtype)}
    return of | {"target": target, "max_logits_bytes": 850 * torch.promote_types(dtype, torch.float32).itemsize} | given


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": layer,
    "no bias": lambda: layer(linear_bias=None),
    "sum": lambda: layer(reduction="sum"),
    "none": lambda: layer(reduction="none"),
    "weight and smoothing": lambda: layer(weight=of_classes(), label_smoothing=0.2),
    "another ignore_index": lambda: layer(ignore_index=19, weight=of_classes(), target=layer()["target"].clamp(min=0)),
    "a learned scale": lambda: layer(logit_scale=learned(0.7), softcap=3.0),
    "a learned sample_weight": lambda: layer(sample_weight=learned(of_rows()), weight=of_classes()),
    "a learned normalizer": lambda: layer(normalizer=learned(5.0), sample_weight=of_rows()),
    "everything": lambda: layer(weight=of_classes(), sample_weight=of_rows(), **ALL),
    "probabilities": lambda: layer(target=probabilities()),
    "learned probabilities and everything": lambda: layer(
        target=learned(probabilities()), weight=of_classes(), sample_weight=of_rows(), **ALL
    ),
    "float32": lambda: layer(torch.float32, label_smoothing=0.1),
    "bfloat16": lambda: layer(torch.bfloat16, accum_dtype=torch.float32),
    "float16": lambda: layer(torch.float16),
    "shifted": lambda: layer(shift=True),
    "shifted sequences": lambda: {**sequences(), "shift": True, "reduction": "none"},
    "no rows": lambda: layer(input=layer()["input"][:0], target=layer()["target"][:0]),
    "all ignored": lambda: layer(target=torch.full((N_ROWS,), -100)),
}


def eight(**given: Any) -> dict[str, Any]:
    """As many rows as 4 ranks share alike."""
    return layer(**{"input": layer()["input"][:8], "target": layer()["target"][:8]} | given)


def sequences() -> dict[str, Any]:
    case = layer()
    return case | {"input": case["input"].view(3, 3, N_FEATURES), "target": case["target"].view(3, 3)}


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def sliced(case: dict[str, Any], at: tuple[int, int], padding: int) -> dict[str, Any]:
    """The arguments of a rank."""
    case = {name: part(x, 0, at, padding) if name in OF_CLASSES and x is not None else x for name, x in case.items()}
    if case["target"].is_floating_point():
        case["target"] = part(case["target"], 1, at, padding)
    return case


def outcome(call: Callable[..., Any], case: dict[str, Any]) -> Found:
    """The loss, the stats and the gradients of a call."""
    for name in LEARNED:
        if case.get(name) is not None:
            case[name] = case[name].detach().clone().requires_grad_()
    for x in case.values():
        if isinstance(x, Tensor):
            x.grad = None
    out = call(**case)
    found = {"loss": out} if isinstance(out, Tensor) else {k: x for k, x in out._asdict().items() if x is not None}
    differentiable = {name: x for name, x in found.items() if x.requires_grad}
    outputs = {name: whole(x) for name, x in differentiable.items()}
    torch.autograd.backward(list(outputs.values()), [cotangent(*pair) for pair in outputs.items()])
    grads = {"d" + name: x.grad for name, x in case.items() if isinstance(x, Tensor) and x.grad is not None}
    return {name: x.detach() for name, x in found.items()} | grads


def call_on(case: dict[str, Any], with_stats: bool) -> Found:
    if not with_stats:
        return outcome(fused_linear_softmax_xent, case)
    soft = case["target"].is_floating_point()
    return outcome(fused_linear_softmax_xent_with_stats, case | {"stats": SOFT_STATS if soft else INDEX_STATS})


def all_cases(rank: int, names: tuple[str, ...]) -> dict[tuple[str, bool], Found]:
    return {
        (name, with_stats): call_on(sliced(CASES[name](), SLICES[rank], 0) | {"group": dist.group.WORLD}, with_stats)
        for name in names
        for with_stats in (False, True)
    }


KERNEL_CASES = "bfloat16", "everything", "learned probabilities and everything", "none"
by_torch = ranks.run_once(3, all_cases, tuple(CASES))
by_kernels = ranks.run_once(3, all_cases, KERNEL_CASES, interpret=True)


@pytest.fixture(autouse=True)
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, too."""
    monkeypatch.setattr(dispatch, "INTERPRET", False)


@pytest.mark.parametrize(
    "found_by, name",
    [*((by_torch, name) for name in CASES), *((by_kernels, name) for name in KERNEL_CASES)],
    ids=[*CASES, *(f"kernels: {name}" for name in KERNEL_CASES)],
)
def test_every_option_is_that_of_one_process(found_by: Any, name: str) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 0.03, torch.float16: 3e-3}
    for with_stats in (False, True):
        exact = call_on(CASES[name](), with_stats)
        for rank, of_rank in enumerate(found_by()):
            found = of_rank[name, with_stats]
            assert found.keys() == exact.keys()
            for key, value in found.items():
                expected = exact[key]
                if key in ("dlinear_weight", "dlinear_bias", "dtarget"):
                    expected = part(expected, int(key == "dtarget"), SLICES[rank], 0)
                elif value.is_floating_point():
                    same = found_by()[0][name, with_stats][key]
                    assert bits(value) == bits(same), f"{key}: ranks differ"
                at_most = tolerance[CASES[name]()["input"].dtype]
                torch.testing.assert_close(value, expected, rtol=at_most, atol=at_most, equal_nan=True)


def other_ways(rank: int) -> dict[Any, Any]:
    """Of 2 ranks, which give the rows whole or by halves and sum their gradients so or so; what goes over the wire."""
    found: dict[Any, Any] = {}
    at = [(0, 20), (20, 37)][rank]
    of_all = eight()
    for how, rows in (
        ("all_reduce", slice(8)),
        ("partial", slice(8)),
        ("reduce_scatter", slice(4 * rank, 4 * rank + 4)),
    ):
        case = sliced(of_all, at, 0) | {"group": dist.group.WORLD, "vocab_size": N_CLASSES, "input_gradient": how}
        case["input"] = case["input"][rows]
        with ranks.Collectives() as wire:
            outcome(fused_linear_softmax_xent, dict(case))  # the ranks agree
            wire.seen.clear()
            found[how] = outcome(fused_linear_softmax_xent, case)
        found[how, "wire"] = list(wire.seen)
    case = sliced(of_all, at, 3 * rank) | {"group": dist.group.WORLD, "vocab_size": N_CLASSES}
    found["padded"] = outcome(fused_linear_softmax_xent, case)
    found["order"] = order_of(sliced(of_all, at, 0) | {"group": dist.group.WORLD, "max_logits_bytes": 4600})
    return found


def order_of(case: dict[str, Any]) -> list[str]:
    """Products, collectives begun, and combinations, in time."""
    from softxent.cpu import shards as on_cpu
    from softxent.linear_rows import Products
    from softxent.parallel import linear, shards

    done: list[str] = []

    def noted(name: str, of: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return of(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Products, "logits", noted("product", Products.logits))
        patch.setattr(linear, "exchange", noted("exchange", shards.exchange))
        patch.setattr(on_cpu, "combine", noted("combine", on_cpu.combine))
        fused_linear_softmax_xent(**case)
    return done


two_ranks = ranks.run_once(2, other_ways)


def eight_rows() -> Found:
    return outcome(fused_linear_softmax_xent, eight())


def test_the_inputs_gradient_is_summed_as_asked() -> None:
    exact, of = eight_rows(), two_ranks()
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    for rank in range(2):
        torch.testing.assert_close(of[rank]["all_reduce"]["dinput"], exact["dinput"], **close)
        mine = exact["dinput"][4 * rank : 4 * rank + 4]
        torch.testing.assert_close(of[rank]["reduce_scatter"]["dinput"], mine, **close)
        for how in ("all_reduce", "partial", "reduce_scatter"):
            torch.testing.assert_close(of[rank][how]["loss"], exact["loss"], **close)
            dw = exact["dlinear_weight"][slice(20) if rank == 0 else slice(20, 37)]
            torch.testing.assert_close(of[rank][how]["dlinear_weight"], dw, **close)
    both = of[0]["partial"]["dinput"] + of[1]["partial"]["dinput"]
    torch.testing.assert_close(both, exact["dinput"], **close)
    assert not torch.allclose(of[0]["partial"]["dinput"], exact["dinput"])


def test_rows_of_the_weight_beyond_the_vocabulary_are_padding() -> None:
    exact, of = eight_rows(), two_ranks()[1]["padded"]
    torch.testing.assert_close(of["loss"], exact["loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of["dlinear_weight"][:17], exact["dlinear_weight"][20:], rtol=1e-12, atol=1e-12)
    assert of["dlinear_weight"].shape == (20, N_FEATURES) and not of["dlinear_weight"][17:].any()


def test_a_chunk_has_one_collective_under_the_product_of_the_next() -> None:
    order = two_ranks()[0]["order"]
    chunks = order.count("product")
    assert chunks > 2
    first, *middle, last = ["product", "exchange"], *[["product", "exchange", "combine"]] * (chunks - 1), ["combine"]
    assert order == [*first, *(name for step in middle for name in step), *last]
    for found in two_ranks():
        gathers = [sent for name, sent in found["all_reduce", "wire"] if "gather" in name]
        assert len(gathers) > 1 and sum(gathers) == 7 * 3 * 8  # rows that count, fields, bytes
        others = {how: [x for x in found[how, "wire"] if x[1] not in gathers] for how in ("all_reduce", "partial")}
        assert others == {"all_reduce": [("allreduce", 8 * N_FEATURES * 8)], "partial": []}
        whole = [x for x in found["reduce_scatter", "wire"] if x[1] not in gathers]
        assert whole == [(x, 4 * N_FEATURES * 8) for x in ("allgather_base", "reduce_scatter_base")]


def peaks(rank: int) -> dict[str, int]:
    """The most bytes that a step has at once, beside what it is given and returns."""
    n_rows, n_cols, n_features = 256, 4096, 8
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, n_features, generator=g).requires_grad_()
    w = torch.randn(n_cols, n_features, generator=g).requires_grad_()
    target = torch.randint(2 * n_cols, (n_rows,), generator=g)

    v = (torch.arange(n_rows) % 4 != 0).float()
    p = torch.rand(n_rows, n_cols, generator=g)

    def step(reduction: str, soft: bool) -> None:
        given: dict[str, Any] = {"reduction": reduction, "group": dist.group.WORLD, "max_logits_bytes": 1 << 20}
        loss = fused_linear_softmax_xent(x, w, p if soft else target, sample_weight=v, **given)
        torch.autograd.grad(loss.sum(), (x, w))

    cases = [(reduction, soft) for reduction in ("mean", "none") for soft in (False, True)]
    for case in cases:
        step(*case)  # the ranks agree
    return {f"{reduction} {soft}": peak_bytes(partial(step, reduction, soft)) for reduction, soft in cases}


def test_no_rank_has_logits_beyond_two_chunks() -> None:
    """Of 4 MiB of its logits."""
    gradients = 4 * (256 + 4096) * 8
    for found in ranks.run(2, peaks):
        for case, peak in found.items():
            assert peak <= (1 << 20) + gradients + (64 << 10), (case, peak)


R, S0, S1, ON_TP = Replicate(), Shard(0), Shard(1), (Replicate(), Shard(0))
MESHES: dict[str, tuple[tuple[Placement, ...], tuple[Placement, ...]]] = {  # of the input, of the weight
    "all rows": ((R,), (S0,)),
    "rows of the classes' dimension": ((S0,), (S0,)),
    "rows of another": ((S0, R), ON_TP),
    "rows of both": ((S0, S0), ON_TP),
    "rows of both, the other way": ((S0, S0), (S0, R)),
}


def on_mesh(case: dict[str, Any], of_input: tuple[Placement, ...], of_weight: tuple[Placement, ...]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (4,) if len(of_weight) == 1 else (2, 2))
    beside = tuple(R if w.is_shard() else p for p, w in zip(of_input, of_weight, strict=True))
    how = {"input": of_input, "linear_weight": of_weight, "linear_bias": of_weight}
    how |= {"target": beside, "sample_weight": beside}
    if case["target"].is_floating_point():
        how["target"] = tuple(S1 if w.is_shard() else p for p, w in zip(of_input, of_weight, strict=True))
    return {
        name: distribute_tensor(x, mesh, how.get(name, (R,) * mesh.ndim)) if isinstance(x, Tensor) else x
        for name, x in case.items()
    }


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def logprobs(rank: int) -> Found:
    return dict(zip(("logprobs", "entropy"), map(whole, of_tokens(on_mesh(eight(), (S0,), (S0,)))), strict=True))


def of_tokens(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return linear_logprobs(*(case[name] for name in ("input", "linear_weight", "target", "linear_bias")))


def infinite(rank: int) -> Tensor:
    """The mean of rows of which one has no chance, sharded over a mesh dimension of one rank."""
    mesh = init_device_mesh("cpu", (1, 4))
    x, w, b = torch.ones(4, 3), torch.ones(8, 3), torch.zeros(8)
    b[5] = -torch.inf
    target = torch.tensor([5, 1, 2, 3])
    placed = {"linear_weight": ON_TP, "linear_bias": ON_TP, "input": (S0, R), "target": (S0, R)}
    of = {"input": x, "linear_weight": w, "linear_bias": b, "target": target}
    given: dict[str, Any] = {name: distribute_tensor(y, mesh, placed[name]) for name, y in of.items()}
    loss: Tensor = whole(fused_linear_softmax_xent(**given))
    return loss


DTENSOR_CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": eight,
    "none": lambda: eight(reduction="none"),
    "everything": lambda: eight(weight=of_classes(), sample_weight=of_rows()[:8], **ALL),
    "probabilities": lambda: eight(target=probabilities()[:8], label_smoothing=0.1),
    "shifted sequences": lambda: (
        eight(shift=True)
        | {"input": layer()["input"][:8].view(4, 2, N_FEATURES), "target": layer()["target"][:8].view(4, 2)}
    ),
}


def on_meshes(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for how, placements in MESHES.items():
        for name, case in DTENSOR_CASES.items():
            for with_stats in (False, True):
                out = call_on(on_mesh(case(), *placements), with_stats)
                found[how, name, with_stats] = {key: whole(x) for key, x in out.items()}
    found["errors"], found["logprobs"], found["infinite"] = refused(rank), logprobs(rank), infinite(rank)
    return found


def refused(rank: int) -> dict[str, Any]:
    """What is raised, by the names of mistakes."""
    mesh, world = init_device_mesh("cpu", (4,)), {"group": dist.group.WORLD}
    case, at = eight(), [(0, 10), (10, 20), (20, 30), (30, 37)][rank]
    mine = sliced(case, at, 0) | world
    spread = on_mesh(case, (R,), (S0,))
    of_fsdp = {"linear_weight": spread["linear_weight"]}
    wrong_here = {"reduction": "average"} if rank == 2 else {}
    other_rows = {"target": case["target"].roll(rank)}  # as data parallelism has them
    halves = {"linear_weight": mine["linear_weight"].float()} if rank == 1 else {}
    sharded = {"input": distribute_tensor(case["input"], mesh, [S1])}
    calls: dict[str, dict[str, Any]] = {
        "the weight of FSDP": case | of_fsdp,
        "other rows": mine | other_rows,
        "wrong on one rank": mine | wrong_here,
        "another dtype": mine | halves,
        "a gap": sliced(case, at, 0) | world | {"vocab_size": 40},
        "a way of summing": mine | {"input_gradient": "none"},
        "no group": case | {"vocab_start": 3},
        "sharded features": spread | sharded,
        "a plain bias": spread | {"linear_bias": case["linear_bias"]},
        "a group beside DTensors": spread | world,
        "out of range": mine | {"target": case["target"].clamp(min=36) + 1},
        "out of range behind a shift": mine | {"target": torch.arange(8) * 7, "shift": True},
        "ids": {k: mine[k] for k in ("input", "linear_weight", "group")} | {"ids": torch.zeros(8, 2).long()},
        "few bytes": mine | {"max_logits_bytes": 100},
        "few bytes for backward": sliced(case | {"target": learned(probabilities()[:8])}, at, 0)
        | world
        | {"max_logits_bytes": 1500, "reduction": "none"},
        "a stat on one rank": mine | {"stats": ("lse",) if rank != 1 else ("perplexity",)},
        "summing without a group": case | {"input_gradient": "partial"},
        "summing of DTensors": spread | {"input_gradient": "partial"},
        "no gradient on one rank": mine,
    }
    found: dict[str, Any] = {}
    for name, given in calls.items():
        if given.get("group") is dist.group.WORLD:
            given = given | {"group": dist.new_group()}  # which has not agreed on anything
        function: Any = fused_linear_softmax_xent_with_stats if "stats" in given else fused_linear_softmax_xent
        function = linear_logprobs if "ids" in given else function
        try:
            with torch.set_grad_enabled(rank != 1 or name != "no gradient on one rank"):
                found[name] = function(**given)
        except Exception as error:
            found[name] = type(error), str(error)
    return found


def later_on(rank: int) -> dict[Any, Any]:
    """Calls that are right, of other slices on one of the 2 ranks than before."""
    found: dict[Any, Any] = {}
    cases: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("two heads", ((52, 51), (52, 52), (52, 51)), {}),
        ("padding", ((20, 17), (20, 20), (20, 17)), {"vocab_size": 37}),
    )
    for name, sizes, given in cases:
        for i, of_ranks in enumerate(sizes):
            n_classes = given.get("vocab_size", sum(of_ranks))
            g = torch.Generator().manual_seed(i)
            x, w = torch.randn(6, 4, generator=g), torch.randn(sum(of_ranks), 4, generator=g)
            target = torch.randint(n_classes, (6,), generator=g)
            at = slice(of_ranks[0]) if rank == 0 else slice(of_ranks[0], None)
            z = x @ w.T
            linear = fused_linear_softmax_xent(x, w[at], target, group=dist.group.WORLD, **given)
            logits = vocab_parallel_softmax_xent(z[:, at], target, group=None, **given)
            found[name, i] = linear, logits, F.cross_entropy(z[:, :n_classes], target)
    try:  # other slices of one vocabulary
        fused_linear_softmax_xent(x[:, :4], w[:10], target % 37, group=dist.group.WORLD, vocab_size=37)
    except RuntimeError as error:
        found["moved"] = str(error)
    return found


def test_slices_may_change_from_call_to_call() -> None:
    for found in ranks.run(2, later_on):
        assert re.search(r"holds 10 classes.*ranks agreed.*vocab_size=37", found.pop("moved"))
        for linear, logits, exact in found.values():
            torch.testing.assert_close((linear, logits), (exact, exact))


by_dtensors = ranks.run_once(4, on_meshes)


@pytest.mark.parametrize("name", DTENSOR_CASES)
@pytest.mark.parametrize("how", MESHES)
def test_dtensors_are_as_one_process(how: str, name: str) -> None:
    for with_stats in (False, True):
        exact = call_on(DTENSOR_CASES[name](), with_stats)
        for of_rank in by_dtensors():
            found = of_rank[how, name, with_stats]
            assert found.keys() == exact.keys()
            for key, value in found.items():
                torch.testing.assert_close(value, exact[key], rtol=1e-12, atol=1e-12)


def test_log_probabilities_of_dtensors_and_a_mean_that_is_infinite() -> None:
    exact = of_tokens(eight())
    for found in by_dtensors():
        torch.testing.assert_close(tuple(found["logprobs"].values()), exact)
        assert found["infinite"] == torch.inf


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("the weight of FSDP", RuntimeError, "linear_weight is a DTensor.*Under FSDP2"),
        ("other rows", RuntimeError, "target on rank 1"),
        ("wrong on one rank", (ValueError, RuntimeError), "average"),
        ("another dtype", RuntimeError, "float32"),
        ("a gap", ValueError, r"no rank holds the classes \[37, 40\)"),
        ("a way of summing", ValueError, "input_gradient must be one of"),
        ("no group", ValueError, "vocab_start is for classes that are spread over a group"),
        ("sharded features", NotImplementedError, "features of input are sharded"),
        ("a plain bias", RuntimeError, "linear_bias is a plain tensor"),
        ("a group beside DTensors", ValueError, "group is for plain tensors"),
        ("out of range", IndexError, "target 37 at row 0"),
        ("out of range behind a shift", IndexError, "target 42 at row 6"),
        ("ids", ValueError, "several ids of each token do not go with a group"),
        ("few bytes", ValueError, "max_logits_bytes=100 is less than one row needs"),
        ("few bytes for backward", ValueError, "max_logits_bytes=1500 is less than one row needs"),
        ("a stat on one rank", (ValueError, RuntimeError), "perplexity"),
        ("summing without a group", ValueError, "input_gradient is for classes that are spread over a group"),
        ("summing of DTensors", ValueError, "input_gradient is for plain tensors"),
        ("no gradient on one rank", RuntimeError, "whether gradients are recorded is False on rank 1"),
    ],
)
def test_a_mistake_is_told_on_every_rank(name: str, kind: Any, words: str) -> None:
    for of_rank in by_dtensors():
        raised, said = of_rank["errors"][name]
        assert issubclass(raised, kind) and re.search(words, said), (raised, said)

"""What ranks that share the classes owe each other: one collective, the same error on all, and no waiting in vain."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import ranks
from softxent import (
    vocab_parallel_softmax_xent,
    vocab_parallel_softmax_xent_with_stats,
)

SIZES = (20, 17, 0)
N_CLASSES, N_ROWS = 37, 9


def mine(rank: int) -> slice:
    start = sum(SIZES[:rank])
    return slice(start, start + SIZES[rank])


def rows(dtype: torch.dtype = torch.float32, n_rows: int = N_ROWS) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(11)
    return torch.randn(n_rows, N_CLASSES, generator=g).to(dtype), torch.randint(N_CLASSES, (n_rows,), generator=g)


GROUPS: list[Any] = [None]  # the last is the one of calls


def call(rank: int, n_rows: int = N_ROWS, **changed: Any) -> Any:
    """A call on rows, with some of its arguments changed."""
    logits, target = rows(n_rows=n_rows)
    given = {"local_logits": logits[:, mine(rank)].clone().requires_grad_(), "target": target, "group": GROUPS[-1]}
    function = vocab_parallel_softmax_xent_with_stats if "stats" in changed else vocab_parallel_softmax_xent
    return function(**(given | changed))


def on(rank: int, one: int, value: Any, other: Any = None) -> Any:
    return value if rank == one else other


def with_target(rank: int, one: int, row: int, value: int, n_rows: int = N_ROWS) -> Tensor:
    """The targets, of which one rank has one changed."""
    target = rows(n_rows=n_rows)[1]
    if rank == one or one < 0:
        target[row] = value
    return target


# The number of rows is one of its own for each, so that none was agreed on before.
ERRORS: dict[str, tuple[type[Exception], str, Callable[[int], Any]]] = {
    "a dtype": (
        RuntimeError,
        "the dtype of local_logits is torch.float64 on rank 1, and torch.float32 on rank 0",
        lambda r: call(r, 6, local_logits=rows(on(r, 1, torch.float64, torch.float32), 6)[0][:, mine(r)]),
    ),
    "a number of rows": (RuntimeError, r"the shape of rows is \(8,\) on rank 2", lambda r: call(r, on(r, 2, 8, 7))),
    "a reduction": (
        RuntimeError,
        "reduction is sum on rank 2",
        lambda r: call(r, 10, reduction=on(r, 2, "sum", "mean")),
    ),
    "a number": (
        RuntimeError,
        "options is {'z_loss': 0.2} on rank 1, and {'z_loss': 0.1} on rank 0",
        lambda r: call(r, 11, z_loss=on(r, 1, 0.2, 0.1)),
    ),
    "an option": (RuntimeError, "options is {} on rank 0|on rank 1", lambda r: call(r, 12, softcap=on(r, 1, 3.0))),
    "weights of one": (
        RuntimeError,
        "weight given is True on rank 1",
        lambda r: call(r, 13, weight=on(r, 1, torch.ones(17))),
    ),
    "stats": (RuntimeError, "stats is", lambda r: call(r, 14, stats=on(r, 1, ("lse",), ("entropy",)))),
    "targets": (
        RuntimeError,
        "the values of target on rank 1 are not those on rank 0.*alike",
        lambda r: call(r, 15, target=with_target(r, 1, 4, 3, 15)),
    ),
    "an argument that is wrong on one": (
        RuntimeError,
        r"rank 1 raised RuntimeError: label_smoothing must be between 0.0 and 1.0, got 2.0|^label_smoothing must be",
        lambda r: call(r, 16, label_smoothing=on(r, 1, 2.0, 0.5)),
    ),
    "a target of another shape on one": (
        (ValueError, RuntimeError),  # type: ignore[dict-item]
        "rank 2 raised ValueError: expected a target of shape|^expected a target of shape",
        lambda r: call(r, 17, target=rows(n_rows=on(r, 2, 16, 17))[1]),
    ),
    "slices that overlap": (
        ValueError,
        r"slices overlap: rank 1 holds \[18, 35\), rank 0 holds them to 20",
        lambda r: call(r, 18, vocab_start=(0, 18, 37)[r]),
    ),
    "slices with a gap": (
        ValueError,
        r"no rank holds the classes \[20, 21\) of 38: rank 1 holds \[21, 38\)",
        lambda r: call(r, 19, vocab_start=(0, 21, 38)[r], vocab_size=38),
    ),
    "slices that end too soon": (
        ValueError,
        r"no rank holds the classes \[37, 40\) of 40: the group of 3 ranks holds slices of \[20, 17, 0\]",
        lambda r: call(r, 20, vocab_size=40),
    ),
    "a vocab_start on one": (ValueError, "vocab_start .*rank 1", lambda r: call(r, 21, vocab_start=on(r, 1, 20))),
    "a target of no class": (
        IndexError,
        "the target at row 3 of rank 0 is out of bounds for 37 classes .* here it is 37",
        lambda r: call(r, 22, target=with_target(r, -1, 3, 37, 22)),
    ),
    "no classes": (
        IndexError,
        "no class to choose from",
        lambda r: call(r, 23, local_logits=torch.zeros(23, 0)),
    ),
    "create_graph": (
        RuntimeError,
        "would need collectives of its own",
        lambda r: call(r, 24).backward(create_graph=True),
    ),
    "torch.func": (
        RuntimeError,
        "do not go with torch.func transforms",
        lambda r: torch.func.vmap(lambda x: vocab_parallel_softmax_xent(x, torch.tensor([1, 2]), group=None))(
            torch.zeros(3, 2, SIZES[r])
        ),
    ),
    "meta tensors": (
        RuntimeError,
        "meta",
        lambda r: call(
            r,
            26,
            local_logits=torch.zeros(26, 5, device="meta"),
            target=torch.zeros(26, dtype=torch.int64, device="meta"),
        ),
    ),
    "a gradient of class weights": (
        RuntimeError,
        "no gradient with respect to weight",
        lambda r: call(r, 27, weight=torch.ones(SIZES[r], requires_grad=True)),
    ),
    "a group of another kind": (
        TypeError,
        "group must be a ProcessGroup or None, not str",
        lambda r: call(r, group="tp"),
    ),
    "a mesh": (
        TypeError,
        r"not DeviceMesh: pass mesh.get_group\(\)",
        lambda r: call(r, group=dist.device_mesh.init_device_mesh("cpu", (3,))),
    ),
}


def steps(rank: int) -> dict[str, Any]:
    """What goes over the wire, of calls whose shapes are agreed on."""
    logits, _ = rows()
    part = mine(rank)
    weight = torch.rand(N_CLASSES)[part]
    soft = {"target": logits.softmax(1)[:, part].contiguous()}
    every: dict[str, Any] = {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "every option": every,
        "every option and stat": every | {"stats": ("lse", "entropy", "target_logprob", "prediction", "correct")},
        "probabilities": soft | every,
        "probabilities and every stat": soft | every | {"stats": ("lse", "entropy", "prediction")},
        "float64": {"local_logits": logits[:, part].double().requires_grad_()},
        "bfloat16": {"local_logits": logits[:, part].bfloat16().requires_grad_()},
    }
    found = {}
    for name, given in kinds.items():
        given = given | {"vocab_size": N_CLASSES}
        first = call(rank, **given)
        with ranks.Collectives() as forward:
            out = call(rank, **given)
        with ranks.Collectives() as backward:
            torch.autograd.backward([x.sum() for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad])
        del first
        found[name] = forward.seen, backward.seen
    scale = torch.tensor(0.7, requires_grad=True)
    every["vocab_size"] = N_CLASSES
    call(rank, logit_scale=scale, vocab_size=N_CLASSES)
    with ranks.Collectives() as learned:
        call(rank, logit_scale=scale, vocab_size=N_CLASSES).backward()
    with ranks.Collectives() as asked:
        call(rank)
    found["no vocab_size"] = asked.seen, []
    with ranks.Collectives() as schedule:
        for i in range(3):
            call(rank, **(every | {"label_smoothing": 0.1 + 0.1 * i}))
    return found | {"a learned scale": learned.seen, "a schedule": schedule.seen}


def errors(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (_, _, provoke) in ERRORS.items():
        GROUPS.append(dist.new_group())  # which has not agreed on anything
        try:
            found[name] = provoke(rank)
        except Exception as error:
            found[name] = type(error), str(error)
        GROUPS.pop()
    # After calls that were agreed on, targets that no longer are the same.
    call(rank, 30)
    for name, row, value, one in (("later, of no class", 5, 99, 1), ("later, two", 7, on(rank, 0, 3, 25), rank)):
        try:
            found[name] = call(rank, 30, target=with_target(rank, one, row, value, 30))
        except Exception as error:
            found[name] = type(error), str(error)
    found["afterwards"] = call(rank).item()
    return found


def not_a_member(rank: int) -> Any:
    pair = dist.new_group([0, 1])
    if rank < 2:
        return None
    try:
        return call(rank, group=pair)
    except RuntimeError as error:
        return str(error)


def others(rank: int) -> dict[str, Any]:
    part = mine(rank)
    found: dict[str, Any] = {}

    # Megatron-LM's report 7464: smoothing, where the softmax of one rank's classes underflows
    apart, target = torch.randn(6, N_CLASSES), torch.tensor([0, 3, 25, 36, 19, 20])
    apart = torch.randn(6, N_CLASSES, generator=torch.Generator().manual_seed(2))
    apart[:, 20:] -= 200
    local = apart[:, part].clone().requires_grad_()
    loss = vocab_parallel_softmax_xent(local, target, group=None, label_smoothing=0.1)
    loss.backward()
    found["apart"] = loss.detach(), local.grad

    # the gradient over the logits
    logits, target = rows()
    local = logits[:, part].clone().requires_grad_()
    plain = call(rank)
    over = local * 1
    loss = vocab_parallel_softmax_xent(over, target, group=None, inplace=True)
    (dover,) = torch.autograd.grad(loss, over, retain_graph=True)
    found["in place"] = (
        loss.detach() == plain.detach(),
        dover.data_ptr() == over.data_ptr() or dover.numel() == 0,
        dover,
    )
    try:
        torch.autograd.grad(loss, over)
    except RuntimeError as error:
        found["in place again"] = str(error)

    # a graph that is kept
    local = logits[:, part].clone().requires_grad_()
    loss = vocab_parallel_softmax_xent(local, target, group=None)
    found["twice"] = [torch.autograd.grad(loss, local, retain_graph=True)[0] for _ in range(2)]

    # compiled: left to eager mode
    local = logits[:, part].clone().requires_grad_()
    compiled = torch.compile(lambda x: vocab_parallel_softmax_xent(x * 2, target, group=None) * 3, backend="eager")
    loss = compiled(local)
    loss.backward()
    found["compiled"] = loss.detach(), local.grad

    # a confident model
    sure, target = torch.zeros(4, N_CLASSES), torch.tensor([0, 19, 20, 36])
    sure.scatter_(1, target[:, None], 30.0)
    local = sure[:, part].clone().requires_grad_()
    loss = vocab_parallel_softmax_xent(local, target, group=None, reduction="none")
    loss.sum().backward()
    found["sure"] = loss.detach(), local.grad
    with torch.no_grad():
        found["no gradient"] = vocab_parallel_softmax_xent(local, target, group=None).requires_grad
    return found


def all_of_it(rank: int) -> dict[str, Any]:
    return {
        "steps": steps(rank),
        "errors": errors(rank),
        "others": others(rank),
        "not a member": not_a_member(rank),
    }


of_ranks = ranks.run_once(3, all_of_it)


def of(kind: str) -> list[Any]:
    return [found[kind] for found in of_ranks()]


@pytest.mark.parametrize(
    "kind, values, itemsize",
    (
        ("plain", 3, 4),
        ("every option", 6, 4),
        ("every option and stat", 8, 4),
        ("probabilities", 4, 4),
        ("probabilities and every stat", 6, 4),
        ("float64", 3, 8),
        ("bfloat16", 3, 4),
    ),
)
def test_one_collective_of_few_values_a_row(kind: str, values: int, itemsize: int) -> None:
    for found in of("steps"):
        forward, backward = found[kind]
        assert [size for _, size in forward] == [values * N_ROWS * itemsize], forward
        assert backward == []


def test_a_learned_scale_gathers_one_number_in_backward() -> None:
    for found in of("steps"):
        assert [size for _, size in found["a learned scale"]] == [3 * N_ROWS * 4, 4]


def test_a_schedule_is_not_agreed_on_anew() -> None:
    for found in of("steps"):
        assert [size for _, size in found["a schedule"]] == 3 * [6 * N_ROWS * 4]


@pytest.mark.parametrize("name", ERRORS)
def test_every_rank_raises(name: str) -> None:
    expected, message, _ = ERRORS[name]
    for found in of("errors"):
        kind, said = found[name]
        assert issubclass(kind, expected), (kind, said)
        with pytest.raises(expected, match=message):
            raise kind(said)


def test_targets_that_part_later_are_seen_by_all() -> None:
    for found in of("errors"):
        kind, said = found["later, of no class"]
        assert kind is IndexError and "the target at row 5 of rank 1 is out of bounds for 37 classes" in said
        kind, said = found["later, two"]
        assert kind is ValueError and "the ranks' targets differ: ranks [0, 1] all hold that of row 7" in said


def test_after_an_error_the_ranks_are_together() -> None:
    exact = F.cross_entropy(*rows())
    assert all(found["afterwards"] == pytest.approx(exact.item(), rel=1e-6) for found in of("errors"))


def test_a_rank_outside_the_group_is_told() -> None:
    assert of("not a member")[2] == "this rank is not in the group"


def exactly(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = logits.double().requires_grad_()
    loss = F.cross_entropy(x, target, **options)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def test_smoothing_where_the_softmax_of_a_rank_underflows() -> None:
    """NVIDIA/Megatron-LM#7464: there log(0) of the rank's own softmax, and a loss that differs from rank to rank."""
    apart = torch.randn(6, N_CLASSES, generator=torch.Generator().manual_seed(2))
    apart[:, 20:] -= 200
    exact, grad = exactly(apart, torch.tensor([0, 3, 25, 36, 19, 20]), label_smoothing=0.1)
    for rank, found in enumerate(of("others")):
        loss, local = found["apart"]
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(local.double(), grad[:, mine(rank)], rtol=1e-5, atol=1e-8)


def test_the_gradient_may_go_over_the_logits() -> None:
    _, grad = exactly(*rows())
    for rank, found in enumerate(of("others")):
        same, over, dlogits = found["in place"]
        assert same and over
        torch.testing.assert_close(dlogits.double(), grad[:, mine(rank)], rtol=1e-5, atol=1e-8)
        assert "second backward pass after inplace=True" in found["in place again"]


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    for found in of("others"):
        assert torch.equal(*found["twice"])


def test_torch_compile_leaves_it_to_eager_mode() -> None:
    logits, target = rows()
    exact, grad = exactly(logits * 2, target)
    for rank, found in enumerate(of("others")):
        loss, local = found["compiled"]
        torch.testing.assert_close(loss.double(), 3 * exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(local.double(), 6 * grad[:, mine(rank)], rtol=1e-5, atol=1e-7)


def test_a_confident_row_keeps_its_digits() -> None:
    target = torch.tensor([0, 19, 20, 36])
    sure = torch.zeros(4, N_CLASSES).scatter_(1, target[:, None], 30.0)
    rest = 36 * math.exp(-30)
    grad = torch.full_like(sure, math.exp(-30)).scatter_(1, target[:, None], -rest) / (1 + rest)
    for rank, found in enumerate(of("others")):
        loss, local = found["sure"]
        torch.testing.assert_close(loss, torch.full((4,), math.log1p(rest)), rtol=1e-5, atol=0)
        torch.testing.assert_close(local, grad[:, mine(rank)], rtol=1e-5, atol=0)
        assert not found["no gradient"]


def test_without_torch_distributed_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = rows()
    with pytest.raises(RuntimeError, match="init_process_group"):
        vocab_parallel_softmax_xent(logits, target, group=None)

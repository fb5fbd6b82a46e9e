"""Logits whose classes are spread over 3 processes, and over 2 of them: 20, 17 and 0 classes, against one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from softxent import (
    dispatch,
    fused_softmax_xent,
    fused_softmax_xent_with_stats,
    vocab_parallel_softmax_xent,
    vocab_parallel_softmax_xent_with_stats,
)

N_CLASSES, N_ROWS = 37, 9
INDEX_STATS, SOFT_STATS = (
    ("lse", "entropy", "target_logprob", "prediction", "correct"),
    ("lse", "entropy", "prediction"),
)


def rows(dtype: torch.dtype = torch.float64, spread: float = 3.0, **given: Any) -> dict[str, Any]:
    """The arguments of a call on all classes."""
    g = torch.Generator().manual_seed(7)
    logits = (torch.randn(N_ROWS, N_CLASSES, generator=g, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(N_CLASSES, (N_ROWS,), generator=g)
    target[2], target[4], target[5] = -100, 19, 20  # the last and first of two slices
    return {"input": logits, "target": target} | given


def of_classes(seed: int = 1) -> Tensor:
    w = torch.rand(N_CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    w[3] = 0
    return w


def of_rows(zero: bool = True) -> Tensor:
    v = torch.rand(N_ROWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    v[6] = 0 if zero else 0.5
    return v


def probabilities() -> Tensor:
    return torch.randn(N_ROWS, N_CLASSES, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(1)


def learned(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).requires_grad_()


def masked() -> Tensor:
    """Logits with classes that are -inf, a slice of nothing else, and rows that have no softmax."""
    x: Tensor = rows()["input"].clone()
    x[0, 20:] = x[1, :20] = -torch.inf
    x[1, 25] = -torch.inf
    x[2, 5] = torch.nan  # of the ignored row
    x[3, 5], x[7, 30], x[8] = torch.nan, torch.inf, -torch.inf
    return x


def image(c: Tensor) -> Tensor:
    """[2, classes, 2, 2] of rows."""
    return c[:8].reshape(2, 2, 2, -1).movedim(-1, 1)


ALL: dict[str, Any] = {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 1.3}
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": rows,
    "sum": lambda: rows(reduction="sum"),
    "none": lambda: rows(reduction="none"),
    "another ignore_index": lambda: rows(ignore_index=19) | {"target": rows()["target"].clamp(min=0)},
    "int32": lambda: rows() | {"target": rows()["target"].int()},
    "smoothing": lambda: rows(label_smoothing=0.3),
    "smoothing alone": lambda: rows(label_smoothing=1.0),
    "weight": lambda: rows(weight=of_classes()),
    "weight and smoothing": lambda: rows(weight=of_classes(), label_smoothing=0.2),
    "weight, none": lambda: rows(weight=of_classes(), reduction="none", z_loss=0.1),
    "z_loss": lambda: rows(z_loss=0.02),
    "softcap": lambda: rows(softcap=3.0),
    "scale": lambda: rows(logit_scale=0.7),
    "a learned scale": lambda: rows(logit_scale=learned(0.7)),
    "a learned scale, capped": lambda: rows(logit_scale=learned(0.7), softcap=3.0, label_smoothing=0.1),
    "sample_weight": lambda: rows(sample_weight=of_rows()),
    "a learned sample_weight": lambda: rows(sample_weight=learned(of_rows()), weight=of_classes()),
    "normalizer": lambda: rows(normalizer=5.0),
    "a learned normalizer": lambda: rows(normalizer=learned(5.0)),
    "everything": lambda: rows(weight=of_classes(), sample_weight=of_rows(), **ALL),
    "probabilities": lambda: rows(target=probabilities()),
    "learned probabilities": lambda: rows(target=learned(probabilities()), weight=of_classes(), label_smoothing=0.1),
    "probabilities and everything": lambda: rows(
        target=learned(probabilities()), weight=of_classes(), sample_weight=of_rows(), **ALL
    ),
    "probabilities, none": lambda: rows(target=probabilities(), reduction="none"),
    "float32": lambda: rows(torch.float32, label_smoothing=0.1),
    "bfloat16": lambda: rows(torch.bfloat16, loss_dtype=torch.float32, z_loss=0.01),
    "float16": lambda: rows(torch.float16),
    "masked": lambda: rows(input=masked(), reduction="none"),
    "masked, smoothed": lambda: rows(input=masked(), reduction="none", label_smoothing=0.1, weight=of_classes()),
    "one row": lambda: {"input": rows()["input"][0], "target": rows()["target"][0]},
    "images": lambda: {"input": image(rows()["input"]), "target": image(rows()["target"][:, None])[:, 0]},
    "no rows": lambda: {"input": rows()["input"][:0], "target": rows()["target"][:0]},
    "all ignored": lambda: rows() | {"target": torch.full((N_ROWS,), -100)},
}


# What each rank holds: the classes of `at`, and behind them padding.
SLICINGS: dict[str, list[dict[str, Any]]] = {
    "three": [{"at": (0, 20)}, {"at": (20, 37)}, {"at": (37, 37)}],
    "two": [{"at": (0, 20)}, {"at": (20, 37)}],
    "in another order": [
        {"at": (25, 37), "vocab_start": 25},
        {"at": (0, 12), "vocab_start": 0},
        {"at": (12, 25), "vocab_start": 12},
    ],
    "padded": [
        {"at": (0, 20), "vocab_size": 37},
        {"at": (20, 37), "padding": 3, "vocab_size": 37},
        {"at": (0, 0), "padding": 4, "vocab_size": 37},
    ],
}
Found = dict[str, Tensor]


def class_dim(x: Tensor) -> int:
    return min(1, x.dim() - 1)


def part(x: Tensor, dim: int, at: tuple[int, int], padding: int, fill: float = torch.nan) -> Tensor:
    """The classes of a slice, and padding."""
    mine = x.detach().narrow(dim, at[0], at[1] - at[0])
    shape = [*mine.shape[:dim], padding, *mine.shape[dim + 1 :]]
    return torch.cat([mine, torch.full(shape, fill, dtype=x.dtype)], dim).requires_grad_(x.requires_grad)


def sliced(case: dict[str, Any], at: tuple[int, int], padding: int = 0, **place: int) -> dict[str, Any]:
    """The arguments of a rank."""
    x, target, weight = case["input"], case["target"], case.get("weight")
    case = {name: value for name, value in case.items() if name != "input"} | place
    case["local_logits"] = part(x, class_dim(x), at, padding)
    if target.is_floating_point():
        case["target"] = part(target, class_dim(x), at, padding)
    if weight is not None:
        case["weight"] = part(weight, 0, at, padding)
    return case


def cotangent(name: str, like: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(len(name))
    return torch.randn(like.shape, generator=g, dtype=torch.float64).to(like.dtype)


def outcome(call: Callable[..., Any], logits: str, case: dict[str, Any]) -> Found:
    """The loss, the stats and the gradients of a call. logits: their name among its arguments."""
    case[logits] = case[logits].detach().clone().requires_grad_()
    for x in case.values():
        if isinstance(x, Tensor):
            x.grad = None
    out = call(**case)
    found = {"loss": out} if isinstance(out, Tensor) else {k: x for k, x in out._asdict().items() if x is not None}
    differentiable = {name: x for name, x in found.items() if x.requires_grad}
    torch.autograd.backward(list(differentiable.values()), [cotangent(*pair) for pair in differentiable.items()])
    grads = {name: x.grad for name, x in case.items() if isinstance(x, Tensor) and x.grad is not None}
    found = {name: x.detach() for name, x in found.items()}
    return found | {"d" + name.replace(logits, "input"): x for name, x in grads.items()}


def in_one_process(name: str, with_stats: bool) -> Found:
    case = CASES[name]()
    if with_stats:
        stats = SOFT_STATS if case["target"].is_floating_point() else INDEX_STATS
        return outcome(fused_softmax_xent_with_stats, "input", case | {"stats": stats})
    return outcome(fused_softmax_xent, "input", case)


def of_rank(name: str, with_stats: bool, slicing: dict[str, Any], group: Any) -> Found:
    case = CASES[name]()
    soft = case["target"].is_floating_point()
    case = sliced(case, **slicing) | {"group": group}
    if with_stats:
        case["stats"] = SOFT_STATS if soft else INDEX_STATS
        return outcome(vocab_parallel_softmax_xent_with_stats, "local_logits", case)
    return outcome(vocab_parallel_softmax_xent, "local_logits", case)


def all_cases(rank: int, names: tuple[str, ...], slicings: tuple[str, ...]) -> dict[tuple[str, str, bool], Found]:
    groups = {"two": dist.new_group([0, 1])}
    found = {}
    for how in slicings:
        if rank < len(SLICINGS[how]):
            for name in names:
                for with_stats in (False, True):
                    found[how, name, with_stats] = of_rank(name, with_stats, SLICINGS[how][rank], groups.get(how))
    return found


KERNEL_CASES = "bfloat16", "everything", "learned probabilities", "no rows"
by_torch = ranks.run_once(3, all_cases, tuple(CASES), tuple(SLICINGS))


def with_kernels(rank: int) -> dict[Any, Any]:
    """The cases, and a second call that may not wait for the device."""
    found: dict[Any, Any] = dict(all_cases(rank, KERNEL_CASES, ("padded",)))
    names = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    kept = {name: getattr(torch.Tensor, name) for name in names}

    def raises(self: Tensor, *_: Any, **__: Any) -> None:
        raise AssertionError("a value was read from the device")

    logits, target = (rows(torch.float32)[name] for name in ("input", "target"))
    local = logits[:, slice(*SLICINGS["three"][rank]["at"])].clone().requires_grad_()
    weight = torch.ones(local.shape[1])
    given: dict[str, Any] = {"group": None, "vocab_size": N_CLASSES, "logit_scale": torch.tensor(0.1), "softcap": 9.0}
    for _ in range(2):  # the first is agreed on, which waits
        loss = vocab_parallel_softmax_xent(local, target, weight, **given)
        loss.backward()
        for name in names:
            setattr(torch.Tensor, name, raises)
    for name, method in kept.items():
        setattr(torch.Tensor, name, method)
    return found


by_kernels = ranks.run_once(3, with_kernels, interpret=True)


@pytest.fixture
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, too."""
    monkeypatch.setattr(dispatch, "INTERPRET", False)


def compare(of_ranks: list[Any], how: str, name: str, with_stats: bool, exact: Found) -> None:
    """All of every rank, where gradients of slices make up those of the whole."""
    x = CASES[name]()["input"]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 3e-3}[x.dtype]
    of = [found[how, name, with_stats] for found in of_ranks[: len(SLICINGS[how])]]
    for found, slicing in zip(of, SLICINGS[how], strict=True):
        assert found.keys() == exact.keys()
        for key, value in found.items():
            expected = exact[key]
            if key in ("dinput", "dtarget"):
                expected = part(expected, class_dim(x), slicing["at"], slicing.get("padding", 0), fill=0)
            elif value.is_floating_point():
                assert value.numpy().tobytes() == of[0][key].numpy().tobytes(), f"{key}: ranks differ"
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("how", SLICINGS)
@pytest.mark.parametrize("name", CASES)
def test_every_option_is_that_of_one_process(how: str, name: str, torch_operations: None) -> None:
    for with_stats in (False, True):
        compare(by_torch(), how, name, with_stats, in_one_process(name, with_stats))


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_so_it_is_by_the_kernels(name: str, torch_operations: None) -> None:
    for with_stats in (False, True):
        compare(by_kernels(), "padded", name, with_stats, in_one_process(name, with_stats))

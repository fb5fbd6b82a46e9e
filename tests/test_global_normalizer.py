"""A language model whose rows are spread over ranks, by batch or time, has the loss and gradients of one process.

Each number of ranks is started once, and tries everything: a process takes seconds to begin.
"""

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ranks import Collectives, run
from softxent import dispatch, fused_linear_softmax_xent, fused_softmax_xent, global_normalizer

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
N_CLASSES = 37
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}
SPLITS = {"batch": 0, "time": 1}
LOSSES = ("logits", "linear")
ONCE = ("accumulated", "page", "compiled")
WRAPPERS = ("ddp", "fully_shard", "fully_shard, summed", "by hand")


class LanguageModel(nn.Module):
    """Of each position by itself, so that its rows may be spread in any way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(N_CLASSES, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, N_CLASSES)

    def forward(self, tokens: Tensor, labels: Tensor, loss: str, **options: Any) -> Tensor:
        x = torch.tanh(self.hidden(self.embedding(tokens)))
        if loss == "linear":
            return fused_linear_softmax_xent(x, self.head.weight, labels, self.head.bias, **options)
        return fused_softmax_xent(self.head(x).flatten(0, 1), labels.flatten(), **options)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels that are shifted already, and class weights. The first sequences are prompts to their end."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(N_CLASSES, (7, 11), generator=generator)
    prompt = torch.tensor([11, 11, 11, 4, 9, 1, 6])
    known = tokens.masked_fill(torch.arange(11) < prompt[:, None], -100)
    return tokens, F.pad(known, (0, 1), value=-100)[:, 1:], torch.rand(N_CLASSES, generator=generator) + 0.5


def parts(n: int, size: int) -> list[int]:
    """Ragged, and where there are three the second has nothing."""
    return [n - 2, 2] if size == 2 else [3, 0, n - 3]


def gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for p in model.parameters():
        assert p.grad is not None
        found.append(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def everything(rank: int) -> dict[tuple[str, ...], float]:
    """By split, loss, wrapper and class weights: the largest relative difference from one process with all rows."""
    dispatch.INTERPRET = False
    size = dist.get_world_size()
    tokens, labels, weight = data()
    torch.manual_seed(1)
    original = LanguageModel()
    found: dict[tuple[str, ...], float] = {}
    for split, dim in SPLITS.items():
        mine, target = (x.split(parts(x.shape[dim], size), dim)[rank] for x in (tokens, labels))
        for loss in LOSSES:
            for weights in (None, weight):
                whole = copy.deepcopy(original)
                expected = whole(tokens, labels, loss, weight=weights, **OPTIONS)
                expected.backward()
                for wrapper in WRAPPERS:
                    model, how = wrapped(copy.deepcopy(original), wrapper, size)
                    n = global_normalizer(target, weights, gradients=how)
                    ours = model(mine, target, loss, weight=weights, normalizer=n, **OPTIONS)
                    ours.backward()
                    if wrapper == "by hand":
                        for p in model.parameters():
                            dist.all_reduce(p.grad)
                    value = ours.detach().clone()
                    dist.all_reduce(value)
                    differences = [difference(value / size if how == "mean" else value, expected.detach())]
                    differences += map(difference, gradients(model), gradients(whole))
                    found[split, loss, wrapper, "weights" if weights is not None else ""] = max(differences)
    found |= accumulated(rank, original) | as_the_page_does_it() | compiled(target, weight)
    return found | one_small_collective(target, weight) | bad_input(rank, target)


def wrapped(model: nn.Module, wrapper: str, size: int) -> tuple[nn.Module, str]:
    """And what becomes of the gradients of the ranks."""
    if wrapper == "ddp":
        return DistributedDataParallel(model), "mean"
    if wrapper == "by hand":
        return model, "sum"
    sharded = fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    assert isinstance(sharded, LanguageModel)
    if wrapper == "fully_shard":
        return sharded, "mean"
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has nothing else
    return sharded, "sum"


def accumulated(rank: int, original: nn.Module) -> dict[tuple[str, ...], float]:
    """Two micro-batches of different size: one count of both, and one exchange of gradients."""
    tokens, labels, _ = data()
    size = dist.get_world_size()
    whole = copy.deepcopy(original)
    whole(tokens, labels, "linear").backward()
    mine, target = (x.split(parts(x.shape[1], size), 1)[rank] for x in (tokens, labels))
    model = DistributedDataParallel(copy.deepcopy(original))
    n = global_normalizer(target)
    with model.no_sync():
        model(mine[:5], target[:5], "linear", normalizer=n).backward()
    model(mine[5:], target[5:], "linear", normalizer=n).backward()
    return {("accumulated",): max(map(difference, gradients(model), gradients(whole)))}


def compiled(target: Tensor, weight: Tensor) -> dict[tuple[str, ...], float]:
    """In one graph with the loss."""
    if dist.get_world_size() > 2:  # it takes seconds to begin
        return {("compiled",): 0.0}
    logits = torch.randn(target.numel(), N_CLASSES, generator=torch.Generator().manual_seed(dist.get_rank()))

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        n = global_normalizer(target, weight)
        return fused_softmax_xent(logits, target.flatten(), weight, normalizer=n)

    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    return {("compiled",): difference(graph(logits, target), loss(logits, target))}


def as_the_page_does_it() -> dict[tuple[str, ...], float]:
    """docs/scaling.md: its rows by batch, and by time."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    names["loss"].backward()
    whole = copy.deepcopy(names["model"])
    whole.zero_grad()
    fused_softmax_xent(whole(names["tokens"]).flatten(0, 1), names["labels"].flatten()).mul(2).backward()
    return {("page",): max(map(difference, gradients(names["model"]), gradients(whole)))}


def one_small_collective(target: Tensor, weight: Tensor) -> dict[tuple[str, ...], float]:
    with Collectives() as seen:
        global_normalizer(target)
        global_normalizer(target, weight)
    return {("collectives",): len(seen.seen), ("bytes",): sum(n for _, n in seen.seen)}


def bad_input(rank: int, target: Tensor) -> dict[tuple[str, ...], float]:
    """A rank that is not in the group says so, and no one waits."""
    first = dist.new_group([0])
    if rank == 0:
        return {("alone",): float(global_normalizer(target, group=first)) - float((target != -100).sum())}
    with pytest.raises(RuntimeError, match="this rank is not in the group"):
        global_normalizer(target, group=first)
    return {}


@pytest.fixture(scope="module", params=[2, 3])
def differences(request: pytest.FixtureRequest) -> list[dict[tuple[str, ...], float]]:
    return run(request.param, everything)


def test_loss_and_gradients_are_those_of_one_process(differences: list[dict[tuple[str, ...], float]]) -> None:
    for found in differences:
        cases = {case: value for case, value in found.items() if case[0] in (*SPLITS, *ONCE)}
        assert len(cases) == 2 * len(SPLITS) * len(LOSSES) * len(WRAPPERS) + len(ONCE)
        assert {case: value for case, value in cases.items() if not value <= 1e-6} == {}


def test_it_is_one_all_reduce_of_one_number(differences: list[dict[tuple[str, ...], float]]) -> None:
    for found in differences:
        assert found[("collectives",)] == 2 and found[("bytes",)] == 2 * 8, "of the two that were made"


def test_a_group_counts_its_own_rows(differences: list[dict[tuple[str, ...], float]]) -> None:
    assert differences[0][("alone",)] == 0


def test_without_a_process_group_it_is_this_processs() -> None:
    _, labels, weight = data()
    logits = torch.randn(*labels.shape, N_CLASSES).flatten(0, 1)
    y = labels.flatten()
    assert global_normalizer(labels) == (labels != -100).sum()
    for options in ({}, {"weight": weight}, {"ignore_index": int(labels.max())}):
        kept = y.masked_fill(y == -100, options.get("ignore_index", -100))
        n = global_normalizer(kept, **options)
        assert n.dtype == torch.float64 and n.dim() == 0
        torch.testing.assert_close(
            fused_softmax_xent(logits, kept, normalizer=n, **options), F.cross_entropy(logits, kept, **options)
        )
    narrow = torch.tensor([0, 156, 156, 3], dtype=torch.uint8)
    assert global_normalizer(narrow) == 4 and global_normalizer(narrow, ignore_index=156) == 2
    nothing = torch.full((4,), -100)
    assert global_normalizer(nothing) == 0 and global_normalizer(nothing, weight).isnan()
    with torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert global_normalizer(torch.zeros(1001, dtype=torch.int64)) == 1001
        finally:
            torch.set_default_dtype(torch.float32)


def test_bad_arguments_say_what_is_expected() -> None:
    with pytest.raises(RuntimeError, match=r"expected class indices, got torch.float32: a mean over probabilities"):
        global_normalizer(torch.rand(4, 3))
    with pytest.raises(ValueError, match="gradients must be 'mean' or 'sum', got 'average'"):
        global_normalizer(torch.zeros(4, dtype=torch.int64), gradients="average")
    mesh = SimpleNamespace(get_group=lambda: None)
    with pytest.raises(
        TypeError, match="group must be a ProcessGroup or None, not SimpleNamespace: pass its get_group"
    ):
        global_normalizer(torch.zeros(4, dtype=torch.int64), group=mesh)

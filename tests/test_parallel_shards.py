"""The parts of a class-parallel loss, all shards in one process: their sums, what these come to, and the gradients."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn import functional as F

from bench.traffic import counted
from emulated_cases import slice_of
from softxent import fused_linear_softmax_xent, fused_softmax_xent, reference, vocab_parallel_softmax_xent
from softxent.options import Inputs, Options, Stats
from softxent.parallel.shards import Shard, fields_of, implementation

STATS = ("lse", "entropy", "target_logprob", "prediction")
SIZES = ((20, 17, 0), (1, 1, 1), (1300, 1501, 0, 7))


def shards_of(sizes: tuple[int, ...]) -> list[Shard]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [Shard(start, n_cols, sum(sizes), max(sizes), None) for start, n_cols in zip(starts, sizes, strict=True)]


def in_parts(
    whole: Inputs, options: Options, sizes: tuple[int, ...], given: tuple[Tensor, Stats], wanted: tuple[str, ...]
) -> list[Any]:
    """(loss, stats, gradient of the logits, gradient of probabilities) as each shard has them, gradients of all."""
    shards = shards_of(sizes)
    parts = [slice_of(whole, shard) for shard in shards]
    module, fields = implementation(whole.logits), fields_of(whole, options, wanted)
    assert len(fields) <= (8 if wanted else 6)
    gathered = torch.stack(
        [module.sums(part, options, shard, fields) for part, shard in zip(parts, shards, strict=True)]
    )
    found: list[Any] = []
    dlogits, dtarget = [], []
    for part, shard in zip(parts, shards, strict=True):
        loss, stats, row = module.combine(gathered, part, options, shard, fields, wanted)
        dx = module.gradient_like(part.logits, part.logits.dtype)
        soft = part.target.is_floating_point()
        dt = module.gradient_like(part.logits, part.target.dtype) if soft else None
        module.gradient(row, *given, part, options, shard, dx, dt)
        found.append((loss, stats))
        dlogits.append(dx)
        dtarget.append(dt)
    soft = whole.target.is_floating_point()
    return [*found, torch.cat(dlogits, 1), torch.cat([x for x in dtarget if x is not None], 1) if soft else None]


def compare(
    whole: Inputs, options: Options, sizes: tuple[int, ...], tolerance: float, wanted: tuple[str, ...] = STATS
) -> None:
    """With the formula in float64. A row's sample weight is in the incoming gradient, and not in the loss."""
    values: list[Any] = [x.double().clone() if x is not None and x.is_floating_point() else x for x in whole]
    exact = Inputs(*values)
    exact = exact._replace(logits=exact.logits.requires_grad_())
    soft = whole.target.is_floating_point()
    if soft:
        exact = exact._replace(target=exact.target.requires_grad_())
        wanted = tuple(name for name in wanted if name != "target_logprob")
    acc = torch.promote_types(whole.logits.dtype, torch.float32)
    g = torch.Generator().manual_seed(5)
    dloss, *dstats = torch.randn(4, len(whole.logits), generator=g, dtype=torch.float64).to(whole.logits.device)
    v = torch.ones_like(dloss) if exact.sample_weight is None else exact.sample_weight
    loss, stats = reference.row_loss(exact, options), reference.row_stats(exact, options)
    pairs = [(loss, dloss)] + [(getattr(stats, n), d) for n, d in zip(STATS, dstats, strict=False) if n in wanted]
    total = sum((y * dy).sum() for y, dy in pairs)
    assert isinstance(total, Tensor)
    total.backward()
    incoming = Stats(**{n: d.to(acc) for n, d in zip(STATS[:3], dstats, strict=True) if n in wanted})
    *of_shards, dlogits, dtarget = in_parts(whole, options, sizes, ((dloss * v).to(acc), incoming), wanted)
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "equal_nan": True, "check_dtype": False}
    for of_loss, of_stats in of_shards:
        torch.testing.assert_close(of_loss * v.to(acc), loss.detach(), **close)
        for name in wanted:
            torch.testing.assert_close(getattr(of_stats, name), getattr(stats, name).detach(), **close)
    for made, expected in ((dlogits, exact.logits.grad), (dtarget, exact.target.grad if soft else None)):
        if made is not None:
            assert expected is not None
            torch.testing.assert_close(made, expected.to(made.dtype), **close)


def rows(n_cols: int, dtype: torch.dtype, soft: bool, n_rows: int = 4) -> Inputs:
    g = torch.Generator().manual_seed(n_cols)
    logits = (torch.randn(n_rows, n_cols, generator=g) * 3).to(dtype)
    target: Tensor = torch.randint(n_cols, (n_rows,), generator=g)
    target[1] = -100
    if soft:
        target = torch.rand(n_rows, n_cols, generator=g)
    weight = torch.rand(n_cols, generator=g)
    weight[0] = 0
    return Inputs(logits, target, weight, torch.tensor([1.0, 2.0, 0.0, 0.5][:n_rows]))


@pytest.mark.parametrize("soft", (False, True), ids=("classes", "probabilities"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_shards_come_to_the_whole(
    sizes: tuple[int, ...], dtype: torch.dtype, soft: bool, path: str, device: torch.device
) -> None:
    values: list[Any] = [x if x is None else x.to(device) for x in rows(sum(sizes), dtype, soft)]
    whole = Inputs(*values)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    compare(whole, Options(label_smoothing=0.1, z_loss=0.01, softcap=5.0, logit_scale=0.8), sizes, tolerance)
    compare(whole._replace(weight=None, sample_weight=None), Options(), sizes, tolerance, ())


@pytest.mark.parametrize("soft", (False, True), ids=("classes", "probabilities"))
@pytest.mark.parametrize("gap", (12, 30))
def test_a_confident_row_keeps_its_digits(gap: int, soft: bool, path: str, device: torch.device) -> None:
    """Of a largest logit, the target or not, `gap` ahead of the other 36: -log p and the entropy are not lost."""
    z = torch.zeros(3, 37, device=device)
    z[:, 25] = gap
    target: Tensor = torch.tensor([25, 30, 0], device=device)
    if soft:
        target = F.one_hot(target, 37).float()
    rest = 36 * math.exp(-gap)
    entropy = math.log1p(rest) + rest / (1 + rest) * gap
    whole = Inputs(z, target)
    zero = torch.zeros(3, device=device)
    incoming = zero, Stats(entropy=zero + 1)
    (loss, stats), *_, dlogits, _ = in_parts(whole, Options(), (20, 17, 0), incoming, ("entropy",))
    assert stats.entropy is not None
    torch.testing.assert_close(stats.entropy.cpu(), torch.full((3,), entropy), rtol=1e-5, atol=0)
    nll = torch.tensor([math.log1p(rest), gap + math.log1p(rest), gap + math.log1p(rest)])
    if not soft:  # the loss of probabilities has the plain form
        torch.testing.assert_close(loss.cpu(), nll, rtol=1e-5, atol=0)
    expected = torch.full((3, 37), math.exp(-gap) / (1 + rest) * (gap - gap * rest / (1 + rest)))
    expected[:, 25] = -gap * rest / (1 + rest) ** 2
    torch.testing.assert_close(dlogits.cpu(), expected, rtol=1e-5, atol=0)


@pytest.fixture
def alone(device: torch.device) -> Iterator[None]:
    """A group of one process, by NCCL on a GPU."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("vocab_size", (None, 1501))
def test_a_group_of_one_process_has_the_results_of_none(
    vocab_size: int | None, path: str, device: torch.device
) -> None:
    """With a vocab_size later calls leave the host alone, so that a CUDA graph may capture them."""
    values: list[Any] = [x.to(device) for x in rows(1501, torch.float32, False)[:2]]
    logits, target = values[0].requires_grad_(), values[1]
    x, w = torch.randn(4, 8, device=device), torch.randn(1501, 8, device=device)
    spread: dict[str, Any] = {"group": dist.group.WORLD, "vocab_size": vocab_size}

    def outcome(on_logits: Any, on_layer: Any, **given: Any) -> list[Tensor]:
        losses = on_logits(logits, target, **given), on_layer(x.requires_grad_(), w.requires_grad_(), target, **given)
        gradients = [torch.autograd.grad(loss, of) for loss, of in zip(losses, ((logits,), (x, w)), strict=True)]
        return [*losses, *gradients[0], *gradients[1]]

    outcome(vocab_parallel_softmax_xent, fused_linear_softmax_xent, **spread)  # the first call agrees with the others
    waits = "error" if device.type == "cuda" and vocab_size else "default"
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(waits)
    try:
        found = outcome(vocab_parallel_softmax_xent, fused_linear_softmax_xent, **spread)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, outcome(fused_softmax_xent, fused_linear_softmax_xent))


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="the interpreter's")
@pytest.mark.parametrize("path", ("kernels",), indirect=True)
@pytest.mark.parametrize("wanted", ((), STATS), ids=("loss", "stats"))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_nothing_is_asserted_in_debug_mode(
    sizes: tuple[int, ...], wanted: tuple[str, ...], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There Triton asserts that no integer overflows: not even one that nobody reads."""
    from triton.runtime import interpreter

    debug = interpreter.InterpreterOptions(debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", debug)
    compare(rows(sum(sizes), torch.float32, soft=False), Options(label_smoothing=0.1), sizes, 1e-5, wanted)


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="counted in the interpreter")
@pytest.mark.parametrize("path", ("kernels",), indirect=True)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("n_cols", (1024, 5000, 5001))
def test_a_step_reads_the_logits_twice_and_writes_their_gradient_once(
    n_cols: int, dtype: torch.dtype, path: str
) -> None:
    """3 B, and of each row the few numbers that are exchanged and kept."""
    whole = rows(n_cols, dtype, soft=False)
    whole = whole._replace(weight=None, sample_weight=None, target=whole.target.clamp(min=0))
    (shard,) = shards_of((n_cols,))
    module, fields = implementation(whole.logits), fields_of(whole, Options(), ())
    with counted() as launches:
        gathered = module.sums(whole, Options(), shard, fields)[None]
        loss, _, row = module.combine(gathered, whole, Options(), shard, fields, ())
        dlogits = module.gradient_like(whole.logits, dtype)
        module.gradient(row, torch.ones_like(loss), Stats(), whole, Options(), shard, dlogits, None)
    size, extra = whole.logits.numel() * dtype.itemsize, len(whole.logits) * dtype.itemsize  # the target's value, again
    assert [one.kernel for one in launches] == ["sums_kernel", "combine_kernel", "gradient_kernel"]
    reads, combines, writes = launches
    assert size <= reads.loaded["logits_ptr"] <= size + extra and not reads.stored.get("logits_ptr")
    assert size <= writes.loaded["logits_ptr"] <= size + extra
    assert size <= writes.stored["dlogits_ptr"] <= size + extra
    assert sum(combines.loaded.values()) + sum(combines.stored.values()) <= 64 * len(whole.logits)

"""What a training step reads and writes, counted in Triton's interpreter, and how many launches it takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.traffic import Launch, Operations, counted, example, step
from softxent import fused_softmax_xent, launch, log_softmax, softmax

pytestmark = [
    pytest.mark.parametrize("path", ["kernels"], indirect=True),
    pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="counted in the interpreter"),
]

PER_ROW = 48  # bytes besides the matrices: target, loss, parts of the mean's divisor, stats
# Some programs of each way, the last of several rows not full; more than a small batch
SHAPES = ((520, 10), (18, 100), (5, 1000), (5, 1001), (2, 5000), (2, 32000), (2, 50257))
WIDEST = ((1, 128256), (1, 262144))
DTYPES = (torch.bfloat16, torch.float32)


def moved(launches: list[Launch]) -> tuple[int, int, int]:
    """Bytes of the logits and their gradient that came from memory, of the gradient stored, and all others."""
    loaded = stored = others = 0
    for one in launches:
        for name, size in one.touched.items():
            if name in ("logits_ptr", "dlogits_ptr", "values_ptr"):
                loaded += size
            else:
                others += size
        for name, size in one.stored.items():
            if name in ("dlogits_ptr", "values_ptr"):
                stored += size
            else:
                others += size
    return loaded, stored, others


def again(logits: Tensor) -> int:
    """Bytes that are stored twice: of a wide row the target's."""
    return len(logits) * logits.itemsize if logits.shape[1] > launch.NARROW else 0


def count(logits: Tensor, target: Tensor, **options: Any) -> tuple[float, float]:
    """Multiples of B that a step loads from memory and stores of the logits and the gradient."""
    with counted() as launches:
        step(fused_softmax_xent, logits, target, **options)
    loaded, stored, others = moved(launches)
    assert others <= PER_ROW * len(logits) + 4096
    size = logits.numel() * logits.itemsize
    return loaded / size, (stored - again(logits)) / size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", (*SHAPES, *WIDEST), ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_reads_the_logits_once_and_writes_their_gradient_once(
    path: str, dtype: torch.dtype, shape: tuple[int, int], padded: bool
) -> None:
    """From memory: what a program reads again it has read just before."""
    assert count(*example(*shape, dtype, shape[1] + 3 if padded else None)) == (1, 1)


@pytest.mark.parametrize("shape", [*SHAPES[-3:], *WIDEST], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_wide_row_no_more_is_read_again_than_does_not_stay_in_registers(
    path: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits, target = example(*shape, dtype)
    with counted() as launches:
        step(fused_softmax_xent, logits, target)
    size = shape[1] * dtype.itemsize
    threads, unroll, held = launch.wide(size, dtype.itemsize, odd=shape[1] % 8 > 0, soft=False, plain=True, step=True)
    (kernel,) = (one for one in launches if one.kernel == "wide_row_kernel")
    again = kernel.loaded["logits_ptr"] / shape[0] - size - dtype.itemsize  # and the target's logit
    expected = size - min(size, held * threads * unroll * 16)
    assert abs(again - expected) <= (32 if shape[1] % 8 else 0)  # the ends of an odd row stay too


@pytest.mark.parametrize("shape", [*SHAPES, WIDEST[0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_option_costs_a_pass_over_the_logits(path: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits, target = example(*shape, dtype)
    rows = torch.linspace(0.5, 1, shape[0])
    scaled: dict[str, Any] = {
        "z_loss": 1e-4,
        "logit_scale": 0.5,
        "sample_weight": rows,
        "normalizer": torch.tensor(3.0),
    }
    weight = torch.linspace(0.5, 1, shape[1], dtype=dtype)
    with counted() as launches:
        step(fused_softmax_xent, logits, target, softcap=30.0, label_smoothing=0.1, weight=weight, **scaled)
    loaded, stored, _ = moved(launches)
    size = logits.numel() * logits.itemsize
    assert loaded == size and stored == size + again(logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDEST], ids=str)
def test_a_forward_pass_alone_reads_the_logits_once(path: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits, target = example(*shape, dtype)
    with counted() as launches, torch.no_grad():
        fused_softmax_xent(logits, target)
    loaded, stored, others = moved(launches)
    assert loaded == logits.numel() * logits.itemsize
    assert sum(one.loaded.get("logits_ptr", 0) for one in launches) <= loaded + len(logits) * logits.itemsize
    assert stored == 0 and others <= PER_ROW * len(logits) + 4096


@pytest.mark.parametrize("options", [{"reduction": "none"}, {}], ids=["none", "float16"])
def test_where_the_gradient_waits_for_backward_the_logits_are_read_once_more(
    path: str, options: dict[str, Any]
) -> None:
    for shape in ((520, 10), (5, 1000), (1, 90001)):
        dtype = torch.bfloat16 if options else torch.float16
        loaded, stored = count(*example(*shape, dtype), **options)
        assert loaded <= 2 and stored <= 1


@pytest.mark.parametrize("shape", [(520, 10), (5, 1000), (2, 70001)], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_a_step_allocates_one_matrix_and_none_in_place(
    path: str, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    logits, target = example(*shape, torch.float32)
    with Operations() as operations, counted():
        step(fused_softmax_xent, logits, target, **options)
    assert operations.allocated <= logits.numel() * 4 + 64 * len(logits) + 2048
    logits = logits * 1
    with Operations() as operations, counted():
        step(fused_softmax_xent, logits, target, inplace=True, **options)
    assert operations.allocated <= 64 * len(logits) + 2048


@pytest.mark.parametrize("shape", [(520, 10), (18, 100), (6, 1000), (4, 50257), (2, 90001)], ids=str)
def test_ignored_rows_are_not_read(path: str, shape: tuple[int, int]) -> None:
    logits, target = example(*shape, torch.bfloat16)
    target[::2] = -100
    with counted() as launches, torch.no_grad():
        fused_softmax_xent(logits, target)
    size = logits.numel() * logits.itemsize
    assert moved(launches)[0] == size // 2
    with counted() as launches:
        step(fused_softmax_xent, logits, target)
    loaded, stored, _ = moved(launches)
    assert loaded == size // 2 and size <= stored <= size + again(logits)


@pytest.mark.parametrize("shape", [(520, 10), (5, 1000), (1, 90001)], ids=str)
def test_an_incoming_gradient_other_than_1_costs_a_pass_over_the_gradient(path: str, shape: tuple[int, int]) -> None:
    once, scaled = count(*example(*shape, torch.bfloat16)), count(*example(*shape, torch.bfloat16), dloss=0.5)
    assert 0.9 < scaled[0] - once[0] <= 1 and 0.9 < scaled[1] - once[1] <= 1


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "most"),
    [
        ((256, 10), torch.float32, {}, 2),
        ((256, 10), torch.bfloat16, {"label_smoothing": 0.1, "weight": True}, 2),
        ((256, 10), torch.float16, {}, 2),
        ((1000, 10), torch.float32, {}, 4),
        ((1000, 10), torch.float32, {"reduction": "sum"}, 3),
        ((20, 1000), torch.bfloat16, {}, 4),
        ((20, 1000), torch.bfloat16, {"label_smoothing": 0.1, "weight": True}, 4),
        ((20, 1000), torch.float16, {}, 4),
        ((256, 10), torch.float32, {"z_loss": 0.1, "softcap": 3.0, "normalizer": torch.tensor([3.0])}, 2),
        ((20, 1000), torch.float32, {"z_loss": 0.1, "softcap": 3.0, "normalizer": torch.tensor([3.0])}, 3),
        ((20, 1000), torch.float32, {"normalizer": 3.0}, 4),
        ((20, 1000), torch.float32, {"reduction": "none"}, 2),
        ((1, 90001), torch.float16, {}, 4),
        ((1, 90001), torch.bfloat16, {"label_smoothing": 0.1}, 4),
    ],
    ids=str,
)
def test_launches_of_a_step(
    path: str, shape: tuple[int, int], dtype: torch.dtype, options: dict[str, Any], most: int
) -> None:
    """Kernels and operations of torch together, without the 1 that backward begins with."""
    logits, target = example(*shape, dtype)
    if "weight" in options:
        options = options | {"weight": torch.linspace(0.5, 1, shape[1], dtype=dtype)}
    shape_of_loss = shape[:1] if options.get("reduction") == "none" else ()
    dloss = torch.ones(shape_of_loss, dtype=dtype)
    with counted() as launches, Operations() as operations:
        torch.autograd.grad(fused_softmax_xent(logits, target, **options), logits, dloss)
    of_torch = [name for name in operations.names if name != "fill_"]  # with NaN: conftest's
    assert len(launches) + len(of_torch) <= most, (launches, of_torch)


def soft_example(
    n_rows: int, n_cols: int, dtype: torch.dtype, stride: int | None = None, dtarget: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits, and probabilities that lie as they do."""
    logits, _ = example(n_rows, n_cols, dtype, stride)
    other, _ = example(n_rows, n_cols, dtype, stride)
    target = (other.detach().flip(0) / 8).exp() if stride is None else other.detach()
    return logits, target.requires_grad_(dtarget)


def matrices(launches: list[Launch], logits: Tensor) -> tuple[float, float]:
    """Multiples of B that came from memory of logits and target, and were stored of their gradients; no more than a
    little of anything else."""
    loaded = stored = others = 0
    for one in launches:
        for moved, ours in ((one.touched, ("logits_ptr", "probs_ptr")), (one.stored, ("dlogits_ptr", "dtarget_ptr"))):
            size = sum(moved.get(name, 0) for name in ours)
            others += sum(moved.values()) - size
            loaded, stored = (loaded + size, stored) if moved is one.touched else (loaded, stored + size)
    assert others <= PER_ROW * len(logits) + 4096
    size = logits.numel() * logits.itemsize
    return loaded / size, stored / size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_with_probabilities_moves_each_matrix_once(
    path: str, dtype: torch.dtype, shape: tuple[int, int], padded: bool
) -> None:
    """Logits and target in, their gradients out."""
    for dtarget in (False, True):
        logits, target = soft_example(*shape, dtype, shape[1] + 3 if padded else None, dtarget)
        if dtarget:
            with counted() as launches, torch.no_grad():
                fused_softmax_xent(logits, target)
            assert matrices(launches, logits) == (2, 0)
        with counted() as launches:
            fused_softmax_xent(logits, target).backward()
        assert matrices(launches, logits) == (2, 1 + dtarget)
        assert len(launches) <= 3 + dtarget


@pytest.mark.parametrize("shape", [(520, 10), (18, 100), (5, 1001), (2, 32000)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_of_sample_weight_0_neither_row_nor_probabilities_are_read(
    path: str, shape: tuple[int, int], reduction: str
) -> None:
    logits, target = soft_example(*shape, torch.bfloat16, dtarget=True)
    weights = torch.ones(shape[0])
    amounts = []
    for some in (weights, weights * (torch.arange(shape[0]) % 2)):
        with counted() as launches:
            fused_softmax_xent(logits, target, sample_weight=some, reduction=reduction).sum().backward()
        loaded, stored = matrices(launches, logits)
        assert stored == 2
        amounts.append(loaded)
    assert amounts[1] == amounts[0] * (shape[0] // 2) / shape[0]


@pytest.mark.parametrize("op", [softmax, log_softmax])
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:4], (3, 5001)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_reads_and_writes_each_matrix_once(
    path: str, dtype: torch.dtype, shape: tuple[int, int], padded: bool, op: Callable[[Tensor], Tensor]
) -> None:
    z, _ = example(*shape, dtype, shape[1] + 3 if padded else None)
    matrix = z.numel() * z.itemsize
    with counted() as launches:
        out = op(z)
        torch.autograd.grad(out, z, z.detach().clone())
    moved = [(sum(one.touched.values()) + sum(one.stored.values())) / matrix for one in launches]
    assert moved == [2, 3]

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
HELD = (  # rows that stay on chip
    (700, 10),
    (40, 100),
    (9, 1000),
    (3, 32000),
)


def moved(launches: list[Launch]) -> tuple[int, int, int]:
    """Bytes of the logits and their gradient that were loaded, of the gradient stored, and all others."""
    loaded = stored = others = 0
    for one in launches:
        for name, size in one.loaded.items():
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
    """Bytes of a row loaded or stored twice: the target; if packed, what its thread and the ends hold."""
    n_cols = logits.shape[1]
    if n_cols <= launch.FEW:
        return 0
    if n_cols <= launch.SPILLS // 2:
        return 2 * logits.itemsize
    threads, granule = 32 * launch.PACKED_WARPS, 16 // logits.itemsize
    return (launch.cdiv(n_cols, threads) + 3 * granule) * logits.itemsize


def count(logits: Tensor, target: Tensor, **options: Any) -> tuple[float, float]:
    """Multiples of B that a step loads and stores of the logits and the gradient, less a little a row."""
    with counted() as launches:
        step(fused_softmax_xent, logits, target, **options)
    loaded, stored, others = moved(launches)
    assert others <= PER_ROW * len(logits) + 4096
    size = logits.numel() * logits.itemsize
    return (loaded - again(logits) * len(logits)) / size, (stored - again(logits) * len(logits)) / size


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in HELD for dtype in (torch.bfloat16, torch.float32)]
    + [((2, 50257), torch.bfloat16), ((2, 50257), torch.float32), ((1, 81913), torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("odd", [False, True])
def test_a_step_reads_the_logits_once_and_writes_their_gradient_once(
    path: str, dtype: torch.dtype, shape: tuple[int, int], odd: bool
) -> None:
    loaded, stored = count(*example(*shape, dtype, shape[1] + 3 if odd else None))
    assert loaded <= 1 and stored <= 1


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in (*HELD[:2], (9, 1001), (2, 32001)) for dtype in (torch.bfloat16, torch.float32)]
    + [((2, 65529), torch.bfloat16)],
    ids=str,
)
def test_no_option_costs_a_pass_over_the_logits(path: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """To the widths to which README's table has them held."""
    logits, target = example(*shape, dtype)
    rows = torch.linspace(0.5, 1, shape[0])
    scaled = {"z_loss": 1e-4, "logit_scale": 0.5, "sample_weight": rows, "normalizer": torch.tensor(3.0)}
    loaded, stored = count(logits, target, **scaled)
    assert loaded <= 1 and stored <= 1
    weight = torch.linspace(0.5, 1, shape[1], dtype=dtype)
    loaded, stored = count(logits, target, softcap=30.0, weight=weight, **scaled)
    assert loaded <= 1 and stored <= 1


@pytest.mark.parametrize(
    ("shape", "dtype"), [((40, 104), torch.float32), ((2, 32768), torch.float32), ((2, 65528), torch.bfloat16)], ids=str
)
def test_label_smoothing_costs_no_pass_over_the_logits(path: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits, target = example(*shape, dtype)
    loaded, stored = count(logits, target, label_smoothing=0.1)
    assert loaded <= 1 and stored <= 1


@pytest.mark.parametrize(("n_cols", "dtype"), [(51201, torch.float32), (81921, torch.bfloat16)], ids=str)
def test_a_row_that_no_program_holds_is_read_twice(path: str, n_cols: int, dtype: torch.dtype) -> None:
    loaded, stored = count(*example(2, n_cols, dtype))
    assert 1.9 <= loaded <= 2 and stored <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*HELD, (2, 50257), (2, 128256), (2, 151936), (1, 262144)], ids=str)
def test_a_forward_pass_alone_reads_the_logits_once(path: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits, target = example(*shape, dtype)
    with counted() as launches, torch.no_grad():
        fused_softmax_xent(logits, target)
    loaded, stored, others = moved(launches)
    assert loaded <= logits.numel() * logits.itemsize + again(logits) * len(logits)
    assert stored == 0 and others <= PER_ROW * len(logits) + 4096


@pytest.mark.parametrize("options", [{"reduction": "none"}, {}], ids=["none", "float16"])
def test_where_the_gradient_waits_for_backward_the_logits_are_read_once_more(
    path: str, options: dict[str, Any]
) -> None:
    for shape in ((700, 10), (9, 1000), (1, 90001)):
        dtype = torch.bfloat16 if options else torch.float16
        loaded, stored = count(*example(*shape, dtype), **options)
        assert loaded <= 2 and stored <= 1


@pytest.mark.parametrize("shape", [(700, 10), (40, 1000), (2, 70001)], ids=str)
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


@pytest.mark.parametrize("shape", [(700, 10), (40, 100), (10, 1000), (4, 50257), (2, 90001)], ids=str)
def test_ignored_rows_are_not_read(path: str, shape: tuple[int, int]) -> None:
    logits, target = example(*shape, torch.bfloat16)
    target[::2] = -100
    with counted() as launches, torch.no_grad():
        fused_softmax_xent(logits, target)
    held = logits.numel() * logits.itemsize
    assert moved(launches)[0] <= held // 2 + again(logits) * len(logits)
    with counted() as launches:
        step(fused_softmax_xent, logits, target)
    reads = 2 if shape[1] > launch.PACKED[0][2] else 1
    loaded, stored, _ = moved(launches)
    assert loaded <= reads * held // 2 + 2 * again(logits) * len(logits)
    assert stored <= held + again(logits) * len(logits)


@pytest.mark.parametrize("shape", [(700, 10), (9, 1000), (1, 90001)], ids=str)
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
    """Multiples of B that were loaded of logits and target, and stored of their gradients; no more than a little of
    anything else."""
    loaded = stored = others = 0
    for one in launches:
        for moved, ours in ((one.loaded, ("logits_ptr", "target_ptr")), (one.stored, ("dlogits_ptr", "dtarget_ptr"))):
            size = sum(moved.get(name, 0) for name in ours)
            others += sum(moved.values()) - size
            loaded, stored = (loaded + size, stored) if moved is one.loaded else (loaded, stored + size)
    assert others <= PER_ROW * len(logits) + 4096
    size = logits.numel() * logits.itemsize
    return loaded / size, stored / size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*HELD[:3], (9, 1001), (3, 8001), (3, 16000), (2, 32000)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_with_probabilities_moves_each_matrix_once(
    path: str, dtype: torch.dtype, shape: tuple[int, int], padded: bool
) -> None:
    """Logits and target in, their gradients out; but for rows that no program holds with their probabilities, which are
    read again. Forward alone reads both once at any width."""
    stride = shape[1] + 3 if padded else None
    for dtarget in (False, True):
        logits, target = soft_example(*shape, dtype, stride, dtarget)
        with counted() as launches, torch.no_grad():
            fused_softmax_xent(logits, target)
        assert matrices(launches, logits) == (2, 0)
        with counted() as launches:
            fused_softmax_xent(logits, target).backward()
        odd = padded or shape[1] % 8 > 0
        held = shape[1] <= launch.SPILLS // (1 + odd)
        assert matrices(launches, logits) == (2 if held else 4, 1 + dtarget)
        assert len(launches) <= 3 + dtarget


@pytest.mark.parametrize("shape", [(700, 10), (40, 100), (9, 1001), (4, 32000)], ids=str)
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


def moved_by(op: Callable[[Tensor], Tensor], z: Tensor) -> tuple[float, float]:
    """Multiples of B that forward and backward load and store, of matrices, which is all that they have."""
    matrix = z.numel() * z.itemsize
    with counted() as launches:
        out = op(z)
        forward = len(launches)
        torch.autograd.grad(out, z, z.detach().clone())
    moved = [sum(one.loaded.values()) + sum(one.stored.values()) for one in launches]
    assert [forward, len(moved)] == [1, 2]
    return moved[0] / matrix, moved[1] / matrix


@pytest.mark.parametrize("op", [softmax, log_softmax])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (dtype, shape)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
        for shape in (*HELD[:2], (40, 101), (9, 1000), (9, 1001), (3, 4096), (3, 16000))
        if dtype != torch.float64 or shape[1] <= launch.WHOLE[8][-1][0]
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_reads_and_writes_each_matrix_once(
    path: str, dtype: torch.dtype, shape: tuple[int, int], padded: bool, op: Callable[[Tensor], Tensor]
) -> None:
    z, _ = example(*shape, dtype, shape[1] + 3 if padded else None)
    assert moved_by(op, z) == (2, 3)


def test_softmax_of_rows_that_no_program_holds_reads_them_twice(path: str) -> None:
    for n_cols in (32000, 32001):
        for dtype in (torch.bfloat16, torch.float32):
            z, _ = example(2, n_cols, dtype)
            assert moved_by(softmax, z) == (2, 5) and moved_by(log_softmax, z) == (2, 4)
    for dtype, n_cols in ((torch.bfloat16, 50257), (torch.float32, 50304), (torch.float64, 4097)):
        z, _ = example(2, n_cols, dtype)
        assert moved_by(softmax, z) == (3, 5)
        assert moved_by(log_softmax, z) == (3, 4)

"""softmax and log_softmax against PyTorch and float64, through both paths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import softxent
from exactness import assert_as_exact_as_torch, roundings_of_softmax

PAIRS = ((softxent.softmax, torch.softmax), (softxent.log_softmax, torch.log_softmax))
Op = Callable[..., Tensor]
pytestmark = pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=["softmax", "log_softmax"])


def value_and_gradient(op: Op, z: Tensor, dout: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    out = op(z, dim)
    out.backward(dout.to(out.dtype))
    assert z.grad is not None
    return out.detach(), z.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (70, 10), (19, 100), (19, 101), (3, 1000), (2, 4097), (2, 16001), (2, 32000), (2, 50257)], ids=str
)
def test_value_and_gradient_are_as_exact_as_torch(
    path: str, device: torch.device, ours: Op, torchs: Op, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(shape, generator=generator).mul(4).to(device, dtype)
    dout = torch.randn(shape, generator=generator).to(device, dtype)
    results = value_and_gradient(ours, z, dout)
    expected = value_and_gradient(torchs, z, dout)
    exact = value_and_gradient(torchs, z.double(), dout.double())
    yardstick = 64 if dtype == torch.float64 else 0
    # The gradient has p_j times the sum of the incoming ones, which is of many signs.
    terms = float(dout.double().abs().sum(1).max() * z.double().softmax(1).max())
    for what, *values in zip(("value", "gradient"), results, expected, exact, strict=True):
        size = terms if what == "gradient" else 0
        assert_as_exact_as_torch(values[0], values[1], values[2], what, yardstick, roundings_of_softmax(z), size)


def test_of_a_tensor_that_wraps_others_it_is_torchs_own(path: str, device: torch.device, ours: Op, torchs: Op) -> None:
    """A DTensor, or of a nested one the rows that it has in one tensor: neither has memory of its own."""
    for n_cols in (100, 20000):
        rows = [torch.randn(n_rows, n_cols, device=device) for n_rows in (1, 2)]
        z = torch.nested.nested_tensor(rows, layout=torch.jagged)
        assert torch.equal(ours(z).values(), torchs(z, -1).values())


def test_hard_rows(path: str, device: torch.device, ours: Op, torchs: Op) -> None:
    inf, nan = float("inf"), float("nan")
    for n_cols in (4, 5000):
        z = torch.randn(8, n_cols, device=device)
        z[0], z[1], z[2] = z[0] * 1e4, z[1] + 1e4, 3.0
        z[3, : n_cols // 2] = -inf
        z[4], z[5, 1], z[6, 1] = -inf, inf, nan
        out = ours(z)
        assert_as_exact_as_torch(out, torchs(z, -1), torchs(z.double(), -1))
        assert out[4:7].isnan().all()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension_and_any_strides(path: str, device: torch.device, ours: Op, torchs: Op, dim: int) -> None:
    z = torch.randn(3, 4, 5, device=device, dtype=torch.float64)
    dout = torch.randn(3, 4, 5, device=device, dtype=torch.float64)
    for view in (z, z.transpose(0, 1).contiguous().transpose(0, 1), z[:, ::2]):
        g = dout[tuple(slice(n) for n in view.shape)]
        torch.testing.assert_close(value_and_gradient(ours, view, g, dim), value_and_gradient(torchs, view, g, dim))


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize(
    ("n_cols", "dtype"),
    [(n_cols, dtype) for n_cols in (10, 101, 1000) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    + [(2500, torch.float64), (2501, torch.float32)],
    ids=str,
)
def test_rows_that_lie_anywhere(
    path: str, device: torch.device, ours: Op, torchs: Op, n_cols: int, dtype: torch.dtype
) -> None:
    """Off their granules, in padded rows, apart from each other, or all in one place; incoming gradients too."""
    memory = torch.randn(2, 2 * n_cols + 32, device=device).to(dtype)
    for view in (
        memory[:, 1 : n_cols + 1],
        memory[:, :n_cols],
        memory[1:, 16 : n_cols + 16],
        memory[:, : 2 * n_cols : 2],
        memory.view(-1)[: 2 * n_cols].view(n_cols, 2).t(),
    ):
        z, copy = view.detach().requires_grad_(), view.detach().contiguous().requires_grad_()
        out, out_of_copy = ours(z), ours(copy)
        assert out.is_contiguous()
        torch.testing.assert_close(out, torchs(view, -1))
        for dout in (view, memory[:1, :1].expand(view.shape)):
            (dz,) = torch.autograd.grad(out, z, dout, retain_graph=True)
            (expected,) = torch.autograd.grad(out_of_copy, copy, dout.contiguous(), retain_graph=True)
            torch.testing.assert_close(dz, expected)


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("path", ["kernels"], indirect=True)  # on a CPU torch's, whose threads may share a row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_cols", [10, 101, 1000, 2504])
def test_the_bits_of_a_row_do_not_depend_on_the_batch(
    path: str, device: torch.device, ours: Op, torchs: Op, n_cols: int, dtype: torch.dtype
) -> None:
    z = torch.randn(1, n_cols, device=device).mul(0.3).to(dtype).repeat(9, 1)
    dout = torch.randn(1, n_cols, device=device).to(dtype).repeat(9, 1)
    for results in zip(value_and_gradient(ours, z, dout), value_and_gradient(ours, z[4:5], dout[4:5]), strict=True):
        for result in results:
            assert (result == results[0][0]).all()


@pytest.mark.usefixtures("short_wide_rows")
@pytest.mark.parametrize("n_cols", [10, 1000, 1001, 2501])
def test_incoming_gradients_of_any_size(path: str, device: torch.device, ours: Op, torchs: Op, n_cols: int) -> None:
    inf = float("inf")
    z, dout = torch.randn(2, 8, n_cols, device=device)
    for row, scale in enumerate((1e30, 1e-37, 1e-42, 0.0)):
        dout[row] *= scale
    dout[4, 3], dout[5, -1], dout[6, 0], dout[7, 1] = inf, -inf, float("nan"), inf
    dout[7, 2] = -inf
    z[2, : n_cols // 2] = -inf
    (_, results), (_, expected) = value_and_gradient(ours, z, dout), value_and_gradient(torchs, z, dout)
    _, exact = value_and_gradient(torchs, z.double(), dout.double())
    for row in range(8):  # apart: the error that one row excuses is no excuse for the others
        assert_as_exact_as_torch(results[row], expected[row], exact[row], f"row {row}")


def test_a_result_that_a_hook_brings_back_elsewhere(path: str, device: torch.device, ours: Op, torchs: Op) -> None:
    z, dout = torch.randn(2, 6, 100, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.t().contiguous(), lambda x: x.t()):
        results = value_and_gradient(ours, z, dout)
    torch.testing.assert_close(results, value_and_gradient(torchs, z, dout))


def test_gradcheck_and_gradgradcheck(path: str, device: torch.device, ours: Op, torchs: Op) -> None:
    z = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(ours, z, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, z, fast_mode=True)


def test_dtype_empty_and_scalar_as_in_torch(path: str, device: torch.device, ours: Op, torchs: Op) -> None:
    z = torch.randn(3, 5, device=device).bfloat16()
    torch.testing.assert_close(ours(z, 1, torch.float32), torchs(z, 1, dtype=torch.float32))
    for empty in (torch.zeros(0, 5, device=device), torch.zeros(3, 0, device=device), torch.tensor(2.0, device=device)):
        torch.testing.assert_close(ours(empty, 0), torchs(empty, 0))


def test_what_is_not_floating_point_raises(path: str, ours: Op, torchs: Op) -> None:
    with pytest.raises(NotImplementedError, match=r"float16, not torch\.int64"):
        ours(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        ours(torch.zeros(3, 4), 2)

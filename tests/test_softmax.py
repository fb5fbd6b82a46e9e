"""softmax and log_softmax against PyTorch and float64, through both paths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import softxent
from exactness import assert_as_exact_as_torch

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
@pytest.mark.parametrize("shape", [(1, 1), (70, 10), (3, 1000), (2, 4097), (2, 50257)], ids=str)
def test_value_and_gradient_are_as_exact_as_torch(
    path: str, device: torch.device, ours: Op, torchs: Op, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(shape, generator=generator).mul(4).to(device, dtype)
    dout = torch.randn(shape, generator=generator).to(device, dtype)
    results = value_and_gradient(ours, z, dout)
    expected = value_and_gradient(torchs, z, dout)
    exact = value_and_gradient(torchs, z.double(), dout.double())
    for what, *values in zip(("value", "gradient"), results, expected, exact, strict=True):
        assert_as_exact_as_torch(values[0], values[1], values[2], what, 64 if dtype == torch.float64 else 0)


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

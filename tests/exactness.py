"""How wrong a result may be: measured against float64, and against PyTorch's own error on the same input."""

import torch
from torch import Tensor


def assert_as_exact_as_torch(actual: Tensor, torchs: Tensor, exact: Tensor, what: str = "result") -> None:
    """Each value within twice PyTorch's largest error here, one rounding of its own, and a few of the computation's."""
    assert actual.shape == exact.shape and actual.dtype == torchs.dtype, what
    actual64, torchs64 = actual.detach().cpu().double(), torchs.detach().cpu().double()
    exact = exact.detach().cpu()
    exact = torch.where(exact.to(actual.dtype).isinf(), exact.to(actual.dtype).double(), exact)  # out of its range
    assert torch.equal(actual64.isnan(), exact.isnan()), f"{what}: NaN in other places than in float64"
    infinite = exact.isinf()
    assert torch.equal(actual64[infinite], exact[infinite]), f"{what}: infinite where float64 is not, or the reverse"
    finite = exact.isfinite()
    if not finite.any():
        return
    actual64, torchs64, exact = actual64[finite], torchs64[finite], exact[finite]
    computed = torch.promote_types(actual.dtype, torch.float32)
    torchs_error = (torchs64 - exact).abs().nan_to_num(0, 0, 0).max()
    rounding = torch.finfo(actual.dtype).eps * exact.abs() + torch.finfo(actual.dtype).tiny
    # In float64 the yardstick is rounded as well.
    slack = (64 if computed == torch.float64 else 4) * torch.finfo(computed).eps * exact.abs().max()
    error = (actual64 - exact).abs()
    worst = (error - rounding).argmax()
    assert (error <= 2 * torchs_error + rounding + slack).all(), (
        f"{what}: {actual64[worst].item():.9g}, exactly {exact[worst].item():.9g}; torch is within {torchs_error:.3g}"
    )

"""How wrong a result may be: measured against float64, and against PyTorch's own error on the same input."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softxent import reference
from softxent.options import Inputs, Options

SLACK = 1  # in roundings of the largest value
# x86's 80 bits. Where numpy has no more than 64, the yardstick of float64 is rounded as well.
WIDER = bool(np.finfo(np.longdouble).eps < np.finfo(np.float64).eps)


def rows_of(
    logits: Tensor,  # [n_rows, n_cols]
    target: Tensor,
    weight: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Any = None,
    logit_scale: Any = 1.0,
    **options: Any,
) -> tuple[Inputs, Options]:
    """The public arguments, for the reference."""
    n = None if normalizer is None else torch.as_tensor(normalizer, device=logits.device).reshape(1)
    tensor = logit_scale if isinstance(logit_scale, Tensor) else None
    inputs = Inputs(logits, target, weight, sample_weight, n, tensor)
    return inputs, Options(**options, logit_scale=1.0 if tensor is not None else logit_scale)


def by_reference(*arguments: Any, **options: Any) -> Tensor:
    """The loss by softxent.reference, with the public arguments."""
    return reference.softmax_xent(*rows_of(*arguments, **options))


def composed(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: Any = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Any = None,
) -> Tensor:
    """What people write with PyTorch, in float32 for half precision: the error that is allowed."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    z, w = logits.to(acc) * logit_scale, None if weight is None else weight.to(acc)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    soft = target.is_floating_point()
    rows = F.cross_entropy(
        z,
        target.to(acc) if soft else target,
        w,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    count = torch.ones_like(rows)
    if not soft:
        kept = target != ignore_index
        w_y = count if w is None else w[torch.where(kept, target, 0)]
        count = torch.where(kept, w_y, 0)
    rows = rows + z_loss * count * z.logsumexp(1) ** 2
    rows = rows if sample_weight is None else rows * sample_weight.to(acc)
    if reduction == "none":
        return rows.to(logits.dtype)
    n = 1 if reduction == "sum" else count.sum() if normalizer is None else normalizer
    return (rows.sum() / n).to(logits.dtype)


def exact_cross_entropy(
    logits: Tensor,  # [n_rows, n_cols]
    target: Tensor,  # [n_rows] int
    dloss: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Loss and gradient computed in numpy's longdouble and rounded to float64: where float64 itself is on trial."""
    z, y = logits.detach().cpu().double().numpy().astype(np.longdouble), target.cpu().numpy()
    n_cols = z.shape[1]
    w = np.ones(n_cols, np.longdouble) if weight is None else weight.cpu().double().numpy().astype(np.longdouble)
    kept = y != ignore_index
    y = np.where(kept, y, 0)
    eps = np.longdouble(label_smoothing)
    with np.errstate(all="ignore"):
        c = (1 - eps) * w[y][:, None] * (np.arange(n_cols) == y[:, None]) + eps / n_cols * w
        c = np.where(kept[:, None], c, 0)
        m = z.max(1, keepdims=True)
        e = np.exp(z - m)
        d = e.sum(1, keepdims=True)
        loss = np.where(c == 0, 0, c * (np.log(d) + (m - z))).sum(1)
        grad = c.sum(1, keepdims=True) * e / d - c
        n = w[y][kept].sum() if reduction == "mean" else np.longdouble(1)
        n = np.where(n == 0, np.nan, n)  # as torch: nothing to average
        loss = loss if reduction == "none" else loss.sum() / n
        factor = dloss.cpu().double().numpy().astype(np.longdouble) / n
        grad = np.where(kept[:, None], grad * (factor[:, None] if factor.ndim else factor), 0)
    return torch.tensor(loss.astype(np.float64)), torch.from_numpy(grad.astype(np.float64))


def roundings_of_softmax(logits: Tensor, softcap: float | None = None, logit_scale: Any = 1.0) -> float:
    """How many roundings a softmax in the dtype that these are computed in may be off, whatever the order of its sums.

    Half a rounding of the exponent z - m is as many roundings of exp as it is large. exp and the quotient round twice
    each, and the sum, in as many lanes as a CPU has, some four times more. Behind a softcap z is rounded too, and the
    slope cosh^-2(z / softcap), which multiplies the gradient, loses twice as many roundings as z / softcap is large.
    """
    z = logits.detach().cpu().double()
    z = z[z.isfinite()] * torch.as_tensor(logit_scale).detach().cpu().double()
    largest = float(z.abs().max()) if z.numel() else 0.0
    largest = min(largest, 373 if logits.dtype == torch.float64 else 52)  # exp of twice that is 0
    return 8 + (2 * min(largest, softcap) + 4 * largest / softcap if softcap else largest)


def assert_as_exact_as_torch(
    actual: Tensor,
    torchs: Tensor,
    exact: Tensor,
    what: str = "result",
    yardstick: float = 0,
    digits: float = 0,
    terms: float = 0,
) -> None:
    """Each value within one rounding of its own and one of the largest value's, and besides, whichever is more:
    PyTorch's largest error here, or `digits`, which does not depend on the CPU that runs PyTorch.

    yardstick: the error of `exact` itself, in roundings of the largest value.
    digits: what the formula may lose, in roundings of each value, in the dtype of the computation.
    terms: the size of those that a value is a small difference of: their roundings are its error.
    """
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
    slack = torch.finfo(computed).eps * ((yardstick + SLACK) * exact.abs().max() + 4 * terms)
    if computed != torch.float64:
        slack += 8 * torch.finfo(torch.float64).eps  # the yardstick's own: in float64, 1 - p_y and log p_y lose this
    error = (actual64 - exact).abs()
    allowed = (digits * torch.finfo(computed).eps * exact.abs()).clamp(min=torchs_error) + rounding + slack
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{what}: {actual64[worst].item():.9g}, exactly {exact[worst].item():.9g}; torch is within {torchs_error:.3g}"
    )

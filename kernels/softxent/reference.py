"""The formula in plain torch: slow, readable, right in float64. Every other implementation is tested against it.

For one row z of n_cols logits, with coefficients c_j (what the row should have predicted) and a = sum_j c_j:

    m     = max_j z_j = z_k
    rest  = sum_{j != k} exp(z_j - m)                 every exponent is <= 0
    loss  = a * log(1 + rest) + sum_j c_j * (m - z_j)
    dloss/dz_j = a * p_j - c_j,                       p_j = exp(z_j - m) / (1 + rest)
    dloss/dc_j = log(1 + rest) + (m - z_j)            = -log p_j

With class weights w and label smoothing eps, PyTorch's cross-entropy is the choice

    c_j = (1 - eps) * w_y * [j == y] + (eps / n_cols) * w_j         for a class index y; c = 0 for an ignored row
    c_j = w_j * ((1 - eps) * t_j + eps / n_cols)                    for a row of probabilities t

and beyond it, for logits x, a z-loss zeta, and a row that counts v times (w_y, or 1 for probabilities),

    z_j   = softcap * tanh(logit_scale * x_j / softcap)
    lse   = m + log(1 + rest)
    loss += zeta * v * lse^2

A term with c_j = 0 is selected out, never multiplied: 0 * inf is NaN. Leaving the largest term out of `rest` keeps
log1p exact where the model is confident: log(1 + 1e-9) is 0 in float32, log1p(1e-9) is not.

All of it may be differentiated, batched by vmap, and pushed forward: it also serves where autograd asks for more than a
gradient.

Sources: torch.nn.functional.cross_entropy; z-loss from Chowdhery et al. (2022), "PaLM"; softcap from Gemma Team (2024),
"Gemma 2"; a learned logit scale from Radford et al. (2021), "CLIP"; log-sum-exp as in Blanchard, Higham and Higham
(2021), "Accurately computing the log-sum-exp and softmax functions", which leaves the largest term out of the sum
likewise.
"""

import torch
from torch import Tensor

from .options import Inputs, Options, Stats, is_given
from .transforms import in_transform


def coefficients(
    target: Tensor,  # [n_rows] int, or [n_rows, n_cols] floating point
    n_cols: int,
    weight: Tensor | None,  # [n_cols]
    ignore_index: int,
    label_smoothing: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """c, the target rows [n_rows, n_cols], in `dtype`."""
    w = torch.ones(n_cols, dtype=dtype, device=target.device) if weight is None else weight.to(dtype)
    smooth = w * (label_smoothing / n_cols)
    if target.is_floating_point():
        return (1 - label_smoothing) * w * target.to(dtype) + smooth
    y = target.long()[:, None]
    ignored = y == ignore_index
    missing = ((y < 0) | (y >= n_cols)) & ~ignored  # NaN, as from the kernels
    one_hot = (torch.arange(n_cols, device=target.device) == y).to(dtype)
    c = (1 - label_smoothing) * w[y.clamp(0, n_cols - 1)] * one_hot + smooth
    return c.masked_fill(missing, float("nan")).masked_fill(ignored, 0)


def counts(inputs: Inputs, options: Options, dtype: torch.dtype) -> Tensor:
    """v, how often a row counts in the mean [n_rows]: w_y, 0 for an ignored row; 1 for probabilities."""
    target, weight = inputs.target, inputs.weight
    if target.is_floating_point():
        return torch.ones(len(target), dtype=dtype, device=target.device)
    y = target.long()
    w = torch.ones(len(y), dtype=dtype, device=y.device)
    if weight is not None:
        w = weight.to(dtype)[y.clamp(0, len(weight) - 1)]
    return w.masked_fill(y == options.ignore_index, 0)


def unread(inputs: Inputs, options: Options, differentiated: bool) -> Tensor | None:
    """Rows that are left out whatever is in them [n_rows]: ignored, or of sample weight 0. None for none.

    differentiated: whether the sample weight may be, and a row of weight 0 have a derivative along it.
    """
    v = inputs.sample_weight
    masks = []
    if not inputs.target.is_floating_point():
        masks.append(inputs.target.long() == options.ignore_index)
    if v is not None and not (
        differentiated and (v.requires_grad or (not torch.compiler.is_compiling() and in_transform(v)))
    ):
        masks.append(v == 0)
    return torch.stack(masks).any(0) if masks else None


def logit_map(x: Tensor, options: Options, logit_scale: Tensor | None = None) -> Tensor:
    """z = softcap * tanh(logit_scale * x / softcap), elementwise."""
    if logit_scale is not None:
        scale = logit_scale.to(x.dtype)
        finite = x.isfinite()  # selected: the derivative along the scale would be 0 * inf
        scaled = torch.where(finite, x, 0) * torch.where(scale > 0, scale, float("nan"))
        x = torch.where(finite, scaled, x)
    elif options.logit_scale != 1:
        x = x * options.logit_scale
    return x if options.softcap is None else options.softcap * _tanh(x / options.softcap)


def _tanh(u: Tensor) -> Tensor:
    """With a derivative that keeps its digits where it is small: 1 - tanh^2 cancels there, as torch's of expm1 does."""
    e = (-2 * u.abs().clamp(min=0.5)).exp()
    far = (1 - e) / (1 + e)
    return torch.where(u.abs() < 0.5, u.clamp(-0.5, 0.5).tanh(), torch.where(u < 0, -far, far))


def _log_sum(inputs: Inputs, options: Options, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [n_rows, n_cols], where its largest is, that [n_rows, 1], and log(1 + rest) [n_rows]. out: rows not to read."""
    x = inputs.logits.to(torch.promote_types(inputs.logits.dtype, torch.float32))
    if out is not None:
        x = x.masked_fill(out[:, None], 0)  # before any arithmetic: it may hold NaN
    z = logit_map(x, options, inputs.logit_scale)
    k = z.detach().argmax(1, keepdim=True)
    is_max = torch.arange(z.shape[1], device=z.device) == k
    m = z.gather(1, k)
    rest = (z - m).exp().masked_fill(is_max, 0).sum(1) + (m - m)[:, 0]  # + NaN where m is infinite
    return z, is_max, m, rest.log1p()


def row_loss(inputs: Inputs, options: Options) -> Tensor:
    """The loss of each row, times its sample weight, [n_rows]: float64 for float64 logits, float32 otherwise."""
    out = unread(inputs, options, differentiated=True)
    z, is_max, m, log_d = _log_sum(inputs, options, out)
    weight, eps = inputs.weight, options.label_smoothing
    c = coefficients(inputs.target, z.shape[1], weight, options.ignore_index, eps, z.dtype)
    # z_k's own gap is 0 whatever z_k is: selected out too, or autograd would add 1 and -1 to a gradient of 1e-18.
    spread = torch.where(is_max | (c == 0), 0, c * (m - z)).sum(1)
    loss = c.sum(1) * log_d + spread
    if is_given(options.z_loss):
        v = counts(inputs, options, z.dtype)
        loss = loss + torch.where(v == 0, 0, options.z_loss * v * (m[:, 0] + log_d) ** 2)
    if inputs.sample_weight is not None:
        loss = loss * inputs.sample_weight.to(loss.dtype)
    return loss if out is None else loss.masked_fill(out, 0)


def softmax_xent(inputs: Inputs, options: Options) -> Tensor:
    """`row_loss` reduced as torch.nn.functional.cross_entropy does.

    The mean divides by the sum of the weights of the targets that count, by the number of rows for probabilities, or by
    the given normalizer.
    """
    loss = row_loss(inputs, options)
    if options.reduction == "none":
        return loss
    if options.reduction == "sum":
        return loss.sum()
    if inputs.normalizer is not None:
        return loss.sum() / inputs.normalizer.to(loss.dtype).reshape(())
    n = counts(inputs, options, loss.dtype).sum()
    return loss.sum() / torch.where(n == 0, float("nan"), n)  # nothing to average


def row_stats(inputs: Inputs, options: Options) -> Stats:
    """lse, entropy, log-probability of the target class (indices only) and the likeliest class, of each row [n_rows].

    0 of rows that are left out, and class -1; that too where there is no softmax: NaN, +inf, or nothing but -inf.
    """
    out = unread(inputs, options, differentiated=False)
    z, _, m, log_d = _log_sum(inputs, options, out)
    log_p = (z - m) - log_d[:, None]
    p = log_p.exp()
    entropy = -(p * torch.where(p == 0, 0, log_p)).sum(1)
    lse = m[:, 0] + log_d
    prediction = z.argmax(1).masked_fill(lse.isnan(), -1)
    target_logprob = None
    if not inputs.target.is_floating_point():
        y = inputs.target.long()
        missing = (y < 0) | (y >= z.shape[1])
        target_logprob = log_p.gather(1, y.clamp(0, z.shape[1] - 1)[:, None])[:, 0].masked_fill(missing, float("nan"))
        assert out is not None
        target_logprob = target_logprob.masked_fill(out, 0)
    if out is not None:
        lse, entropy, prediction = lse.masked_fill(out, 0), entropy.masked_fill(out, 0), prediction.masked_fill(out, -1)
    return Stats(lse, entropy, target_logprob, prediction)


def softmax(z: Tensor) -> Tensor:
    """p_j = exp(z_j - m) / sum_k exp(z_k - m) along the last dimension."""
    e = (z - z.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def log_softmax(z: Tensor) -> Tensor:
    """log p_j = (z_j - m) - log sum_k exp(z_k - m) along the last dimension."""
    s = z - z.amax(-1, keepdim=True)
    return s - s.exp().sum(-1, keepdim=True).log()


def softmax_gradient(dp: Tensor, p: Tensor) -> Tensor:
    """dz_j = p_j * (dp_j - sum_k dp_k * p_k)"""
    return p * (dp - (dp * p).sum(-1, keepdim=True))


def log_softmax_gradient(dq: Tensor, q: Tensor) -> Tensor:
    """dz_j = dq_j - p_j * sum_k dq_k,  q = log p"""
    return dq - q.exp() * dq.sum(-1, keepdim=True)

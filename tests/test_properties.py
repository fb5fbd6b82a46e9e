"""Any shape, strides, dtype, target and options that hypothesis thinks of, against the reference in float64."""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exactness import assert_as_exact_as_torch, by_reference, composed, roundings_of_softmax
from softxent import fused_softmax_xent

INF = float("inf")


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Logits in some layout, with some classes masked and some rows ignored, and every option."""
    n_rows, n_cols = draw(st.integers(1, 70)), draw(st.sampled_from([1, 2, 3, 10, 17, 100, 129, 1000]))
    n_rows = min(n_rows, 2000 // n_cols + 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    scale, shift = draw(st.sampled_from([0.0, 1.0, 5.0, 30.0])), draw(st.sampled_from([0.0, -100.0, 1e4]))
    logits = (torch.randn(n_rows, n_cols, generator=generator).double() * scale + shift).to(dtype)
    if draw(st.booleans()):
        logits[torch.rand(n_rows, n_cols, generator=generator) < 0.3] = -INF
        logits[:, 0] = shift
    layout = draw(st.sampled_from(["contiguous", "transposed", "padded", "strided"]))
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout != "contiguous":
        wide = torch.full((n_rows, 2 * n_cols), float("nan"), dtype=dtype)
        view = wide[:, ::2] if layout == "strided" else wide[:, n_cols:]
        logits = view.copy_(logits)
    soft = draw(st.booleans())
    if soft:
        target = torch.rand(n_rows, n_cols, generator=generator).to(dtype)
        target = torch.where(logits == -INF, 0, target)
    else:
        target = torch.randint(n_cols, (n_rows,), generator=generator)
        target = torch.where(logits.gather(1, target[:, None])[:, 0] == -INF, 0, target)
    ignore_index = -100 if soft else draw(st.sampled_from([-100, 0, n_cols - 1, 255]))
    if ignore_index in (-100, 255) and not soft:
        target[torch.rand(n_rows, generator=generator) < 0.3] = ignore_index
    smoothing = draw(st.sampled_from([0.0, 0.1, 1.0])) if not (logits == -INF).any() else 0.0
    weight = torch.rand(n_cols, generator=generator).to(dtype) if draw(st.booleans()) else None
    call = {
        "logits": logits,
        "target": target,
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": smoothing,
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    if draw(st.booleans()):
        call |= draw(beyond(n_rows, generator, str(call["reduction"])))
    return call


@st.composite
def beyond(draw: st.DrawFn, n_rows: int, generator: torch.Generator, reduction: str) -> dict[str, Any]:
    """What PyTorch does not take. A logit scale of 0 or below makes NaN of a masked class, or the largest."""
    options: dict[str, Any] = {
        "z_loss": draw(st.sampled_from([0.0, 1e-4, 0.5])),
        "softcap": draw(st.sampled_from([None, 0.5, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.01, 2.5])),
    }
    if draw(st.booleans()):
        options["sample_weight"] = torch.randint(0, 4, (n_rows,), generator=generator) / 2
    if reduction == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([0.5, 7]))
    return options


def run(op: Any, call: dict[str, Any], dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    options = dict(call)
    logits, target = options.pop("logits"), options.pop("target")
    if dtype is not None:
        logits = logits.to(dtype)
        target = target.to(dtype) if target.is_floating_point() else target
        for name in ("weight", "sample_weight"):
            options[name] = None if options.get(name) is None else options[name].to(dtype)
    logits = logits.detach().requires_grad_()
    loss = op(logits, target, **options)
    dloss = torch.linspace(-1, 2, loss.numel()).reshape(loss.shape).bfloat16().to(loss.device, loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, logits, dloss)[0]


def on_device(tensor: Any, device: torch.device) -> Any:
    """A tensor with the same strides, which `to` keeps only where they leave no gaps; anything else as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(call=calls())
def test_agrees_with_the_reference(path: str, device: torch.device, call: dict[str, Any]) -> None:
    if device.type != "cpu":
        call = {name: on_device(value, device) for name, value in call.items()}
    before = call["logits"].clone()
    ours = run(fused_softmax_xent, call)
    torchs = run(composed if "z_loss" in call else torch.nn.functional.cross_entropy, call)
    exact = run(by_reference, call, torch.float64)
    assert torch.equal(call["logits"], before)
    # A softcap rounds z, and half a rounding of a z of that size is so many roundings of exp(z).
    yardstick = (call.get("softcap") or 0) / 2 + (64 if call["logits"].dtype == torch.float64 else 0)
    digits = roundings_of_softmax(call["logits"], call.get("softcap"), call.get("logit_scale", 1.0))
    for what, result, theirs, right in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        assert_as_exact_as_torch(result, theirs, right, what, yardstick, digits)

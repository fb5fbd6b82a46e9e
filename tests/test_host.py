"""What the host does on the kernels' path: it launches, and reads nothing from the device."""

from typing import Any

import pytest
import torch

from softxent import (
    fused_linear_softmax_xent,
    fused_linear_softmax_xent_with_stats,
    fused_softmax_xent,
    fused_softmax_xent_with_stats,
    linear_logprobs,
    linear_rows,
    softmax,
)


@pytest.mark.parametrize("path", ["kernels"], indirect=True)  # torch operations look at targets on the host: a CPU's
@pytest.mark.parametrize(
    "kind",
    ["indices", "weight, smoothing", "probabilities", "none", "softmax", "options", "stats", "learned", "linear"],
)
def test_nothing_is_read_from_the_device(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On a GPU each of these would wait for it, and break the capture of a CUDA graph."""
    logits = torch.randn(6, 10, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, -100, 4], device=device)
    weight, soft = torch.ones(10, device=device), torch.rand(6, 10, device=device)
    dloss = torch.ones(6, device=device)
    number = torch.tensor(0.5, device=device)

    def raises(self: torch.Tensor, *_: Any, **__: Any) -> None:
        raise AssertionError("a value was read from the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, raises)
    if kind == "softmax":
        softmax(logits).backward(soft)
    elif kind == "probabilities":
        fused_softmax_xent(logits, soft, weight, label_smoothing=0.1).backward()
    elif kind == "none":
        fused_softmax_xent(logits, target, reduction="none").backward(dloss)
    elif kind == "options":
        for y in (target, soft):
            tensors = {"logit_scale": number, "sample_weight": dloss, "normalizer": number}
            fused_softmax_xent(logits, y, z_loss=0.1, softcap=3.0, **tensors).backward()  # type: ignore[arg-type]
    elif kind == "stats":
        found = fused_softmax_xent_with_stats(logits, target)
        assert found.entropy is not None
        (found.loss + found.entropy.sum()).backward()
    elif kind == "learned":
        fused_softmax_xent(logits, target, sample_weight=dloss.requires_grad_()).backward()
        fused_softmax_xent(logits, target, logit_scale=number.requires_grad_()).backward()
        assert dloss.grad is not None and number.grad is not None
    elif kind == "linear":
        monkeypatch.setattr(linear_rows, "_may_wait", lambda tensor: False)
        w = torch.ones(12, 10, device=device, requires_grad=True)
        for options in ({}, {"valid_rows": 4}, {"sample_weight": dloss}, {"max_logits_bytes": 4000}):
            fused_linear_softmax_xent(logits, w, target, **options).backward()  # type: ignore[arg-type]
        found = fused_linear_softmax_xent_with_stats(logits, w, soft.repeat(1, 2)[:, :12], stats=("lse", "entropy"))
        assert found.lse is not None
        (found.loss + found.lse.sum()).backward()
        sum(x.sum() for x in linear_logprobs(logits, w, ids=target.clamp(0)[:, None])).backward()  # type: ignore[union-attr]
    else:
        given = {"weight": weight, "label_smoothing": 0.1} if kind != "indices" else {}
        fused_softmax_xent(logits, target, **given).backward()  # type: ignore[arg-type]
    assert logits.grad is not None

"""torch.func, forward-mode AD and batched gradients: PyTorch's results, through both paths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from softxent import fused_softmax_xent, log_softmax, softmax

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 5, dtype=torch.float64, generator=GENERATOR)
INDICES = torch.tensor([0, 1, 2, 3, -100, 4])
PROBABILITIES = torch.rand(6, 5, dtype=torch.float64, generator=GENERATOR)
WEIGHT = torch.rand(5, dtype=torch.float64, generator=GENERATOR)
CASES: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "indices": (INDICES, {}),
    "indices, weight, smoothing": (INDICES, {"weight": WEIGHT, "label_smoothing": 0.1}),
    "probabilities": (PROBABILITIES, {"weight": WEIGHT, "label_smoothing": 0.1}),
    "none": (INDICES, {"reduction": "none"}),
}


def square(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: f(*args).square().sum()


@pytest.mark.parametrize("case", CASES)
def test_transforms_agree_with_torch(path: str, device: torch.device, case: str) -> None:
    target, options = CASES[case]
    z, target = LOGITS.to(device), target.to(device)
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    results = []
    for op in (fused_softmax_xent, F.cross_entropy):

        def f(logits: Tensor, op: Any = op) -> Tensor:
            return op(logits, target, **options)  # type: ignore[no-any-return]

        scalar = square(f)
        stacked = torch.stack((z, z * 2))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(forward_ad.make_dual(z, z.flip(0)))).tangent
        results.append(
            (
                grad(scalar)(z),
                hessian(scalar)(z),
                jacrev(f)(z),
                jvp(f, (z,), (z.flip(0),)),
                vmap(f)(stacked),
                vmap(grad(scalar))(stacked),
                dual,
            )
        )
    torch.testing.assert_close(*results)


def test_per_example_gradients(path: str, device: torch.device) -> None:
    def example(logits: Tensor, y: Tensor) -> Tensor:
        return fused_softmax_xent(logits, y)

    ours = vmap(grad(example))(LOGITS.to(device), INDICES.clamp(0).to(device))
    torchs = vmap(grad(lambda z, y: F.cross_entropy(z, y)))(LOGITS, INDICES.clamp(0))
    torch.testing.assert_close(ours.cpu(), torchs)


@pytest.mark.parametrize("target", [INDICES, PROBABILITIES], ids=["indices", "probabilities"])
def test_batched_incoming_gradients(path: str, device: torch.device, target: Tensor) -> None:
    results = []
    for op in (fused_softmax_xent, F.cross_entropy):
        z = LOGITS.to(device).requires_grad_()
        loss = op(z, target.to(device), reduction="none")
        basis = torch.eye(6, dtype=torch.float64, device=device)
        first = torch.autograd.grad(loss, z, basis, is_grads_batched=True, retain_graph=True)[0]
        results.append((first, torch.autograd.grad(loss.sum(), z)[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("ours", "torchs"), [(softmax, torch.softmax), (log_softmax, torch.log_softmax)])
def test_softmax_under_transforms(path: str, device: torch.device, ours: Any, torchs: Any) -> None:
    z = LOGITS.to(device)
    for op_results in zip(
        *(
            (
                hessian(lambda z, op=op: op(z, -1).square().sum())(z),
                jvp(lambda z, op=op: op(z, -1), (z,), (z.flip(0),)),
                vmap(lambda z, op=op: op(z, 0))(z),
            )
            for op in (ours, torchs)
        ),
        strict=True,
    ):
        torch.testing.assert_close(*op_results)

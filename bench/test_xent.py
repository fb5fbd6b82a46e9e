"""A training step of the loss, forward and backward: ours beside eager PyTorch, on the GPU if there is one.

`make bench`, or pytest bench/test_xent.py. Each contender must give the right loss and gradient first, and leave the
logits alone. Read the figures of a group against each other: another run, or another machine, is another matter.
`gb_per_s` counts what a step must move: the logits read once and their gradient written once.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softxent import fused_softmax_xent

CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"softxent": fused_softmax_xent, "eager": F.cross_entropy}
SHAPES = {"fashion-mnist": (256, 10), "imagenet": (1024, 1000), "llm": (256, 50257)}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step(op: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = op(logits, target)
    (grad,) = torch.autograd.grad(loss, logits)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return loss, grad


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step(benchmark: Any, shape: str, dtype: torch.dtype, contender: str) -> None:
    n_rows, n_cols = SHAPES[shape]
    op = CONTENDERS[contender]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_rows, n_cols, generator=generator).mul(3).to(DEVICE, dtype).requires_grad_()
    target = torch.randint(n_cols, (n_rows,), generator=generator).to(DEVICE)

    before = logits.detach().clone()
    loss, grad = step(op, logits, target)
    exact, exact_grad = step(F.cross_entropy, before.double().requires_grad_(), target)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=tolerance * exact_grad.abs().max().item())
    assert torch.equal(logits, before), "the contender wrote over its input"

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    benchmark.group = f"{name}, {n_rows} x {n_cols} {str(dtype).removeprefix('torch.')}"
    benchmark(step, op, logits, target)
    bytes_moved = 2 * n_rows * n_cols * dtype.itemsize
    benchmark.extra_info |= {"gb_per_s": bytes_moved / benchmark.stats["median"] / 1e9, "torch": torch.__version__}

"""What the host does for a training step on a GPU, without one, by pytest-benchmark: make bench

The operation's own code runs with every kernel launch left out; with Triton's own launches, up to the driver's call,
which is left out; and by handles (softxent/triton_kernels/handles.py), as it is. Beside them the whole of eager
PyTorch's step on the CPU, arithmetic included. Read the figures against each other: another run is another matter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softxent import fused_softmax_xent

SHAPE = (256, 10)


def left_out(*_: Any, **__: Any) -> None:
    """In the place of a launch."""


@pytest.mark.parametrize("name", ["eager", "no launch", "Triton's launches", "by handles"])
def test_launch(benchmark: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The kernels are compiled for a Hopper that is not there. In a process without TRITON_INTERPRET."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from offline import pretended
    from softxent.triton_kernels import handles

    logits = torch.randn(*SHAPE, requires_grad=True)
    target = torch.randint(SHAPE[1], SHAPE[:1])
    op: Callable[..., Tensor] = F.cross_entropy if name == "eager" else fused_softmax_xent
    monkeypatch.setattr(handles, "ON", name == "by handles")
    if name == "no launch":
        monkeypatch.setattr(JITFunction, "run", left_out)
    torch.set_num_threads(1)

    def step() -> None:
        torch.autograd.grad(op(logits, target), logits)

    with pretended(GPUTarget("cuda", 90, 32)):
        step()  # compiled
        benchmark(step)

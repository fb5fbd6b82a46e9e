"""What training puts around a loss: checkpointing, DDP, saved-tensor hooks, compiled autograd, compiling ahead."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from softxent import dispatch, fused_softmax_xent

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own
TARGET = torch.tensor([0, 1, 2, -100])


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 10)


def loss(linear: nn.Module, x: Tensor) -> Tensor:
    return fused_softmax_xent(linear(x), TARGET, z_loss=0.1)


def expected_gradient(x: Tensor) -> Tensor:
    linear = model()
    z = linear(x)
    v = (TARGET != -100).float()
    (F.cross_entropy(z, TARGET) + 0.1 * (v * z.logsumexp(1) ** 2).sum() / v.sum()).backward()
    assert linear.weight.grad is not None
    return linear.weight.grad


@pytest.fixture
def x(path: str) -> Tensor:
    return torch.linspace(-1, 1, 12).view(4, 3)


def assert_trained(linear: nn.Linear, x: Tensor) -> None:
    torch.testing.assert_close(linear.weight.grad, expected_gradient(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(x: Tensor, reentrant: bool) -> None:
    linear = model()
    checkpoint(loss, linear, x.requires_grad_(), use_reentrant=reentrant).backward()  # type: ignore[no-untyped-call]
    assert_trained(linear, x.detach())


def test_saved_tensor_hooks(x: Tensor) -> None:
    linear = model()
    with torch.autograd.graph.save_on_cpu():
        one = loss(linear, x)
    one.backward(retain_graph=True)
    assert_trained(linear, x)
    linear.weight.grad = None
    one.backward()
    assert_trained(linear, x)


def test_distributed_data_parallel(x: Tensor, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        linear = model()
        loss(DistributedDataParallel(linear), x).backward()
        assert_trained(linear, x)
    finally:
        dist.destroy_process_group()


def test_compiled_autograd(x: Tensor) -> None:
    torch._dynamo.reset()
    linear = model()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):  # type: ignore[no-untyped-call]
        loss(linear, x).backward()
    assert_trained(linear, x)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_a_program_compiled_ahead_of_time(x: Tensor, tmp_path: Path) -> None:
    linear = model()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return loss(self.linear, x)

    assert not dispatch.INTERPRET
    with torch.no_grad():
        exported = torch.export.export(Loss(), (x,))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "loss.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), loss(linear, x))

"""Under FakeTensorMode, make_fx and on the meta device, where F.cross_entropy works."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from softxent import fused_linear_softmax_xent, fused_softmax_xent, fused_softmax_xent_with_stats, linear_logprobs

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 2.0, "normalizer": 3},
    {"reduction": "none"},
)
TARGETS = {"indices": torch.tensor([0, 1, 2, 3, -100, 4]), "probabilities": torch.rand(6, 5)}


def step(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradient."""
    z = logits.detach().clone().requires_grad_()
    loss = fused_softmax_xent(z, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def with_stats(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    z = logits.detach().clone().requires_grad_()
    found = fused_softmax_xent_with_stats(z, target, stats=("entropy", "prediction"))
    assert found.entropy is not None and found.prediction is not None
    return found.loss.detach(), found.prediction, torch.autograd.grad(found.loss + found.entropy.sum(), z)[0]


def second_derivative(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    z = logits.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(fused_softmax_xent(z, target), z, create_graph=True)
    return torch.autograd.grad(grad.pow(2).sum(), z)


STEPS: tuple[tuple[Any, dict[str, Any]], ...] = (
    *((step, options) for options in OPTIONS),
    (with_stats, {}),
    (second_derivative, {}),
)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_what_gives_the_same(path: str, device: torch.device, mode: Any, kind: str) -> None:
    logits, target = torch.randn(6, 5, device=device), TARGETS[kind].to(device)
    for run, options in STEPS:
        graph = make_fx(lambda z, y: run(z, y, **options), tracing_mode=mode)(logits, target)  # noqa: B023
        torch.testing.assert_close(graph(logits * 2, target), run(logits * 2, target, **options))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_tensors_without_data_have_the_shapes_and_dtypes_of_real_ones(
    path: str, device: torch.device, where: str, kind: str
) -> None:
    logits, target = torch.randn(6, 5, device=device), TARGETS[kind].to(device)
    for run, options in STEPS:
        expected = [(x.shape, x.dtype) for x in run(logits, target, **options)]
        if where == "meta":
            found = run(logits.to("meta"), target.to("meta"), **options)
        else:
            with FakeTensorMode() as fake:
                found = run(fake.from_tensor(logits), fake.from_tensor(target), **options)
        assert [(x.shape, x.dtype) for x in found] == expected


class FromHiddenStates(nn.Module):
    def forward(self, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"shift": True, "z_loss": 0.1}
        loss = fused_linear_softmax_xent(hidden, weight, target, sample_weight=torch.ones_like(target), **options)
        probabilities = nn.functional.one_hot(target.clamp(0), weight.shape[0]).to(hidden.dtype)
        of_probabilities = fused_linear_softmax_xent(hidden, weight, probabilities, **options)
        return loss, of_probabilities, *linear_logprobs(hidden, weight, ids=target[..., None])


def test_exported_from_hidden_states_it_takes_any_number_of_rows(path: str, device: torch.device) -> None:
    weight, module = torch.randn(7, 4, device=device), FromHiddenStates()

    def batch(n_rows: int) -> tuple[Tensor, ...]:
        return torch.randn(n_rows, 6, 4, device=device), weight, TARGETS["indices"].to(device).expand(n_rows, 6)

    of_rows = {0: torch.export.Dim("n_rows", min=2)}
    exported = torch.export.export(module, batch(3), dynamic_shapes=(of_rows, {}, of_rows)).module()
    other = batch(5)
    torch.testing.assert_close(exported(*other), module(*other))


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap", "logit_scale"])
def test_operators_take_no_number_that_a_cuda_graph_would_keep(path: str, device: torch.device, name: str) -> None:
    """Each number is a tensor on the device of the logits, made in the graph from an input of it."""

    def op(logits: Tensor, target: Tensor, number: Tensor) -> Tensor:
        return fused_softmax_xent(logits, target, **{name: number})  # type: ignore[arg-type]

    logits, target = torch.randn(6, 5, device=device), TARGETS["indices"].to(device)
    number = torch.tensor(0.5, device=device)
    graph = make_fx(op)(logits, target, number)
    (call,) = (node for node in graph.graph.nodes if "softxent" in str(node.target))
    (tensor,) = call.args[5]
    assert isinstance(tensor, torch.fx.Node) and not any(isinstance(x, float) for x in call.args)
    for value in (0.5, 0.25):
        number.fill_(value)
        expected = fused_softmax_xent(logits, target, **{name: value})  # type: ignore[arg-type]
        torch.testing.assert_close(graph(logits, target, number), expected)


@pytest.mark.gpu(alone=True)
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_a_schedule_is_seen_by_a_cuda_graph(path: str, device: torch.device) -> None:
    logits, target = torch.randn(6, 5, device=device), TARGETS["indices"].to(device)
    step = torch.compile(lambda z, y, s: fused_softmax_xent(z, y, label_smoothing=s), mode="reduce-overhead")
    for number in (0.1, 0.2, 0.3, 0.4, 0.5):
        expected = fused_softmax_xent(logits, target, label_smoothing=number)
        torch.testing.assert_close(step(logits, target, number).clone(), expected)


@pytest.mark.gpu(alone=True)
@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_ten_thousand_steps_of_a_cuda_graph_learn_what_those_of_the_host_do(path: str, device: torch.device) -> None:
    """Softmax regression as fmnist trains it, 256 images of 784 pixels a step: captured once, and replayed. The host's
    are the first thousand."""
    g = torch.Generator(device).manual_seed(0)
    images = torch.rand(20, 256, 784, device=device, generator=g)
    labels = (images[..., :10] + images[..., 10:20]).argmax(-1)

    def losses(steps: int, replayed: bool) -> Tensor:
        x, y = images[0].clone(), labels[0].clone()
        w = torch.zeros(10, 784, device=device, requires_grad=True)
        found = torch.zeros(steps, device=device)

        def step() -> Tensor:
            loss = fused_softmax_xent(F.linear(x, w), y)
            (dw,) = torch.autograd.grad(loss, w)
            with torch.no_grad():
                w.sub_(0.1 * dw)
            return loss.detach()

        run = step
        if replayed:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):  # what is compiled or allocated once
                step()
            torch.cuda.synchronize()
            with torch.no_grad():
                w.zero_()
            with torch.cuda.graph(graph, stream=stream):
                out = step()

            def run() -> Tensor:
                graph.replay()
                return out

        for i in range(steps):
            x.copy_(images[i % 20])
            y.copy_(labels[i % 20])
            found[i] = run()
        return found

    ours = losses(10_000, replayed=True)
    torch.testing.assert_close(ours[:1000], losses(1000, replayed=False), rtol=1e-3, atol=1e-4)
    assert ours[-20:].mean() < 0.5 * ours[0]

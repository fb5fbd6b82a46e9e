"""FusedSoftmaxXent in the place of nn.CrossEntropyLoss."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from softxent import FusedLinearSoftmaxXent, FusedSoftmaxXent, fused_softmax_xent

LOGITS, TARGET = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 1])


def test_takes_the_arguments_of_cross_entropy_loss(path: str, device: torch.device) -> None:
    weight = torch.linspace(0.5, 2, 5)
    for arguments in (
        {},
        {"reduction": "none"},
        {"reduction": "sum", "ignore_index": 1},
        {"weight": weight, "label_smoothing": 0.2},
    ):
        module, torchs = FusedSoftmaxXent(**arguments).to(device), nn.CrossEntropyLoss(**arguments)  # type: ignore[arg-type]
        torch.testing.assert_close(module(LOGITS.to(device), TARGET.to(device)).cpu(), torchs(LOGITS, TARGET))


def test_is_a_cross_entropy_loss_with_the_same_state() -> None:
    torchs, module = nn.CrossEntropyLoss(torch.ones(5)), FusedSoftmaxXent(torch.zeros(5))
    module.load_state_dict(torchs.state_dict())
    assert isinstance(module, nn.CrossEntropyLoss)
    torch.testing.assert_close(module(LOGITS, TARGET), fused_softmax_xent(LOGITS, TARGET))


def test_follows_its_inputs_dtype() -> None:
    module = FusedSoftmaxXent(torch.ones(5)).to(torch.bfloat16)
    assert module(LOGITS.bfloat16(), TARGET).dtype == torch.bfloat16


def test_takes_what_the_function_takes(path: str, device: torch.device) -> None:
    options = {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5, "label_smoothing": 0.1, "loss_dtype": torch.float64}
    rows = torch.linspace(0, 1, 6, device=device)
    module = FusedSoftmaxXent(**options)  # type: ignore[arg-type]
    assert repr(module) == (
        "FusedSoftmaxXent(z_loss=0.1, softcap=3.0, logit_scale=0.5, loss_dtype=torch.float64, label_smoothing=0.1)"
    )
    logits, target = LOGITS.to(device), TARGET.to(device)
    found = module(logits, target, rows, 4.0)
    expected = fused_softmax_xent(logits, target, sample_weight=rows, normalizer=4.0, **options)  # type: ignore[arg-type]
    assert torch.equal(found, expected) and found.dtype == torch.float64
    assert repr(FusedSoftmaxXent()) == "FusedSoftmaxXent()"


def test_a_learned_logit_scale_is_trained(path: str, device: torch.device) -> None:
    module = FusedSoftmaxXent(logit_scale=nn.Parameter(torch.tensor(0.5))).to(device)
    (scale,) = module.parameters()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    logits = torch.nn.functional.one_hot(TARGET, 5).float().to(device)
    losses = []
    for _ in range(5):
        loss = module(logits, TARGET.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and scale.item() > 0.5


def test_a_logit_scale_that_is_a_tensor_goes_where_the_module_goes() -> None:
    module = FusedSoftmaxXent(logit_scale=torch.tensor(0.5))
    assert module.state_dict()["logit_scale"] == 0.5
    assert module.to(torch.bfloat16).logit_scale.dtype == torch.bfloat16  # type: ignore[union-attr]
    torch.testing.assert_close(module(LOGITS, TARGET), fused_softmax_xent(LOGITS, TARGET, logit_scale=0.5))


def test_in_place_reaches_the_function(path: str, device: torch.device) -> None:
    logits = LOGITS.clone().to(device).requires_grad_()
    rows = logits * 1
    FusedSoftmaxXent(inplace=True)(rows, TARGET.to(device)).backward()
    assert logits.grad is not None and not torch.equal(rows, logits)


def test_a_scale_that_is_computed_belongs_to_forward() -> None:
    parameter = torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match="pass it to forward, or keep a parameter"):
        FusedSoftmaxXent(logit_scale=parameter.exp())
    loss = FusedSoftmaxXent()(LOGITS, TARGET, logit_scale=(parameter + 1).exp())
    torch.testing.assert_close(loss, FusedSoftmaxXent(logit_scale=2.718281828)(LOGITS, TARGET))
    loss.backward()
    assert parameter.grad is not None and parameter.grad.abs() > 0.01


class Model(nn.Module):
    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.loss = loss or FusedSoftmaxXent(label_smoothing=0.1, z_loss=0.01)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.loss(logits, target)
        return loss


def test_a_model_with_it_is_traced_exported_copied_and_pickled() -> None:
    model = Model()
    expected = model(LOGITS, TARGET)
    exported = torch.export.export(model, (LOGITS, TARGET))
    saved = io.BytesIO()
    torch.export.save(exported, saved)
    saved.seek(0)
    for one in (
        torch.fx.symbolic_trace(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        exported.module(),
        torch.export.load(saved).module(),
    ):
        torch.testing.assert_close(one(LOGITS, TARGET), expected)
    linear = Model(FusedLinearSoftmaxXent(8, 33))
    hidden, tokens = torch.randn(4, 8), torch.randint(33, (4,))
    torch.testing.assert_close(torch.fx.symbolic_trace(linear)(hidden, tokens), linear(hidden, tokens))
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script does not take FusedSoftmaxXent"):
        torch.jit.script(model)

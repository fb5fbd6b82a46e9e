"""FusedSoftmaxXent in the place of nn.CrossEntropyLoss."""

import torch
from torch import nn

from softxent import FusedSoftmaxXent, fused_softmax_xent

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

"""What models do to logits, done to the logits and to what stands in their place: the same loss, or a refusal."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softxent import dispatch
from softxent.integrations.linear_logits import HeadInput, LinearLogits

BATCH, TOKENS, FEATURES, CLASSES = 2, 5, 8, 33
TARGET = torch.randint(CLASSES, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
TARGET[0, :2] = -100
CAP = 0.5
BESIDE = torch.linspace(-1, 1, CLASSES)


def flat(z: Any) -> Any:
    return z.view(-1, CLASSES)


def softcapped(z: Any) -> Any:
    z = z / CAP
    z = torch.tanh(z)
    return z * CAP


STEPS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda z: F.cross_entropy(flat(z), TARGET.view(-1)),
    "the module": lambda z: nn.CrossEntropyLoss(label_smoothing=0.2)(z.view(-1, z.size(-1)), TARGET.view(-1)),
    "class weights": lambda z: F.cross_entropy(flat(z), TARGET.view(-1), BESIDE.abs()),
    "a sum": lambda z: F.cross_entropy(flat(z), TARGET.view(-1), reduction="sum") / 7,
    "another ignored": lambda z: nn.CrossEntropyLoss(ignore_index=3)(flat(z)[4:], TARGET.view(-1)[4:]),
    "float": lambda z: F.cross_entropy(z.float().contiguous().view(-1, CLASSES), TARGET.view(-1)),
    "casts": lambda z: F.cross_entropy(flat(z.to(torch.float64).to(z.device).to(torch.float32)), TARGET.view(-1)),
    "scaled": lambda z: F.cross_entropy(flat(0.5 * z * 3.0), TARGET.view(-1)),
    "divided": lambda z: F.cross_entropy(flat(z / 4), TARGET.view(-1)),
    "by a tensor": lambda z: F.cross_entropy(flat(z * torch.tensor(2.0)), TARGET.view(-1)),
    "softcapped": lambda z: F.cross_entropy(flat(softcapped(z)), TARGET.view(-1)),
    "all of them": lambda z: F.cross_entropy(flat(softcapped(z * 0.7).float() * 2), TARGET.view(-1)),
    "as a method": lambda z: F.cross_entropy(flat((z * 2).tanh() * 3), TARGET.view(-1)),
    "a bias beside": lambda z: F.cross_entropy(flat(z + BESIDE[None]), TARGET.view(-1)),
    "shifted": lambda z: F.cross_entropy(flat(z[..., :-1, :].contiguous()), TARGET[:, 1:].reshape(-1)),
    "some": lambda z: F.cross_entropy(z[:, -3:].reshape(-1, CLASSES), TARGET[:, -3:].reshape(-1)),
    "the rest": lambda z: F.cross_entropy(z[1, ...], TARGET[1]),
    "masked": lambda z: F.cross_entropy(z[TARGET != -100], TARGET[TARGET != -100]),
    "pooled": lambda z: F.cross_entropy(z[torch.arange(BATCH), torch.tensor([3, 2])], TARGET[[0, 1], [3, 2]]),
    "a row": lambda z: F.cross_entropy(z[0, 3], TARGET[0, 3]),
    "flattened": lambda z: F.cross_entropy(z.reshape((BATCH * TOKENS, -1)), TARGET.reshape(-1)),
}

REFUSED: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda z: z.softmax(-1),
    "log_softmax": lambda z: F.log_softmax(z, -1),
    "an index of classes": lambda z: z[..., :3],
    "an index of classes, of all": lambda z: z[0, 0, 0],
    "an index of classes, with None": lambda z: z[..., None],
    "an index of classes, masked": lambda z: z[TARGET != -100, 0],
    "an assignment": lambda z: operator.setitem(z, (..., 0), 0.0),
    "mul_": lambda z: z.mul_(2),
    "div_": lambda z: z.div_(2),
    "a sum": lambda z: z + 1.0,
    "a sum, with rows": lambda z: z + torch.ones(BATCH, TOKENS, 1),
    "a sum, scaled": lambda z: z * 2 + BESIDE,
    "a sum, capped": lambda z: z.tanh() + BESIDE,
    "a difference": lambda z: z - 1.0,
    "a second tanh": lambda z: z.tanh().tanh(),
    "a product": lambda z: z * BESIDE,
    "sub": lambda z: BESIDE - z,
    "argmax": lambda z: torch.argmax(z, -1),
    "cat": lambda z: torch.cat([z, z]),
    "view": lambda z: z.view(-1, CLASSES - 1),
    "view, of others": lambda z: z.view(BATCH, -1),
    "to": lambda z: z.to("meta"),
    "transpose": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET),
    "a cross_entropy": lambda z: F.cross_entropy(z, torch.zeros(BATCH, CLASSES, dtype=torch.int64)),
}


def head_and_hidden() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES), torch.randn(BATCH, TOKENS, FEATURES, requires_grad=True)


def standing_in(head: nn.Linear, hidden: Tensor) -> LinearLogits:
    found: Any = head(HeadInput(hidden, "ThisModel", {"max_logits_bytes": 1 << 16}))
    assert isinstance(found, LinearLogits)
    return found


@pytest.mark.parametrize("name", list(STEPS))
def test_steps_that_are_followed_give_the_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    head, hidden = head_and_hidden()
    leaves = [hidden, *head.parameters()]
    right, found = STEPS[name](head(hidden)), STEPS[name](standing_in(head, hidden))
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(right, leaves)
    assert max(g.abs().max() for g in expected) > 1e-3
    torch.testing.assert_close(torch.autograd.grad(found, leaves), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_steps_are_refused_by_name(name: str) -> None:
    logits = standing_in(*head_and_hidden())
    of = "a model" if name == "cat" else "ThisModel"  # within a list
    with pytest.raises(RuntimeError, match=f"{of}: it asks its logits for .*{name.split(',')[0]}.* linear=True"):
        REFUSED[name](logits)


def test_it_looks_like_the_logits() -> None:
    head, hidden = head_and_hidden()
    found, right = standing_in(head, hidden), head(hidden)
    for name in ("shape", "dtype", "device", "ndim"):
        assert getattr(found, name) == getattr(right, name)
    assert (found.dim(), found.size(), found.size(1), found.is_contiguous()) == (3, right.size(), TOKENS, True)
    assert found.to(torch.bfloat16).dtype == torch.bfloat16 and found.to(torch.bfloat16).float().dtype == torch.float32
    assert not hasattr(found, "keys") and not hasattr(found, "__array__")  # as libraries ask


def test_only_a_linear_layer_takes_the_hidden_states() -> None:
    with pytest.raises(RuntimeError, match="ThisModel: it asks its logits for relu"):
        F.relu(HeadInput(head_and_hidden()[1], "ThisModel", {}))  # type: ignore[arg-type]

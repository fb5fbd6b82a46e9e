"""The README's Python runs as it stands, and does what the text says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from softxent import dispatch, fused_softmax_xent

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)


def test_every_example_runs(capsys: Any) -> None:
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)
    assert re.search(r"loss \d+\.\d{4}, accuracy \d\.\d{4}", capsys.readouterr().out)


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    names: dict[str, Any] = {"torch": torch, "fused_softmax_xent": fused_softmax_xent}
    (block,) = (block for block in BLOCKS if "micro_batches" in block)
    exec(block, names)
    logits, targets = (torch.cat(parts) for parts in zip(*names["micro_batches"], strict=True))
    leaf = logits.detach().requires_grad_()
    fused_softmax_xent(leaf, targets).backward()
    torch.testing.assert_close(torch.cat([part.grad for part, _ in names["micro_batches"]]), leaf.grad)


def test_a_language_model_gets_the_gradient_of_one_batch() -> None:
    names: dict[str, Any] = {"torch": torch, "fused_softmax_xent": fused_softmax_xent}
    (block,) = (block for block in BLOCKS if "prompt" in block)
    exec(block, names)
    leaf = torch.cat([logits.detach() for logits in names["outputs"]]).requires_grad_()
    tokens, prompts = (torch.cat(parts) for parts in zip(*names["batches"], strict=True))
    target = names["answers"](tokens, prompts)
    fused_softmax_xent(leaf.flatten(0, 1), target.flatten(), z_loss=1e-4).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(torch.cat([logits.grad for logits in names["outputs"]]), leaf.grad)
    for row, prompt in enumerate(prompts.tolist()):  # the first answered token is predicted one position before it
        assert not leaf.grad[row, : prompt - 1].any() and leaf.grad[row, prompt - 1 : -1].any(-1).all()

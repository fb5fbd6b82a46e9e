"""The Python of the README and of docs/ runs as it stands, and does what the text says; their links lead somewhere.

The lessons have tests of their own (test_lesson.py).
"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softxent import dispatch, fused_softmax_xent

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if "lesson" not in path.name)]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def run(page: str, first_words: str = "") -> dict[str, Any]:
    """The names that a page's blocks leave, up to the one with these words."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
        if first_words and first_words in block:
            return names
    assert not first_words, f"{page} has no block with {first_words!r}"
    return names


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)


@pytest.mark.parametrize("page", [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")], ids=str)
def test_every_example_runs(page: Path, capsys: Any) -> None:
    run(str(page.relative_to(ROOT)))
    if page.name == "options.md":
        assert re.search(r"loss \d+\.\d{4}, accuracy \d\.\d{4}", capsys.readouterr().out)


def test_the_readme_is_short() -> None:
    """900 words, tables and all; code apart."""
    text = re.sub(r"```.*?```", "", PAGES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(re.findall(r"\S*\w\S*", text)) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_tests_that_a_page_names_are_there() -> None:
    suite = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for page in PAGES:
        for name, more in re.findall(r"`(test_\w+?)(_?\.\.\.|\.py)?`", page.read_text(encoding="utf-8")):
            found = (ROOT / "tests" / f"{name}.py").exists() if more == ".py" else f"def {name}" in suite
            assert found, f"{page.name}: {name}"


@pytest.mark.parametrize(("page", "words"), [("docs/recipes.md", "micro_batches"), ("README.md", "batches")])
def test_accumulated_gradients_are_those_of_one_batch(page: str, words: str) -> None:
    names = run(page, words)
    if page == "README.md":
        pairs = [(logits, label.flatten()) for logits, label in zip(names["outputs"], names["labels"], strict=True)]
    else:
        pairs = names["micro_batches"]
    logits, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    leaf = logits.detach().requires_grad_()
    z_loss = 1e-4 if page == "README.md" else 0.0
    fused_softmax_xent(leaf.reshape(-1, 1000), targets, z_loss=z_loss).backward()
    torch.testing.assert_close(torch.cat([part.grad for part, _ in pairs]), leaf.grad)


def test_a_language_model_gets_the_gradient_of_one_batch() -> None:
    names = run("docs/recipes.md", "prompt")
    leaf = torch.cat([logits.detach() for logits in names["outputs"]]).requires_grad_()
    tokens, prompts = (torch.cat(parts) for parts in zip(*names["batches"], strict=True))
    target = names["answers"](tokens, prompts)
    fused_softmax_xent(leaf.flatten(0, 1), target.flatten(), z_loss=1e-4).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(torch.cat([logits.grad for logits in names["outputs"]]), leaf.grad)
    for row, prompt in enumerate(prompts.tolist()):  # the first answered token is predicted one position before it
        assert not leaf.grad[row, : prompt - 1].any() and leaf.grad[row, prompt - 1 : -1].any(-1).all()


def test_the_trainers_loss_is_a_shifted_one_over_the_items_of_all_steps() -> None:
    loss_of = run("docs/recipes.md", "def loss_of")["loss_of"]
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    shifted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss_of(SimpleNamespace(logits=logits), labels, torch.tensor(16)), shifted / 16)
    torch.testing.assert_close(loss_of(SimpleNamespace(logits=logits), labels), shifted / 8)


def test_the_policy_gets_the_gradient_of_plain_operations() -> None:
    names = run("docs/recipes.md", "ratio")
    leaf = names["logits"].detach().requires_grad_()
    log_p = torch.log_softmax(leaf / 0.8, -1)
    said = names["said"]
    logprob = log_p.gather(-1, names["tokens"].clamp(min=0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    ratio = torch.exp(logprob - names["before"])
    gain = torch.minimum(ratio * names["advantage"], ratio.clamp(0.8, 1.2) * names["advantage"])
    (-((gain + 0.01 * entropy) * said).sum() / said.sum()).backward()
    torch.testing.assert_close(names["logits"].grad, leaf.grad)

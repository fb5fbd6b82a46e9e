"""The lesson by hand: each step against what PyTorch says, and the whole of it against `train`."""

import doctest
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fmnist.data
from fmnist import models, plots, scratch, train
from softxent import dispatch


def example(n: int = 7, q: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, q, generator=generator, dtype=torch.float64) * 3
    return logits, torch.randint(q, (n,), generator=generator)


def test_the_examples_run_as_they_are_written() -> None:
    found = doctest.testmod(scratch)
    assert found.failed == 0 and found.attempted >= 15


def test_by_hand_through_torchs_loss_and_through_the_fused_op_the_curve_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    monkeypatch.setattr(plots, "missing", lambda: "they are not what is tested here")
    curves = {"by hand": list(scratch.curve(fmnist.data.load("sample"), 4, 256, 0.1, seed=3))}
    for loss in ("torch", "fused"):
        train.train(train.Config(loss=loss, data="sample", epochs=4, seed=3, runs=str(tmp_path), name=loss))
        records = map(json.loads, (tmp_path / loss / "metrics.jsonl").read_text().splitlines())
        curves[loss] = [record for record in records if record["event"] == "epoch"]
    for by_hand, *others in zip(*curves.values(), strict=True):
        for other in others:
            for key in ("train_loss", "test_loss"):
                assert by_hand[key] == pytest.approx(other[key], rel=1e-5)
            for key in ("train_accuracy", "test_accuracy"):  # an image whose classes tie may fall either way
                assert by_hand[key] == pytest.approx(other[key], abs=0.002)
    assert curves["by hand"][-1]["train_loss"] < 0.6 * curves["by hand"][0]["train_loss"]


def test_nothing_does_the_arithmetic_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No softmax, no loss, no layer, no optimizer, and no autograd of torch's."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("torch did it")

    for owner in (torch, F, torch.Tensor):
        for name in ("softmax", "log_softmax", "logsumexp", "cross_entropy", "nll_loss", "linear", "backward"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, forbidden)
    monkeypatch.setattr(torch.nn.Module, "__call__", forbidden)
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    (record,) = scratch.curve(fmnist.data.load("sample"), epochs=1, batch_size=256, lr=0.1, seed=1)
    assert record["test_accuracy"] > 0.5


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_it_starts_where_train_starts(seed: int) -> None:
    torch.manual_seed(seed)
    layer = models.softmax_regression()
    W, b = scratch.parameters(seed)
    assert torch.equal(W.T, layer.get_parameter("weight")) and torch.equal(b, layer.get_parameter("bias"))


def test_scalar_by_scalar_a_row_a_column_and_a_minibatch_are_the_same_outputs() -> None:
    """2 x 2 pixels, 3 classes: o = x W + b of the first note, o = W x + b of the second, O = X W + b of both."""
    generator = torch.Generator().manual_seed(0)
    X, W, b = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (4, 3), (3,)))
    assert W.numel() == 12 and b.numel() == 3
    O = scratch.outputs(X, W, b)  # noqa: E741
    for x, o in zip(X, O, strict=True):
        one_by_one = scratch.outputs_one_by_one(x.tolist(), W.tolist(), b.tolist())
        torch.testing.assert_close(torch.tensor(one_by_one, dtype=torch.float64), o)
        torch.testing.assert_close(W.T @ x + b, o)


def test_softmax_is_a_distribution_that_keeps_the_order() -> None:
    logits, _ = example(50)
    p = scratch.softmax(logits)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=p.dtype))
    assert torch.equal(p.argsort(1), logits.argsort(1))
    assert torch.equal(scratch.hardmax(logits), scratch.hardmax(p))


def test_the_naive_softmax_overflows_and_the_other_does_not() -> None:
    logits, _ = example()
    torch.testing.assert_close(scratch.naive_softmax(logits), torch.softmax(logits, 1))
    high = logits + 1000
    assert scratch.naive_softmax(high).isnan().all()
    torch.testing.assert_close(scratch.softmax(high), torch.softmax(logits, 1))
    torch.testing.assert_close(scratch.log_softmax(high), torch.log_softmax(logits, 1))


def test_picking_the_labels_term_is_the_sum_over_a_one_hot_label() -> None:
    logits, labels = example()
    log_p = scratch.log_softmax(logits)
    one_hot = torch.eye(5, dtype=torch.float64)[labels]
    torch.testing.assert_close(scratch.cross_entropy(log_p, labels), -(one_hot * log_p).sum(1))
    torch.testing.assert_close(scratch.cross_entropy(log_p, labels).mean(), F.cross_entropy(logits, labels))


def test_the_gradient_by_hand_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    X, W, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (4, 3), (3,)))
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    dO = scratch.gradient(scratch.outputs(X, W, b), labels)
    dW, db = scratch.gradients_of_parameters(X, dO)
    W.requires_grad_(), b.requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(X @ W + b, labels), (W, b))
    torch.testing.assert_close((dW, db), expected)
    torch.testing.assert_close(dO.sum(1), torch.zeros(6, dtype=torch.float64))


def test_a_class_holds_all_that_lies_between_two_of_its_images() -> None:
    """A linear model, for all that softmax is not linear: boundaries are planes, and so each class is convex."""
    X, _ = scratch.as_tensors(*fmnist.data.load("sample")[:2])
    generator = torch.Generator().manual_seed(0)
    W, b = torch.randn(784, 10, generator=generator), torch.randn(10, generator=generator)
    classes = scratch.outputs(X, W, b).argmax(1)
    for k in classes.unique():
        first, last = X[classes == k][[0, -1]]
        between = torch.lerp(first, last, torch.linspace(0, 1, 101)[:, None])
        assert (scratch.softmax(scratch.outputs(between, W, b)).argmax(1) == k).all()
    assert len(classes.unique()) > 2


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (9, 3), (2, 5), (1, 1)])
def test_minibatches_have_every_image_once(n: int, batch_size: int) -> None:
    order = torch.randperm(n)
    batches = list(scratch.minibatches(n, batch_size, order))
    assert torch.equal(torch.cat(batches), order)
    assert all(len(rows) == batch_size for rows in batches[:-1])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert scratch.main("--data sample --epochs 2".split()) == 0
    out = capsys.readouterr().out
    assert "nan" in out and "epoch   2" in out and "the embedded sample" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data /nonexistent", "does not exist"),
        ("--epochs -1", "argument --epochs: invalid value '-1': it must be a whole number above 0"),
        ("--batch-size 0", "argument --batch-size: invalid"),
        ("--lr nan", "argument --lr: invalid"),
        ("--seed -1", "argument --seed: invalid"),
        ("--loss mse", "unrecognized arguments: --loss mse"),
        ("--data sample --lr 1e38 --epochs 3", "try a smaller --lr"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = scratch.main(arguments.split())
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fmnist: ") and message in line

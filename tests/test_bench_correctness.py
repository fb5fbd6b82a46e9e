"""The suite finds out contenders that are wrong, that remember, that leave something unwritten, or write elsewhere."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import planted
from bench import cases, correctness
from bench.cases import Case, inputs
from bench.contenders import Function
from bench.work import Work

STEP = Case("cross_entropy", 37, 11, "float32", "step")
CPU = torch.device("cpu")
PLANTED = {
    "loss": (planted.wrong_loss, "the loss is"),
    "gradient": (planted.wrong_gradient, "the gradient at [36, "),
    "unwritten": (planted.unwritten_gradient, "the gradient at [0, 0] is nan"),
    "stale": (planted.stale, "the loss is"),
    "later": (planted.wrong_later(1), "the loss is"),
    "overwriting": (planted.overwriting, "it wrote over its input: the logits"),
    "target": (planted.writes_target, "it wrote over its input: the target"),
    "raising": (planted.raising, "RuntimeError: no kernel image is available"),
}


def checked(case: Case, **makes: Callable[[Case], Function]) -> dict[str, object]:
    return dict(correctness.check(planted.works(case, **makes), case, inputs(case, CPU, 0), [1, 2]))


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_wrong_is_said(name: str) -> None:
    make, said = PLANTED[name]
    found = checked(STEP, bad=make)
    assert isinstance(found["bad"], str) and found["bad"].startswith(said), found


def test_an_empty_gradient_is_found() -> None:
    assert "nan" in str(checked(STEP, bad=planted.empty_gradient)["bad"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_column_left_out_of_a_wide_row_is_found(dtype: str) -> None:
    """Its share of the gradient is far below what rounding does to the target's."""
    found = checked(
        Case("cross_entropy", 30, 20001, dtype, "step"), bad=planted.without_last_column, right=planted.right
    )
    assert str(found["bad"]).startswith("the gradient in column 20000 is off by"), found
    assert isinstance(found["right"], dict)


def test_memory_is_full_of_nan_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(correctness, "poison", lambda logits: calls.append("poison"))
    (work,) = planted.works(STEP, right=planted.right).values()
    run = work.run
    monkeypatch.setattr(work, "run", lambda given: calls.append("run") or run(given))  # type: ignore[func-returns-value]
    correctness.check({"right": work}, STEP, inputs(STEP, CPU, 0), [1, 2])
    assert calls == ["poison", "run"] * 2


def test_what_is_right_has_its_errors() -> None:
    for kind in cases.KINDS:
        for mode in cases.MODES:
            case = STEP._replace(kind=kind, mode=mode)
            found = checked(case, right=planted.right)["right"]
            assert isinstance(found, dict) and set(found) == ({"loss"} if mode == "forward" else {"loss", "gradient"})
            assert all(0 <= error < 1e-5 for error in found.values())


def test_one_that_is_wrong_does_not_spoil_the_others() -> None:
    bad = {name: make for name, (make, _) in PLANTED.items()}
    found = checked(STEP, first=planted.right, **bad, last=planted.right)
    assert [name for name, errors in found.items() if isinstance(errors, dict)] == ["first", "last"]


def test_who_says_that_it_overwrites_may() -> None:
    work = Work(planted.contender(planted.overwriting, overwrites=True), STEP)
    found = correctness.check({"inplace": work}, STEP, inputs(STEP, CPU, 0), [1, 2])
    assert isinstance(found["inplace"], dict)


def test_wrong_where_no_gradient_is_wanted() -> None:
    assert isinstance(checked(STEP._replace(mode="forward"), bad=planted.wrong_loss)["bad"], str)


def test_a_wrong_softmax_is_found() -> None:
    case = Case("softmax", 20, 7, "float32", "step")
    found = checked(case, right=lambda _: lambda x, _: x.softmax(1), wrong=lambda _: lambda x, _: (x * 1.1).softmax(1))
    assert isinstance(found["right"], dict) and str(found["wrong"]).startswith("the probabilities at [")


def test_the_exact_result_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in cases.KINDS:
        case = STEP._replace(kind=kind)
        given = inputs(case, CPU, 3)
        whole = correctness.exact(case, given)
        monkeypatch.setattr(correctness, "CHUNK", {"cpu": 4 * case.n_cols})
        parts = correctness.exact(case, given)
        monkeypatch.undo()
        logits = given.logits.detach().double().requires_grad_()
        target = given.target.double() if kind == "soft" else given.target
        loss = F.cross_entropy(logits, target, label_smoothing=0.1 if kind == "smoothing" else 0.0)
        (gradient,) = torch.autograd.grad(loss, logits, given.gradient.double())
        for found in (whole, parts):
            torch.testing.assert_close(found.out, loss.detach(), rtol=1e-12, atol=0)
            assert found.gradient is not None
            torch.testing.assert_close(found.gradient, gradient, rtol=0, atol=1e-12)


def test_inputs_are_what_their_case_says() -> None:
    ignored = inputs(STEP._replace(kind="ignored"), CPU, 0)
    assert (ignored.target == cases.IGNORE_INDEX).sum() == 19  # every second of 37
    soft = inputs(STEP._replace(kind="soft"), CPU, 0)
    torch.testing.assert_close(soft.target.sum(1), torch.ones(37))
    assert inputs(STEP._replace(kind="scaled"), CPU, 0).gradient == cases.SCALE
    assert not torch.equal(inputs(STEP, CPU, 0).logits, inputs(STEP, CPU, 1).logits)


def test_the_least_bytes() -> None:
    """By hand, for 6 rows of 5 float32: 120 bytes of logits, 48 of targets."""
    case = Case("cross_entropy", 6, 5, "float32", "step")
    assert case.least_bytes == 120 + 48 + 120
    assert case._replace(mode="forward").least_bytes == 120 + 48
    assert case._replace(kind="scaled").least_bytes == 120 + 48 + 120 + 120
    assert case._replace(kind="soft").least_bytes == 120 + 120 + 120
    assert case._replace(kind="ignored").least_bytes == 60 + 48 + 120
    assert case._replace(op="softmax", mode="forward").least_bytes == 240
    assert case._replace(op="softmax").least_bytes == 600

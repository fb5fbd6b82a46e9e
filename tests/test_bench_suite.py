"""The suite as a whole: no time for who is wrong, before or after; what was measured is kept and gone on with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import planted
from bench import contenders, results, suite, timing
from bench.cases import DTYPES, KINDS, MODES, SMALL, Case, sweep
from bench.contenders import Contender, Unavailable
from bench.machine import Cpu, Machine, Rehearsal
from bench.results import Measurement

CASES = [Case("cross_entropy", 37, 11, "float32", mode) for mode in ("step", "forward")]
MANY = [Case("cross_entropy", 37, n_cols, "float32", "step") for n_cols in range(2, 42)]
SOME = {
    "right": planted.contender(planted.right),
    "wrong": planted.contender(planted.wrong_loss),
    "cannot": planted.contender(planted.cannot),
    "raising": planted.contender(planted.raising),
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Contender]:
    """Planted contenders in place of the registry's."""
    some = dict(SOME)
    monkeypatch.setattr(suite, "CEILING_BYTES", {"cpu": 1 << 16})

    def load(name: str, device_type: str) -> Contender:
        if name == "absent":
            raise Unavailable("not installed")
        return some[name]

    monkeypatch.setattr(contenders, "load", load)
    return some


def measured(machine: Machine, path: Path | None, names: list[str], cases: list[Case] = CASES, **options: Any) -> Any:
    found = suite.begin(machine, path, names)
    left = suite.run(cases, machine, found, path, 0.01, **options)
    return found, left


def test_who_is_wrong_gets_no_time_but_the_error(registered: dict[str, Contender]) -> None:
    found, left = measured(Cpu(), None, [*SOME, "absent"])
    assert left == []
    for case in CASES:
        got = found.of(case)
        assert set(got) == {*SOME, "copy"}
        assert (
            got["right"].error is None
            and len(got["right"].seconds["calls"][0]) >= 2
            and got["right"].peak_bytes is not None
        )
        assert got["right"].errors["loss"] < 1e-5
        assert got["wrong"].error.startswith("the loss is") and got["wrong"].seconds == {}
        assert got["cannot"].error == "does not do it: rows of more than 4 classes" and got["cannot"].seconds == {}
        assert got["raising"].error.startswith("RuntimeError") and got["raising"].seconds == {}
    assert found.contenders["absent"] == {"unavailable": "not installed"}


def test_who_becomes_wrong_while_timed_gets_no_time(registered: dict[str, Contender]) -> None:
    registered["later"] = planted.contender(planted.wrong_later(5))
    found, _ = measured(Cpu(), None, ["right", "later"], CASES[:1])
    got = found.of(CASES[0])
    assert got["later"].error.startswith("the loss is") and got["later"].seconds == {}
    assert got["right"].error is None and got["right"].seconds


def test_peak_memory_is_counted(registered: dict[str, Contender]) -> None:
    """Eager's step at its highest holds the log-probabilities, the gradient that comes to them, and its own."""
    case = Case("cross_entropy", 256, 500, "float32", "step")
    found, _ = measured(Cpu(), None, ["right"], [case])
    assert 2.9 < found.of(case)["right"].peak_bytes / case.matrix_bytes < 3.2


def test_a_run_that_was_cut_off_is_gone_on_with(registered: dict[str, Contender], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    found, left = measured(Rehearsal(), path, ["right", "wrong"], deadline=0.0)
    assert left == CASES and found.measurements == []
    measured(Rehearsal(), path, ["right", "wrong"], CASES[:1])
    before = results.load(path).of(CASES[0])
    registered["right"] = planted.contender(planted.raising)  # a second measurement would show
    found, left = measured(Rehearsal(), path, ["right", "wrong"])
    assert left == []
    assert results.load(path).of(CASES[0]) == before
    assert found.of(CASES[1])["right"].error.startswith("RuntimeError")


def test_results_of_other_code_or_another_device_are_begun_anew(
    registered: dict[str, Contender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    measured(Rehearsal(), path, ["right"])
    assert suite.begin(Rehearsal(), path, ["right"]).measurements
    assert not suite.begin(Cpu(), path, ["right"]).measurements
    monkeypatch.setattr(suite, "sources", lambda checkout: "another")
    assert not suite.begin(Rehearsal(), path, ["right"]).measurements


def test_a_contender_that_came_later_is_measured_with_the_others(
    registered: dict[str, Contender], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    measured(Rehearsal(), path, ["right"], CASES[:1])
    found, _ = measured(Rehearsal(), path, ["right", "wrong"], CASES[:1])
    assert set(found.of(CASES[0])) == {"right", "wrong", "copy"}


def test_out_of_memory_leaves_the_other_cases(
    registered: dict[str, Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = suite.measure

    def full(case: Case, *rest: Any) -> Any:
        if case == CASES[0]:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return measure(case, *rest)

    monkeypatch.setattr(suite, "measure", full)
    found, left = measured(Cpu(), None, ["right"])
    assert left == [] and found.of(CASES[0])["right"].error.startswith("OutOfMemoryError: tried to allocate")
    assert found.of(CASES[1])["right"].error is None


def test_who_takes_the_device_along_is_left_out_the_next_time(registered: dict[str, Contender], tmp_path: Path) -> None:
    class Fragile(Rehearsal):
        broken = False

        def synchronize(self) -> None:
            if self.broken:
                raise RuntimeError("an illegal memory access was encountered")

    machine, path = Fragile(), tmp_path / "results.json"

    def breaking(case: Case) -> Any:
        def function(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            machine.broken = True
            raise RuntimeError("an illegal memory access was encountered")

        return function

    registered["breaking"] = planted.contender(breaking)
    with pytest.raises(suite.Lost, match="breaking at cross_entropy step"):
        measured(machine, path, ["breaking", "right"], CASES[:1])
    machine.broken = False
    found, left = measured(machine, path, ["breaking", "right"], CASES[:1])
    assert left == [] and found.of(CASES[0])["right"].seconds
    assert found.of(CASES[0])["breaking"].error.startswith("the device was lost: RuntimeError: an illegal memory")


def test_an_error_that_is_nobodys_leaves_the_other_cases(
    registered: dict[str, Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    contest = timing.contest

    def failing(works: Any, *rest: Any) -> Any:
        if next(iter(works.values())).case == CASES[0]:
            raise RuntimeError("while timed")
        return contest(works, *rest)

    monkeypatch.setattr(suite, "contest", failing)
    found, _ = measured(Cpu(), None, ["right"])
    assert found.of(CASES[0])["right"].error == "RuntimeError: while timed" and found.of(CASES[1])["right"].seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`now` is the suite's time."""
    made = SimpleNamespace(now=0.0)
    made.monotonic = lambda: made.now
    monkeypatch.setattr(suite, "time", made)
    return made


@pytest.mark.parametrize(
    ("checks", "asked", "enough"),
    [
        (1.0, 0.2, True),  # there is time for all that was asked for
        (1.0, 2.0, True),  # there is not: less for each, and all are done
        (9.0, 2.0, False),  # not even for being right: the others are left
    ],
)
def test_all_ends_before_the_deadline(
    checks: float,
    asked: float,
    enough: bool,
    registered: dict[str, Contender],
    monkeypatch: pytest.MonkeyPatch,
    clock: SimpleNamespace,
) -> None:
    """40 cases in 100 s, with two methods each."""
    given: list[float] = []

    def measure(case: Case, todo: Any, machine: Machine, seconds: float) -> list[Measurement]:
        given.append(seconds)
        clock.now += checks + 2 * seconds
        return [Measurement(case, name) for name in todo]

    monkeypatch.setattr(suite, "measure", measure)
    found = suite.begin(Rehearsal(), None, ["right"])
    left = suite.run(MANY, Rehearsal(), found, None, asked, deadline=100.0)
    assert 50 < clock.now <= 100
    assert left == MANY[len(given) :] and (not left) == enough
    assert (given == [asked] * len(MANY)) == (asked == 0.2)


def test_a_case_that_took_long_is_forgotten(
    registered: dict[str, Contender], monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    """The first, in which everything is loaded, does not keep the last from being begun."""

    def measure(case: Case, todo: Any, machine: Machine, seconds: float) -> list[Measurement]:
        clock.now += 50 if clock.now == 0 else 1
        return [Measurement(case, name) for name in todo]

    monkeypatch.setattr(suite, "measure", measure)
    found = suite.begin(Rehearsal(), None, ["right"])
    assert suite.run(MANY, Rehearsal(), found, None, 0.2, deadline=100.0) == []


def test_the_sweep_has_every_width_and_about_as_many_bytes() -> None:
    found = list(sweep(1 << 26))
    assert len(set(found)) == len(found)
    steps = [case for case in found if (case.op, case.mode, case.kind) == ("cross_entropy", "step", "mean")]
    for dtype in DTYPES:
        shapes = {(case.n_rows, case.n_cols) for case in steps if case.dtype == dtype}
        assert shapes >= set(SMALL)
        assert {n_cols for _, n_cols in shapes} == {
            *(2, 10, 32, 64, 100, 1000, 4096, 32000, 50257, 65537, 128256, 151936, 262144)
        }
    large = [case for case in steps if (case.n_rows, case.n_cols) not in SMALL]
    assert all(1 <= case.matrix_bytes / (1 << 26) < 1.02 for case in large)


def test_the_sweep_has_every_kind_and_mode_in_each_dtype_and_the_loss_alone_first() -> None:
    found = list(sweep(1 << 26))

    def kinds(dtype: str) -> set[tuple[str, str, str, int]]:
        return {(case.op, case.mode, case.kind, case.n_cols) for case in found if case.dtype == dtype}

    assert kinds("bfloat16") == kinds("float32")
    assert {kind[:3] for kind in kinds("float32")} == {
        *(("cross_entropy", mode, "mean") for mode in MODES),
        *(("cross_entropy", "step", kind) for kind in KINDS),
        ("softmax", "forward", "mean"),
        ("softmax", "step", "mean"),
    }
    first = [case for case in found if case.op == "cross_entropy" and case.kind == "mean" and case.mode != "backward"]
    assert found[: len(first)] == first
    dtypes = [case.dtype for case in found[len(first) :]]
    assert dtypes == sorted(dtypes), "a cut-off run has one dtype whole before the other"
